"""Drop-in replacements for the calls of two other projects: to migrate, change the import.

From the author's code (hfassold/mbtrim)::

    from batchtrim import compat as mbtrim      # was: import mbtrim

From sqwash::

    from batchtrim.compat import SuperquantileReducer, reduce_superquantile      # was: from sqwash import ...

The results are the same, except for bugs of the other project, which are fixed here; each docstring lists them. A
:class:`batchtrim.Trimmer` has what these calls lack: steps as well as epochs, masks, statistics, all ranks, resuming.

Legend: B batch, k kept, a and b the keep fractions of the first and the last epoch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchtrim._checks import check_choice, check_count, check_keep, check_losses, check_part
from batchtrim.losses import Losses, flatten
from batchtrim.reduction import reduce
from batchtrim.schedules import constant, linear, progress_at
from batchtrim.selection import hardest, superquantile

__all__ = ["SuperquantileReducer", "get_adapted_loss_for_trimmed_minibatch", "reduce_superquantile"]


def get_adapted_loss_for_trimmed_minibatch(
    loss: Tensor,
    current_epoch: int,
    max_epochs: int,
    mbt_a: float = 1.0,
    mbt_b: float = 0.2,
    mbt_epoch_scheme: str = "linear",
) -> Tensor:
    """Return the ``k = max(1, round(q * B))`` largest losses of a batch; the caller takes their mean.

    linear:   ``q = a + (b - a) * min(1, e / (E - 1))`` in epoch e of E, numbered from 0
    constant: ``q = (a + b) / 2``

    Source: hfassold/mbtrim, the code of arXiv 2110.13058. Bugs fixed here:

    * 'constant' kept ``(a * b) / 2`` of the batch, a product although its comment says average: 10 of 100, not 60, with
      a = 1.0 and b = 0.2.
    * One epoch in all divided by zero; here q = a.
    * Beyond the last epoch the line ran on below b; here it stays at b.
    * A batch of one sample, as the last of an epoch may be, ended the run; here it is kept.
    * A loss that is already averaged gave an IndexError; here an error that names ``reduction='none'``.
    * Losses (B, T) were trimmed per column; here each sample counts as its mean over T.
    * ``max_epochs=-1``, which Lightning reports for a run limited by steps, asked for more samples than there are;
      here it is an error that names the cure.

    Args:
        loss: (B,) or (B, ...), floating point, not reduced.
        current_epoch: e, from 0.
        max_epochs: E.
        mbt_a: fraction kept in the first epoch, in (0, 1].
        mbt_b: fraction kept in the last one, in (0, 1].
        mbt_epoch_scheme: "linear" or "constant".

    Returns:
        (k,), with the graph of ``loss``, in no particular order.

    Raises:
        PassUnreducedLosses, TypeError, ValueError: an argument is out of its range.

    Notes:
        Ties keep the lower index; a NaN loss counts as largest. In new code use ``Trimmer(linear(1.0, 0.2),
        total=epochs)``.

    Example:
        >>> losses = torch.tensor([0.5, 3.0, 1.0, 0.1, 2.0])
        >>> get_adapted_loss_for_trimmed_minibatch(losses, 1, 3, 1.0, 0.2, "linear").mean()
        tensor(2.)
    """
    check_losses(loss)
    scheme = check_choice("mbt_epoch_scheme", mbt_epoch_scheme, ("linear", "constant"))
    a, b = check_keep("mbt_a", mbt_a), check_keep("mbt_b", mbt_b)
    if scheme == "constant":
        keep = constant((a + b) / 2.0)(0.0)
    else:
        hint = "The length of a run limited by steps is not known in epochs: use batchtrim.Trimmer and count batches."
        total = check_count("max_epochs", max_epochs, hint=hint)
        keep = linear(a, b)(progress_at(check_count("current_epoch", current_epoch, minimum=0), total))
    losses = flatten(Losses(loss), "sample").values
    return losses.index_select(0, hardest()(losses.detach(), keep).indices)


def reduce_superquantile(batch: Tensor, superquantile_tail_fraction: float = 0.5) -> Tensor:
    """Return the superquantile (CVaR) of a batch of losses: the mean of the worst fraction f of them.

    ``L = max <q, l>`` over weights ``0 <= q_i <= 1 / (f n)`` that sum to 1: with ``t = f n`` and ``m = floor(t)`` the m
    largest losses weigh ``1 / t`` each, the next one ``(t - m) / t``.

    Source: the documented behaviour of sqwash 0.1.0. Bugs fixed here:

    * Where the quantile falls between two samples it gave one of them a negative weight, so that its loss was pushed
      up (5 losses with f = 0.3, 64 with f = 0.2); here no weight is negative.
    * fp16 and bf16 losses were refused; here they are summed in fp32.
    * More than 16 million losses (pixels, tokens) were refused; here there is no limit.

    Args:
        batch: losses of any shape, floating point, not reduced; read as one vector of n, as in sqwash.
        superquantile_tail_fraction: f, in [0, 1]; 1 is the mean, 0 the largest loss.

    Returns:
        0-d, dtype of ``batch``.

    Raises:
        PassUnreducedLosses, TypeError, ValueError: an argument is out of its range.

    Notes:
        A NaN loss counts as largest, so the result is NaN, as in sqwash. Its smoothed reducer has no counterpart here.
        In new code use ``Trimmer(0.5, select=superquantile())``.

    Example:
        >>> reduce_superquantile(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), superquantile_tail_fraction=0.3)
        tensor(4.6667)
    """
    check_losses(batch)
    losses = batch.reshape(-1)
    half = losses.dtype in (torch.float16, torch.bfloat16)
    losses = losses.float() if half else losses
    selection = superquantile()(losses.detach(), _check_tail(superquantile_tail_fraction))
    return reduce(losses, selection).to(batch.dtype)


class SuperquantileReducer(nn.Module):
    """:func:`reduce_superquantile` as a module, made once and called on every batch's losses.

    Args:
        superquantile_tail_fraction: f, in [0, 1]; 1 is the mean, 0 the largest loss.

    Example:
        >>> reducer = SuperquantileReducer(superquantile_tail_fraction=0.5)
        >>> reducer(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        tensor(3.5000)
    """

    def __init__(self, superquantile_tail_fraction: float = 0.5) -> None:
        super().__init__()
        self.superquantile_tail_fraction = _check_tail(superquantile_tail_fraction)

    def forward(self, batch: Tensor) -> Tensor:
        """Return the superquantile of ``batch``, 0-d."""
        return reduce_superquantile(batch, self.superquantile_tail_fraction)

    def extra_repr(self) -> str:
        return f"superquantile_tail_fraction={self.superquantile_tail_fraction:g}"


def _check_tail(value: float) -> float:
    return check_part("superquantile_tail_fraction", value, "It is the fraction of the batch to average over.")
