"""Arbitrary arguments to the public API: it works and keeps its promises, or raises what the docstrings name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import batchtrim
from batchtrim import Choice, KeepLog, Selection, Trimmer, compat

pytestmark = pytest.mark.slow
FUZZ = settings.get_profile("fuzz")

DOCUMENTED = (ValueError, TypeError)  # every error of the package is one of these
NUMBERS = st.one_of(
    st.floats(),
    st.floats(0, 1),
    st.integers(-3, 10),
    st.sampled_from([0, 1, 1.0, 0.0, -0.0, 1e-320, 1e308, 10**400, True, None, "0.5", float("nan"), 1j, [], b""]),
)
FRACTIONS = st.one_of(st.floats(0, 1, exclude_min=True), NUMBERS)
MAPPINGS = st.one_of(st.dictionaries(st.floats(0, 1), st.floats(0.01, 1), max_size=4), st.dictionaries(NUMBERS.filter(
    lambda value: not isinstance(value, list)), NUMBERS, max_size=3), NUMBERS)  # fmt: skip
DTYPES = st.sampled_from(
    [torch.float32] * 4 + [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
SHAPES = st.one_of(
    st.tuples(st.integers(1, 12)),
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
)


@contextlib.contextmanager
def documented() -> Iterator[None]:
    """Errors that say what was expected are fine; all others are faults."""
    try:
        yield
    except DOCUMENTED as error:
        if not str(error).startswith(("expected ", "could not ")) and "abstract" not in str(error):
            raise AssertionError(f"an error in words that are not ours: {error!r}") from error


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    dtype = draw(DTYPES) if dtype is None else dtype
    shape = draw(SHAPES) if shape is None else shape
    values = draw(
        st.lists(
            st.one_of(st.sampled_from([0.0, 1.0, 2.0, float("nan"), float("inf"), -float("inf")]), st.floats(0, 100)),
            min_size=math.prod(shape),
            max_size=math.prod(shape),
        )
    )
    if not dtype.is_floating_point and not dtype.is_complex:
        values = [0.0 if not math.isfinite(value) else value for value in values]
    return torch.tensor(values, dtype=torch.float64).reshape(shape).to(dtype)


SCHEDULES = st.one_of(
    FRACTIONS,
    st.builds(batchtrim.linear, st.floats(0.01, 1), st.floats(0.01, 1)),
    st.builds(batchtrim.cosine, st.floats(0.01, 1), st.floats(0.01, 1)),
    st.just(batchtrim.by_accuracy()),
    st.just(lambda progress: 1 - progress),
    st.just(batchtrim.linear),
)
RULES = st.one_of(
    st.builds(batchtrim.hardest),
    st.builds(batchtrim.easiest),
    st.builds(batchtrim.uniform),
    st.builds(batchtrim.superquantile),
    st.builds(batchtrim.percentile, st.floats(0, 5), st.integers(1, 20)),
    st.builds(batchtrim.percentile_topk),
    st.builds(batchtrim.between, st.floats(0, 1, exclude_max=True)),
    st.builds(batchtrim.selection.above, st.floats(), st.integers(1, 20)),
)


@settings(FUZZ)
@given(
    st.sampled_from(["constant", "linear", "cosine", "step", "piecewise", "join", "by_accuracy"]),
    st.lists(st.one_of(FRACTIONS, MAPPINGS, st.lists(st.one_of(FRACTIONS, SCHEDULES), max_size=3)), max_size=2),
    st.floats(0, 1),
)
def test_schedules(name: str, arguments: list[Any], progress: float) -> None:
    kind = getattr(batchtrim.schedules, name)
    try:
        schedule = kind(*arguments)
    except TypeError as error:
        if "positional argument" in str(error):  # Python's own word for too few or too many
            return
        with documented():
            raise
        return
    except ValueError:
        with documented():
            raise
        return
    if name != "join":  # whose parts may be any callable
        assert 0.0 < schedule(progress) <= 1.0


@settings(FUZZ)
@given(RULES, tensors(dtype=torch.float32), st.floats(0, 1, exclude_min=True), st.sampled_from(["kept", "batch"]))
def test_selection_and_reduction(rule: Any, losses: Tensor, keep: float, scale: str) -> None:
    losses = losses.flatten()
    if not len(losses):
        return
    selection: Selection = rule(losses, keep, torch.Generator().manual_seed(0))
    assert 1 <= selection.k <= len(losses)
    assert len(set(selection.indices.tolist())) == selection.k
    assert int(selection.mask().sum()) == selection.k
    assert selection.weights is None or bool((selection.weights >= 0).all())
    kept = losses[selection.indices]
    loss = batchtrim.reduce(losses, selection, scale)
    assert loss.shape == ()
    if bool(kept.isfinite().all()):
        assert bool(loss.isfinite())
        if scale == "kept":
            assert float(kept.min()) - 1e-3 <= float(loss) <= float(kept.max()) + 1e-3
    elif bool(kept.isnan().any()):
        assert bool(loss.isnan())


@pytest.mark.filterwarnings("ignore::batchtrim.errors.NothingToChoose")
@settings(FUZZ)
@given(st.data())
def test_trimmer(data: st.DataObject) -> None:
    trim = None
    with documented():
        trim = Trimmer(
            data.draw(SCHEDULES),
            total=data.draw(st.one_of(st.integers(1, 6), NUMBERS)),
            select=data.draw(RULES),
            scale=data.draw(st.sampled_from(["kept", "batch", "x", None])),
            unit=data.draw(st.sampled_from(["sample", "element", "x"])),
            seed=data.draw(st.one_of(st.integers(0, 5), NUMBERS)),
        )
    if trim is None:
        return
    for _ in range(3):
        losses = data.draw(tensors())
        shape = tuple(losses.shape)
        mask = data.draw(st.one_of(st.none(), tensors(shape, torch.bool), tensors()))
        rank_by = data.draw(st.one_of(st.none(), tensors(shape, torch.float32), tensors()))
        with documented():
            loss = trim(losses, mask=mask, rank_by=rank_by)
            assert loss.shape == ()
            assert loss.dtype == losses.dtype
            assert 0 <= trim.last_selection.k <= losses.numel()  # type: ignore[union-attr]
            trim.stats.compute()
        with documented():
            trim.step(
                data.draw(st.one_of(st.just(1), NUMBERS)), accuracy=data.draw(st.one_of(st.floats(0, 1), NUMBERS))
            )
        assert 0.0 < trim.keep <= 1.0
    twin = Trimmer(trim.schedule, total=trim.total, select=trim.rule)
    twin.load_state_dict(trim.state_dict())
    assert (twin.steps, twin.keep) == (trim.steps, trim.keep)


@settings(FUZZ)
@given(st.data())
def test_trimmer_state(data: st.DataObject) -> None:
    """A state that is not one of ours is refused in our words, and leaves the trimmer as it was."""
    trim = Trimmer(total=5)
    trim.step(2)
    state = trim.state_dict()
    name = data.draw(st.sampled_from(sorted(state)))
    if data.draw(st.booleans()):
        del state[name]
    else:
        state[name] = data.draw(st.one_of(NUMBERS, st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2)))
    with documented():
        trim.load_state_dict(state)
        return
    assert trim.steps == 2


@settings(FUZZ)
@given(st.data())
def test_keep_log(data: st.DataObject) -> None:
    log = None
    with documented():
        log = KeepLog(
            data.draw(st.one_of(st.integers(1, 9), NUMBERS)), classes=data.draw(st.one_of(st.integers(1, 4), NUMBERS))
        )
    if log is None:
        return
    for _ in range(data.draw(st.integers(0, 3))):
        b = data.draw(st.integers(1, 5))
        with documented():
            losses = data.draw(tensors((b,), torch.float32))
            log.record(
                Choice(
                    losses,
                    batchtrim.hardest()(losses, data.draw(st.floats(0.01, 1))),
                    data.draw(st.one_of(st.none(), tensors((b,), torch.bool), tensors())),
                ),
                ids=data.draw(st.one_of(tensors((b,), torch.int64), tensors(), st.just(torch.arange(b)))),
                outputs=data.draw(st.one_of(st.none(), tensors((b, 3), torch.float32), tensors())),
                labels=data.draw(st.one_of(st.none(), tensors((b,), torch.int64), tensors())),
            )
        if data.draw(st.booleans()):
            log.end_epoch()
    table = log.table()
    assert bool((table["kept"] <= table["seen"]).all())
    ids, scores = batchtrim.suspects(log)
    assert len(ids) == int((table["seen"] > 0).sum())
    assert bool(((scores >= 0) & (scores <= 1)).all())
    twin = KeepLog(log.n, classes=log.classes)
    twin.load_state_dict(log.state_dict())
    again = twin.table()
    assert all(torch.equal(table[name].nan_to_num(), again[name].nan_to_num()) for name in table)


@settings(FUZZ)
@given(tensors(), NUMBERS, NUMBERS, NUMBERS)
def test_losses(losses: Tensor, gamma: Any, tau: Any, lam: Any) -> None:
    with documented():
        assert batchtrim.focal(losses, gamma).shape == losses.shape
    with documented():
        assert batchtrim.superloss(losses, tau, lam).shape == losses.shape


@settings(FUZZ)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["sample", "element"]),
    st.data(),
)
def test_per_sample(b: int, t: int, c: int, weighted: bool, unit: str, data: st.DataObject) -> None:
    outputs = data.draw(tensors((b, c, t), torch.float32))
    targets = torch.tensor(data.draw(st.lists(st.integers(-1, c - 1), min_size=b * t, max_size=b * t))).view(b, t)
    criterion = nn.CrossEntropyLoss(
        weight=torch.arange(c, dtype=torch.float32) + 0.5 if weighted else None, ignore_index=-1
    )
    losses = batchtrim.per_sample(criterion, unit=unit)(outputs, targets)
    assert losses.values.shape == ((b,) if unit == "sample" else (b, t))
    loss = Trimmer(1.0, unit=unit)(losses)
    assert loss.shape == ()
    if bool(outputs.isfinite().all()):
        assert bool(loss.isfinite())
    tokens = batchtrim.token_losses(outputs.transpose(1, 2), targets, ignore_index=-1)
    assert tokens.values.shape == (b, t)


@settings(FUZZ)
@given(
    tensors(),
    st.one_of(st.integers(0, 9), NUMBERS),
    st.one_of(st.integers(1, 9), NUMBERS),
    FRACTIONS,
    FRACTIONS,
    st.sampled_from(["linear", "constant", "", None]),
)
def test_compat(losses: Tensor, epoch: Any, epochs: Any, a: Any, b: Any, scheme: Any) -> None:
    with documented():
        kept = compat.get_adapted_loss_for_trimmed_minibatch(losses, epoch, epochs, a, b, scheme)
        assert 1 <= len(kept) <= len(losses)
    with documented():
        value = compat.SuperquantileReducer(a)(losses)
        assert value.shape == ()
        assert value.dtype == losses.dtype
        if bool(losses.isfinite().all()):
            assert float(losses.mean()) - 0.51 <= float(value) <= float(losses.max()) + 0.51
