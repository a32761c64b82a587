"""Rules of the operators that only neural networks have: convolutions, norms, pools, lookups, losses."""

from __future__ import annotations

from dataclasses import replace

import torch

from batchtrim.engine.graphs import name_of
from batchtrim.engine.layout import Axis, Layout, Mixes, RowLayout, Whole, exact_ratio, factor_of
from batchtrim.engine.rules import Call, Value, aligned, holds, not_along, one_with_rows, rule

__all__ = ["BATCH_NORM_BACKWARD", "only_batch", "summed_gradients"]


def summed_gradients(call: Call, *gradients: Value) -> Layout:
    """Return the layout of a sum over all rows, which is right if the rows that are not kept vanish."""
    if not all(gradient.zero for gradient in gradients):
        raise Mixes("it sums over the rows")
    rows = [value.layout for value in gradients if isinstance(value.layout, RowLayout)]
    if any(axis is None for layout in rows for axis in layout.axes):
        raise Mixes("it sums over some rows")
    return Whole()


def _whole(value: Value | None, what: str) -> None:
    if value is not None and not isinstance(value.layout, Whole):
        raise Mixes(f"its {what} differs from row to row")


def only_batch(call: Call, values: list[Value | None], dims: tuple[int, ...] = (0,)) -> tuple[Axis | None, ...]:
    """Return the row axes that all operands with rows share; they must lie along ``dims``."""
    given = [value for value in values if value is not None and isinstance(value.layout, RowLayout)]
    axes = aligned(call, given[0], given)
    if any(axis is not None and axis.dim not in dims for axis in axes):
        raise Mixes("it goes along the rows")
    return axes


# --- convolutions ----------------------------------------------------------------------------------------------------


@rule("convolution")
def convolution(call: Call) -> Layout:
    if holds(call["groups"], call.symbols):
        _own_kernels(call, call["input"], call["weight"], call["bias"])
        return RowLayout((Axis(1, 1, exact_ratio(call.out.shape[1], call.symbols[0])),))
    _whole(call["weight"], "weight")
    _whole(call["bias"], "bias")
    return RowLayout(only_batch(call, [call["input"]]))


@rule("convolution_backward")
def convolution_backward(call: Call) -> list[Layout]:
    gradient = call["grad_output"]
    if holds(call["groups"], call.symbols):
        x, weight = call["input"], call["weight"]
        _own_kernels(call, x, weight, None)
        _own_kernels(call, gradient, weight, None)
        bias = RowLayout((Axis(0, 1, exact_ratio(gradient.shape[1], call.symbols[0])),))
        return [replace(each, vanish=gradient.zero) for each in (x.layout, weight.layout, bias)]
    _whole(call["weight"], "weight")
    rows = RowLayout(only_batch(call, [gradient, call["input"]]), gradient.zero)
    total = summed_gradients(call, gradient) if any(call["output_mask"][1:]) else Whole()
    return [rows, total, total]


def _own_kernels(call: Call, x: Value, weight: Value, bias: Value | None) -> None:
    """Check that a convolution of g groups for each row convolves every row with kernels of its own.

    The rows then lie sample by sample along the channels, which ``groups = g * s`` divides evenly.
    """
    each = factor_of(call["groups"], call.symbols[0])
    if len(call.symbols) > 1 or not isinstance(each, int):
        raise Mixes("it computes with the number of rows")
    given = [(x, 1), (weight, 0)]
    if bias is not None and not isinstance(bias.layout, Whole):
        given.append((bias, 0))
    for value, dim in given:
        axis = value.layout.axes[0] if isinstance(value.layout, RowLayout) else None
        if axis is None or axis.dim != dim or axis.outer != 1:
            raise Mixes("it combines different rows")
        if value is not bias and exact_ratio(value.shape[dim], call["groups"]) is None:
            raise Mixes("its groups do not divide a row")


# --- norms -----------------------------------------------------------------------------------------------------------


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> list[Layout]:
    value, layout = one_with_rows(call)
    not_along(layout, [-1 - i for i in range(len(call["normalized_shape"]))], value.ndim, "it normalises over the rows")
    return [replace(layout, vanish=False)] * len(call.outputs)


@rule("native_layer_norm_backward", "_fused_rms_norm_backward")
def layer_norm_backward(call: Call) -> list[Layout]:
    gradient, x = call["grad_out"], call["input"]
    _whole(call["weight"], "weight")
    axes = aligned(call, x)
    rows = RowLayout(axes, gradient.zero)
    not_along(rows, [-1 - i for i in range(len(call["normalized_shape"]))], x.ndim, "it normalises over the rows")
    return [rows, *[summed_gradients(call, gradient)] * (len(call.outputs) - 1)]


@rule("native_group_norm")
def group_norm(call: Call) -> list[Layout]:
    _whole(call["weight"], "weight")
    return [RowLayout(only_batch(call, [call["input"]]))] * 3


@rule("native_group_norm_backward")
def group_norm_backward(call: Call) -> list[Layout]:
    _whole(call["weight"], "weight")
    gradient = call["grad_out"]
    axes = only_batch(call, [gradient, call["input"]])
    for statistic in (call["mean"], call["rstd"]):
        if not isinstance(statistic.layout, RowLayout) or statistic.layout.axes != axes:
            raise Mixes("it combines different rows")
    return [RowLayout(axes, gradient.zero), *[summed_gradients(call, gradient)] * 2]


_BATCH_NORMS = (
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
    "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_with_update_functional",
    "_batch_norm_no_update", "batch_norm_with_update", "miopen_batch_norm",
)  # fmt: skip
_EVALUATING = ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
BATCH_NORM_BACKWARD = ("native_batch_norm_backward", "cudnn_batch_norm_backward", "batch_norm_backward")


@rule(*_BATCH_NORMS)
def batch_norm(call: Call) -> list[Layout]:
    """Keep rows apart if they lie along the channels (instance norm), or in evaluation; otherwise mix the batch."""
    x = call["input"]
    training = call["training"] if call["training"] is not None else call["train"]
    channels = _channels(call, x, training is not False and name_of(call.func) not in _EVALUATING)
    assert isinstance(x.layout, RowLayout)
    return [replace(x.layout, vanish=False), *[channels] * (len(call.outputs) - 1)]


@rule(*BATCH_NORM_BACKWARD)
def batch_norm_backward(call: Call) -> list[Layout]:
    gradient, x = call["grad_out"] or call["grad_output"], call["input"]
    training = call["train"] if call["train"] is not None else call["update"]
    channels = _channels(call, x, training is not False)
    rows = RowLayout(aligned(call, x, [gradient, x]), gradient.zero)
    if isinstance(channels, RowLayout):
        return [rows, *[replace(channels, vanish=gradient.zero)] * 2]
    return [rows, *[summed_gradients(call, gradient)] * 2]


def _channels(call: Call, x: Value, training: bool) -> Layout:
    """Return the layout of values per channel: weights and statistics."""
    layout = x.layout
    among_channels = isinstance(layout, RowLayout) and layout.dims == {1}
    if not isinstance(layout, RowLayout) or (training and not among_channels):
        raise Mixes("it normalises over the batch")
    not_along(layout, () if among_channels else (1,), x.ndim)
    channels = RowLayout(tuple(None if axis is None else replace(axis, dim=0) for axis in layout.axes))
    for name in ("weight", "bias", "running_mean", "running_var", "save_mean", "save_invstd", "save_var"):
        value = call[name]
        if not among_channels:
            _whole(value, name)
        elif value is not None and (not isinstance(value.layout, RowLayout) or value.layout.axes != channels.axes):
            raise Mixes("it combines different rows")
    return channels if among_channels else Whole()


# --- pools and resampling --------------------------------------------------------------------------------------------

_SPATIAL = (
    "max_pool2d_with_indices", "max_pool3d_with_indices", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_max_pool2d",
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "_upsample_nearest_exact2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample_trilinear3d", "im2col", "col2im", "pixel_shuffle",
    "pixel_unshuffle", "channel_shuffle", "grid_sampler_2d", "grid_sampler_3d",
)  # fmt: skip
_LINEAR = ("avg", "upsample", "im2col", "col2im", "shuffle", "grid_sampler")  # zero if the first operand is
_SPATIAL_BACKWARD = (
    *(f"{name}_backward" for name in _SPATIAL),
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward",
)  # fmt: skip


@rule(*_SPATIAL, *_SPATIAL_BACKWARD)
def spatial(call: Call) -> list[Layout]:
    """Process each sample by itself, batch first; a pad only needs its rows outside of the dimensions that it pads."""
    if any(isinstance(value.layout, Whole) for value in call.values):
        raise Mixes("one of its inputs belongs to no row")
    name = name_of(call.func)
    vanish = call.values[0].zero and (name.endswith("_backward") or any(each in name for each in _LINEAR))
    dims = tuple(range(call.values[0].ndim - len(call["padding"]) // 2)) if "_pad" in name else (0,)
    return [RowLayout(only_batch(call, list(call.values), dims), vanish)] * len(call.outputs)


# --- lookups ---------------------------------------------------------------------------------------------------------


@rule("embedding")
def embedding(call: Call) -> Layout:
    _whole(call["weight"], "table")
    return replace(call["indices"].layout, vanish=False)


@rule("embedding_dense_backward")
def embedding_backward(call: Call) -> Layout:
    if call["scale_grad_by_freq"]:
        raise Mixes("it counts how often an entry occurs in the batch")
    gradient, indices = call["grad_output"], call["indices"]
    spread = Value((*indices.shape, 1), indices.layout)
    aligned(call, gradient, [gradient, spread])
    return summed_gradients(call, gradient)


@rule("gather")
def gather(call: Call) -> Layout:
    layout = RowLayout(aligned(call, call.out, [call["self"], call["index"]]))
    not_along(layout, [call["dim"]], call.out.ndim, "it takes entries of other rows")
    if isinstance(call["index"].layout, Whole) or isinstance(call["self"].layout, Whole):
        raise Mixes("one of its inputs belongs to no row")
    return replace(layout, vanish=call["self"].zero)


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(call: Call) -> Layout:
    values = [call["self"], call["index"], *([call["src"]] if isinstance(call["src"], Value) else [])]
    layout = RowLayout(aligned(call, call.out, values))
    not_along(layout, [call["dim"]], call.out.ndim, "it writes into other rows")
    if any(isinstance(value.layout, Whole) for value in values):
        raise Mixes("one of its inputs belongs to no row")
    written = call["src"] if call["src"] is not None else call["value"]
    zero = written.zero if isinstance(written, Value) else written == 0
    return replace(layout, vanish=call["self"].zero and zero)


@rule("index_select")
def index_select(call: Call) -> Layout:
    value, index = call["self"], call["index"]
    at = call["dim"] % value.ndim
    if isinstance(index.layout, Whole):
        not_along(value.layout, [at], value.ndim, "it takes some rows")
        return value.layout
    _whole(value, "table")
    return replace(index.layout.moved([at]), vanish=False)


def _indexed(call: Call, base: Value) -> tuple[tuple[Axis | None, ...], int]:
    """Return where rows lie in ``base[indices]``, and its dimensions; rows may only be indexed by their positions."""
    indices = list(call["indices"]) + [None] * (base.ndim - len(call["indices"]))
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if any(len(i.shape) == 0 for i in indices if i is not None) and not given:
        raise Mixes("no rule tells what it does with rows")
    width = max(indices[dim].ndim for dim in given)
    together = given == list(range(given[0], given[-1] + 1))
    start = given[0] if together else 0
    kept = [dim for dim in range(base.ndim) if dim not in given]
    to: dict[int, int] = {}
    for dim in kept:
        to[dim] = kept.index(dim) + (width if not together or dim > given[0] else 0)
    base_axes = base.layout.axes if isinstance(base.layout, RowLayout) else (None,) * len(call.symbols)
    axes: list[Axis | None] = []
    for i in range(len(call.symbols)):
        place: Axis | None = None
        for dim in given:
            index = indices[dim]
            axis = index.layout.axes[i] if isinstance(index.layout, RowLayout) else None
            if axis is not None:
                moved = replace(axis, dim=start + width - index.ndim + axis.dim)
                if place is not None and place != moved:
                    raise Mixes("it combines different rows")
                place = moved
        mine = base_axes[i]
        if mine is not None and mine.dim in given:
            index = indices[mine.dim]
            if not (isinstance(index.layout, RowLayout) and index.layout.iota and mine.plain):
                raise Mixes("it takes rows by an index into the batch")
        elif mine is not None:
            if place is not None:
                raise Mixes("it combines different rows")
            place = replace(mine, dim=to[mine.dim])
        axes.append(place)
    for dim, index in enumerate(indices):
        holder = next((axis for axis in base_axes if axis is not None and axis.dim == dim), None)
        if index is not None and isinstance(index.layout, RowLayout) and index.layout.iota and holder is None:
            raise Mixes("it computes with the rows' positions in the batch")
    return tuple(axes), width + len(kept)


def _masked(call: Call) -> Layout:
    """Set ``base[mask] = number`` entry by entry, if the mask is laid out like the base."""
    base, values = call["self"], call["values"]
    at = next(dim for dim, index in enumerate(call["indices"]) if index is not None)
    mask = call["indices"][at]
    if sum(index is not None for index in call["indices"]) > 1 or values.ndim:
        raise Mixes("it writes where a mask says, an unknown number of times")
    opened = Value((*mask.shape, *(1,) * (base.ndim - at - mask.ndim)), mask.layout)
    return RowLayout(aligned(call, base, [base, opened]), base.zero and values.zero)


def _by_mask(call: Call) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in call["indices"])


@rule("index", "_unsafe_index")
def index(call: Call) -> Layout:
    if _by_mask(call):
        raise Mixes("it takes what a mask says, an unknown number of entries")
    axes, _ = _indexed(call, call["self"])
    return RowLayout(axes, call["self"].zero)


@rule("index_put", "_unsafe_index_put")
def index_put(call: Call) -> Layout:
    base, values = call["self"], call["values"]
    if _by_mask(call):
        return _masked(call)
    axes, ndim = _indexed(call, base)
    if isinstance(base.layout, RowLayout) and any(
        there is not None and mine is None for mine, there in zip(base.layout.axes, axes, strict=True)
    ):
        raise Mixes("it writes values of several rows into one place")
    if isinstance(values.layout, RowLayout):
        for mine, theirs in zip(axes, values.layout.axes, strict=True):
            if theirs is not None and (mine is None or replace(theirs, dim=theirs.dim + ndim - values.ndim) != mine):
                raise Mixes("it combines different rows")
    if isinstance(base.layout, RowLayout):
        return replace(base.layout, vanish=base.zero and values.zero)
    if not call["accumulate"] or not isinstance(values.layout, RowLayout):
        raise Mixes("it writes values of several rows into one place")
    return summed_gradients(call, values)


# --- losses ----------------------------------------------------------------------------------------------------------


@rule("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(call: Call) -> list[Layout]:
    layout = _with_classes(call, call["target"].layout)
    return [layout.moved([0, None, *range(1, call["target"].ndim)]), Whole()]


@rule("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(call: Call) -> Layout:
    gradient, target = call["grad_output"], call["target"]
    layout = RowLayout(aligned(call, target, [gradient, target]))  # equal targets do not show where rows lie
    return replace(_with_classes(call, layout), vanish=gradient.zero)


def _with_classes(call: Call, per_row: Layout) -> RowLayout:
    """Return where the rows of the predictions lie, which must be where those of the targets do."""
    if call["reduction"] != 0:
        raise Mixes("it averages over the batch")
    _whole(call["weight"], "weight")
    x, target = call["self"], call["target"]
    if not isinstance(target.layout, RowLayout) or not isinstance(x.layout, RowLayout):
        raise Mixes("one of its inputs belongs to no row")
    assert isinstance(per_row, RowLayout)
    opened = Value(x.shape, per_row.moved([0, *range(2, target.ndim + 1)]))
    layout = RowLayout(aligned(call, x, [x, opened]))
    not_along(layout, [1], x.ndim)
    return layout


@rule("bucketize")
def bucketize(call: Call) -> Layout:
    _whole(call["boundaries"], "table")
    return RowLayout(aligned(call, call.out))


@rule("mse_loss", "binary_cross_entropy", "smooth_l1_loss", "huber_loss", "binary_cross_entropy_with_logits",
      "mse_loss_backward", "binary_cross_entropy_backward", "smooth_l1_loss_backward", "huber_loss_backward",
      "soft_margin_loss", "soft_margin_loss_backward")  # fmt: skip
def elementwise_loss(call: Call) -> Layout:
    if call["reduction"] != 0:
        raise Mixes("it averages over the batch")
    backward = name_of(call.func).endswith("_backward")
    return RowLayout(aligned(call, call.out), backward and call["grad_output"].zero)
