"""The result of a rule, and helpers that rules share: counting, ranking, masking."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from batchtrim._checks import check_count, check_has_values, check_part, describe, tensor_cure, without_values

__all__ = [
    "Rule",
    "Selection",
    "asks_for_all",
    "changeable_keep",
    "choose",
    "drawing",
    "drawing_device",
    "fraction",
    "k_follows_losses",
    "keep_count",
    "keep_count_tensor",
    "length",
    "masked_choice",
    "rank_mask",
    "reads_keep",
    "select_again",
    "select_valid",
    "top_indices",
]


_OWN: set[type] = set()  # kinds of rules that are this library's, once seen


@dataclass(frozen=True)
class Selection:
    """The samples that a rule chose from a batch.

    Attributes:
        indices: int64 (k,), the kept rows, in no particular order; see :meth:`rising`.
        size: B, the length of the vector that was chosen from.
        candidates: how many of these could be chosen; less than ``size`` if a mask left some out.
        weights: (k,), or None if every kept sample counts the same.
        normalizer: the divisor of the weighted sum, a number or a 0-d tensor; None means k.
        batch_normalizer: the same for scale "batch"; None means ``candidates``.
        terms: of a sum of terms that count differently, one selection per term: the same rows, with its own weights
            and divisors. Empty otherwise.
    """

    indices: Tensor
    size: int
    candidates: int
    weights: Tensor | None = None
    normalizer: float | Tensor | None = None
    batch_normalizer: float | Tensor | None = None
    terms: tuple[Selection, ...] = ()

    def __init__(
        self,
        indices: Tensor,
        size: int,
        candidates: int,
        weights: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        batch_normalizer: float | Tensor | None = None,
        terms: tuple[Selection, ...] = (),
    ) -> None:
        # one is made per batch; a frozen dataclass would set its fields one by one, at twice the cost
        vars(self).update(
            indices=indices,
            size=size,
            candidates=candidates,
            weights=weights,
            normalizer=normalizer,
            batch_normalizer=batch_normalizer,
            terms=terms,
        )

    @property
    def k(self) -> int:
        """The number of samples kept."""
        return self.indices.shape[0]

    @property
    def everything(self) -> bool:
        """True if the selection is the whole vector and each entry counts the same."""
        return self.k == self.size and self.weights is None

    def rising(self) -> Selection:
        """Return the selection with its rows in ascending order, which is cheaper to slice by."""
        indices, order = torch.sort(self.indices)
        weights = None if self.weights is None else self.weights[order]
        terms = tuple(term.rising() for term in self.terms)
        return Selection(indices, self.size, self.candidates, weights, self.normalizer, self.batch_normalizer, terms)

    def mask(self) -> Tensor:
        """Return bool (B,), True for kept samples."""
        mask = torch.zeros(self.size, dtype=torch.bool, device=self.indices.device)
        return mask.index_fill_(0, self.indices, True)


class Rule(Protocol):
    """A selection rule. :class:`batchtrim.Trimmer` takes any callable with this signature, and checks its rows.

    A rule whose k depends on the losses, not on ``keep`` alone, says so: ``k_follows_losses = True``. One that ignores
    ``keep`` says ``reads_keep = False``; otherwise engines take a ``keep`` of 1 for the whole batch.
    """

    def __call__(self, losses: Tensor, keep: float, generator: torch.Generator | None = None) -> Selection:
        """Choose from ``losses`` (n,), n >= 1, detached; ``keep`` in (0, 1]."""
        ...


def keep_count(keep: float, n: int) -> int:
    """Return the number of n samples that a keep fraction keeps: ``k = max(1, round(keep * n))``, and 0 of 0.

    All rounding is done here, by Python's ``round``: half to even, as in the author's code.

    Example:
        >>> keep_count(0.2, 128), keep_count(0.25, 10), keep_count(0.2, 1)
        (26, 2, 1)
    """
    if type(n) is not int or not 0 <= n < 2**63:
        n = n if isinstance(n, torch.SymInt) else check_count("n", n, 0, "It is the number of samples to choose from.")
    return min(n, max(1, round(fraction(keep) * n)))


def fraction(keep: float) -> float:
    """Return a keep fraction, checked to be a number in [0, 1]; rules may be called directly."""
    if isinstance(keep, float) and 0.0 <= keep <= 1.0:
        return keep
    return check_part("keep", keep, "It is a fraction of the batch, not a percentage or a count.")


def k_follows_losses(rule: object) -> bool:
    """Return True if the number that a rule keeps depends on the losses; see :class:`Rule`."""
    return bool(getattr(rule, "k_follows_losses", False))


def reads_keep(rule: object) -> bool:
    """Return True unless a rule ignores ``keep``; see :class:`Rule`."""
    return bool(getattr(rule, "reads_keep", True))


def asks_for_all(rule: object, keep: float) -> bool:
    """Return True if this keep fraction asks the rule for the whole batch."""
    return keep == 1.0 and reads_keep(rule)


def length(losses: Tensor) -> int:
    """Return n of ``losses`` (n,), or raise an error if they are not such a vector."""
    if not isinstance(losses, Tensor):
        raise TypeError(f"expected `losses` to be a tensor, got {describe(losses)}.{tensor_cure(losses)}")
    if losses.ndim != 1:
        raise ValueError(
            f"expected `losses` of shape (n,), one loss per sample, got {tuple(losses.shape)}. "
            "A rule chooses from a vector; a batchtrim.Trimmer takes (B, ...) too, and averages each sample."
        )
    return losses.shape[0]


def drawing(generator: torch.Generator | None) -> torch.Generator | None:
    """Return the generator to draw from, None for torch's own; raise an error for anything else, such as a seed."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    raise TypeError(
        f"expected `generator` to be a torch.Generator, got {describe(generator)}. "
        "For one with a seed: torch.Generator().manual_seed(0)."
    )


def drawing_device(generator: torch.Generator | None) -> torch.device:
    """Return the device to draw on: the generator's, or the CPU, whatever torch.set_default_device says."""
    return generator.device if isinstance(generator, torch.Generator) else torch.device("cpu")


def top_indices(scores: Tensor, k: int) -> Tensor:
    """Return the rows of the k largest ``scores`` (n,). Ties at the cut: lower row first. NaN is largest."""
    n = scores.shape[0]
    if k >= n:
        return torch.arange(n, device=scores.device)
    if not scores.is_cpu or type(scores) is not Tensor:  # another kind may have no values: FakeTensor
        return torch.sort(scores, descending=True, stable=True).indices[:k]
    # A partial sort is several times cheaper than a stable one, but takes any of several equal values at the cut.
    # One more value shows whether there is a tie at the cut; ties elsewhere do not change what is kept.
    values, rows = torch.topk(scores, k + 1)
    last, after = (values if k < 256 else values[-2:]).tolist()[-2:]
    if last != after and after == after:
        return rows.resize_(k)  # drop the last row in place, which costs less than a view
    return torch.sort(scores, descending=True, stable=True).indices[:k]


def rank_mask(scores: Tensor, k: Tensor, skip: Tensor | None = None) -> Tensor:
    """Return bool (n,), True for the k largest: :func:`top_indices` with tensor ``k`` and fixed shapes."""
    n = scores.shape[0]
    order = torch.argsort(scores, descending=True, stable=True)
    ranks = torch.zeros_like(order).scatter(0, order, torch.arange(n, device=scores.device))
    return ranks < k if skip is None else (ranks >= skip) & (ranks < skip + k)


@torch.inference_mode(False)
def changeable_keep(keep: float) -> Tensor:
    """Return a keep fraction as a tensor that may be changed in place, in whatever mode it is made."""
    return torch.tensor(keep, dtype=torch.float64, device="cpu")


def keep_count_tensor(keep: Tensor, n: Tensor | int) -> Tensor:
    """Return :func:`keep_count` on tensors; ``torch.round`` rounds half to even too."""
    return torch.round(keep * n).clamp(min=1)


def choose(rule: Rule, losses: Tensor, keep: float, generator: torch.Generator | None) -> Selection:
    """Return what ``rule`` chooses from ``losses`` (n,); a rule of somebody else's is checked, which syncs the device.

    Raises:
        TypeError: it returned no selection. ValueError: its rows are not distinct, or not those of ``losses``.
    """
    kind = type(rule)
    if kind in _OWN:
        return rule(losses, keep, generator)
    if kind.__module__.startswith("batchtrim."):
        _OWN.add(kind)
        return rule(losses, keep, generator)
    try:
        chosen = rule(losses.clone(), keep, generator)  # it may write into what it is given
    except TypeError as error:
        error.add_note("batchtrim calls a selection rule with (losses, keep, generator).")
        raise
    if not isinstance(chosen, Selection):
        raise TypeError(
            f"expected `select` to return a batchtrim.Selection, got {describe(chosen)} from {describe(rule)}. "
            "Of rows: batchtrim.Selection(rows, size=len(losses), candidates=len(losses))."
        )
    rows, n = chosen.indices, losses.shape[0]
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.ndim != 1 or chosen.size != n:
        raise ValueError(
            f"expected `select` to return rows of {n} losses, int64 of shape (k,), got {describe(rows)} of "
            f"{chosen.size} from {describe(rule)}."
        )
    weights = chosen.weights
    if weights is not None and not (isinstance(weights, Tensor) and weights.shape == rows.shape):
        raise ValueError(
            f"expected `select` to return a weight for each of {len(rows)} rows, a tensor, got {describe(weights)}."
        )
    if torch.compiler.is_compiling() or without_values(rows):
        return chosen
    _check_divisors(chosen, n, rule)
    if bool(((rows < 0) | (rows >= n)).any() or len(rows.unique()) != len(rows)):
        raise ValueError(
            f"expected `select` to return distinct rows from 0 to {n - 1}, got others from {describe(rule)}. "
            "A row that is drawn twice counts twice by its weight: Selection(rows, n, n, weights)."
        )
    return chosen


def _check_divisors(chosen: Selection, n: int, rule: object) -> None:
    """Check the numbers that a sum of kept losses may be divided by."""
    if not len(chosen.indices) <= chosen.candidates <= n:
        raise ValueError(
            f"expected `select` to return `candidates` from the {len(chosen.indices)} kept to all {n}, got "
            f"{chosen.candidates} from {describe(rule)}. It is the number of losses that could be chosen."
        )
    for name in ("normalizer", "batch_normalizer"):
        divisor = getattr(chosen, name)
        if divisor is not None and not 0.0 < float(divisor) < math.inf:
            raise ValueError(
                f"expected `select` to return a positive `{name}`, got {float(divisor):g} from {describe(rule)}. "
                "The kept losses are divided by it; leave it out for their number."
            )


def select_valid(
    rule: Rule, losses: Tensor, keep: float, mask: Tensor | None, generator: torch.Generator | None = None
) -> Selection:
    """Apply ``rule`` to the entries of ``losses`` (n,) where ``mask`` is True; indices refer to all n.

    Masked entries (padding, ignored labels) count neither in the ranking nor in k. If none are left, the selection
    is empty. A mask syncs the device, since k depends on how many entries it leaves.
    """
    if mask is None:
        return choose(rule, losses, keep, generator)
    check_has_values("mask", mask, "a trimmer")
    n, valid = losses.shape[0], mask.nonzero()
    if 0 < n == valid.shape[0]:
        return choose(rule, losses, keep, generator)
    valid = valid.squeeze(1)
    if valid.shape[0] == 0:
        return Selection(valid, n, 0)
    chosen = choose(rule, losses[valid], keep, generator)
    divisors = chosen.normalizer, chosen.batch_normalizer
    return Selection(valid[chosen.indices], n, chosen.candidates, chosen.weights, *divisors)


def select_again(rule: Rule, losses: Tensor, keep: float, mask: Tensor | None, generator: torch.Generator) -> Selection:
    """Return :func:`select_valid` in a backward pass, in which torch.utils.checkpoint repeats a forward.

    Raises:
        ValueError: the rule draws or has state, so it would not repeat the choice of the forward.
    """
    before = generator.get_state()
    selection = select_valid(rule, losses, keep, mask, generator)
    if hasattr(rule, "state_dict") or not torch.equal(before, generator.get_state()):
        raise ValueError(
            f"expected a rule that chooses the same again inside torch.utils.checkpoint, got {rule!r}, which draws "
            "or remembers. Call the trimmer on losses that the checkpointed function returns."
        )
    return selection


def masked_choice(rule: Rule, losses: Tensor, keep: Tensor, mask: Tensor | None) -> Tensor:
    """Return bool (n,), True for kept: :func:`select_valid` in fixed shapes, by a rule's ``compiled_mask``."""
    if mask is None:
        return rule.compiled_mask(losses, keep, losses.shape[0])  # type: ignore[attr-defined]
    return mask & rule.compiled_mask(torch.where(mask, losses, float("-inf")), keep, mask.sum())  # type: ignore[attr-defined]
