"""The trimmer: schedule, selection rule and clock in one object, called where the mean of the losses used to be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from batchtrim._checks import (
    check_choice,
    check_count,
    check_like,
    check_losses,
    check_progress,
    check_rule,
    check_schedule_output,
    check_state,
    describe,
)
from batchtrim._deprecated import record_as_before, trimmer_log
from batchtrim.choice import Choice
from batchtrim.distributed import select_over_ranks, world_size
from batchtrim.errors import ChooseLength, ClockPastTotal, NothingToChoose
from batchtrim.reduction import SCALES, SUM_OF_TERMS, normalized, reduce, reduce_mask, reduce_terms
from batchtrim.schedules import as_schedule, linear, progress_at
from batchtrim.selection import Rule, Selection, hardest, select_valid
from batchtrim.stats import KeepStats
from batchtrim.unreduced import UNITS, Losses, divisors, flatten

__all__ = ["Trimmer"]

_STATE_VERSION = 1
SCOPES = ("local", "global")
# How to go on from a state that was saved with another total.
LENGTHS = ("stretch", "saved")
# A schedule is asked at up to this many points when the trimmer is made, so that a fault is found before training.
_PROBE_POINTS = 1001
# So many batches of one sample in a row are no chance: the last batch of an epoch may be one.
_SINGLE_ROWS = 3


class Trimmer:
    """Mini-batch trimming: keep the hardest samples of each batch, fewer as training goes on.

    At progress p keep ``k = max(1, round(q(p) * B))`` of B samples, those of largest loss, and step on their mean,
    ``L = (1/k) * sum of the k largest l_i``. Defaults are the paper's: q falls on a line from 1.0 to 0.2.

    Source: Fassold, arXiv 2110.13058. Differences from the author's code: progress is clamped at the end of training
    instead of running on below the last keep fraction; a run of one epoch and a batch of one sample work; losses with
    more than one dimension are averaged per sample first (``unit``).

    Args:
        keep: a schedule, a number in (0, 1], or a callable from progress in [0, 1] to such a number.
        total: how many times :meth:`step` is called in the whole training: epochs, if it is called once an epoch,
            or batches. Progress is ``min(1, steps / (total - 1))``, so the first of ``total`` runs at 0, the last at 1.
            Needed wherever progress is.
        select: which samples to keep, :class:`batchtrim.hardest` by default.
        scale: "kept" divides by the number kept (the paper); "batch" divides by the batch size, which leaves a
            sample's weight what it is in plain training. The mean of the hardest k has a larger gradient than the mean
            of all: ``stats`` reports the ratio of the losses.
        unit: "sample" averages losses of shape (B, ...) over all but the batch first, "element" chooses among all
            entries (tokens, pixels).
        scope: "local" trims what this process holds; "global" chooses from the joined batch of all ranks, with their
            loss and gradient under DDP and FSDP; see :mod:`batchtrim.distributed`. Statistics are then those of the
            joined batch, and a rank without samples calls with losses of shape (0,).
        process_group: the ranks that average gradients together, with scope "global"; all of them by default.
        seed: for rules that draw. The generator is the trimmer's own and part of :meth:`state_dict`.

    Attributes:
        last: the :class:`batchtrim.Choice` made last, to look at or to log; None before the first, and after a compiled
            step, which leaves none.

    Raises:
        ScheduleOutOfRange: the schedule leaves (0, 1] somewhere.

    Example:
        >>> trim = Trimmer(linear(1.0, 0.2), total=3)
        >>> losses = torch.tensor([0.5, 3.0, 1.0, 0.1, 2.0])
        >>> trim(losses)                  # epoch 0 of 3: the plain mean
        tensor(1.3200)
        >>> trim.step(); trim(losses)     # epoch 1: keep 0.6, the mean of 3.0, 2.0 and 1.0
        tensor(2.)
        >>> trim.step(); trim
        Trimmer(keep=linear(start=1.0, end=0.2), total=3, select=hardest(), at step 2, keeping 0.2)
    """

    def __init__(
        self,
        keep: Callable[[float], float] | float = linear(1.0, 0.2),  # noqa: B008  (frozen)
        *,
        total: int | None = None,
        select: Rule = hardest(),  # noqa: B008  (frozen)
        scale: str = "kept",
        unit: str = "sample",
        scope: str = "local",
        process_group: dist.ProcessGroup | None = None,
        seed: int = 0,
        log: Any = None,  # deprecated
    ) -> None:
        self.schedule = as_schedule(keep)
        if total is None and getattr(self.schedule, "needs_total", True):
            raise ValueError(
                "expected `total`, the number of times step() will be called, got None. "
                "Pass the number of epochs (and call step() once an epoch) or of batches (once a batch); "
                "if it is not known, pass a constant keep."
            )
        check_rule("select", select)
        hint = "If the length of training is unknown (-1), count batches instead, or pass a constant keep."
        self.total = None if total is None else check_count("total", total, hint=hint)
        self.rule = select
        self.scale = check_choice("scale", scale, SCALES)
        self.unit = check_choice("unit", unit, UNITS)
        self.scope = check_choice("scope", scope, SCOPES)
        if process_group is not None and self.scope != "global":
            raise ValueError("expected `scope` 'global' with a `process_group`, got 'local'. Local asks no other rank.")
        if process_group is not None:
            world_size(process_group)
        self.process_group = process_group
        self.seed = check_count("seed", seed, minimum=0)
        self.generator = torch.Generator().manual_seed(seed)
        self.log = trimmer_log(log, self.unit)
        self.stats = KeepStats()
        self.last: Choice | None = None
        self._steps = 0
        self._accuracy = 0.0
        self._overrun_told = False
        self._single_rows = 0
        # A tensor, so that a compiled step takes it as an input and is not compiled again when it changes.
        self._keep_tensor = torch.ones((), dtype=torch.float64)
        self._probe()
        self._set_keep()

    def __call__(
        self,
        losses: Tensor | Losses,
        *,
        rank_by: Tensor | Losses | None = None,
        mask: Tensor | None = None,
        **logged: Any,
    ) -> Tensor:
        """The trimmed loss of a batch: in place of ``losses.mean()``.

        Args:
            losses: (B,) or (B, ...), one loss per sample or entry, floating point, not reduced. Gradient is not
                needed: a validation loop may call this too. Or what :class:`batchtrim.per_sample` returned.
            rank_by: shape of ``losses``: rank by these and train on ``losses``. For label smoothing, mixup and class
                weights, which all change the ranking.
            mask: bool, shape of ``losses``: False where an entry does not count (padding, ignored labels).
            logged: deprecated: ``ids``, ``outputs`` and ``labels``, which :meth:`batchtrim.KeepLog.record` takes.

        Returns:
            0-d. With keep 1 the plain mean, bit for bit. Where nothing counts, an attached 0.

        Raises:
            PassUnreducedLosses, TypeError, ValueError: the losses are no vector of losses.

        Notes:
            Of equal losses the lower index is kept. A NaN or inf loss counts as largest and is kept, so the step is
            NaN as in plain training and a gradient scaler skips it. No gradient flows through the choice.
            No device sync, unless a mask is given or the rule's k depends on the losses. A drop-in for one full
            graph: dropped samples still cost their backward; :class:`batchtrim.TrimmedForward` saves that.
        """
        flat, scores = self._flatten(losses, rank_by, mask)
        if torch.compiler.is_compiling() and self.scope == "local" and hasattr(self.rule, "compiled_mask"):
            return self._compiled(flat, scores)
        selection = self._choose(flat, scores)
        if logged or self.log is not None:
            record_as_before(self.log, self.last, logged, "trim")
        if flat.terms:
            return reduce_terms(flat, selection, self.scale)
        return reduce(flat.values, selection, self.scale, flat.weights)

    def select(
        self,
        losses: Tensor | Losses,
        *,
        rank_by: Tensor | Losses | None = None,
        mask: Tensor | None = None,
        **logged: Any,
    ) -> Selection:
        """Only choose, as :meth:`__call__` would, and count it in ``stats``. :func:`batchtrim.reduce` does the rest."""
        flat, scores = self._flatten(losses, rank_by, mask)
        if flat.terms:
            raise ValueError(f"expected `losses` with one divisor, got {SUM_OF_TERMS}")
        selection = self._choose(flat, scores)
        if logged or self.log is not None:
            record_as_before(self.log, self.last, logged, "trim.select")
        return selection

    def step(self, n: int = 1, *, accuracy: float | None = None) -> None:
        """Advance the clock, like a learning-rate scheduler: once an epoch or once a batch, as ``total`` counts.

        Past ``total`` the schedule stays where it ended. The first step beyond it gives a
        :class:`batchtrim.errors.ClockPastTotal` warning where the keep fraction depends on progress: most often
        ``total`` counts epochs and this is called once a batch.

        Args:
            n: by how many. accuracy: running training accuracy in [0, 1], for :class:`batchtrim.by_accuracy`.
        """
        n = check_count("n", n, minimum=0)
        if accuracy is not None:
            self._accuracy = check_progress("accuracy", accuracy)
        elif self._reads_accuracy:
            raise ValueError("expected `accuracy`, which drives this schedule, got None. Call step(accuracy=...).")
        self._steps += n
        self._set_keep()
        if self.total is not None and self._steps > self.total and not self._overrun_told:
            self._tell_overrun()

    @property
    def last_selection(self) -> Selection | None:
        """The selection in :attr:`last`."""
        return None if self.last is None else self.last.selection

    @property
    def expected_keep(self) -> float:
        """The part of the next batch that will be kept, as far as can be said before its losses are known.

        ``keep``, but for rules whose k follows from the losses (``loss_mass``, ``above``, ``percentile``): what was
        kept of the last batch. Engines decide by it whether a smaller backward will pay.
        """
        if not getattr(self.rule, "k_follows_losses", False):
            return self._keep
        selection = self.last_selection
        return selection.k / selection.candidates if selection is not None and selection.candidates else self._keep

    @property
    def steps(self) -> int:
        """How often :meth:`step` has been called."""
        return self._steps

    @property
    def progress(self) -> float:
        """The part of training that is done, in [0, 1]; 0 where ``total`` is 1 or unknown."""
        return progress_at(self._steps, self.total)

    @property
    def keep(self) -> float:
        """The keep fraction in force, in (0, 1]."""
        return self._keep

    def state_dict(self) -> dict[str, Any]:
        """Clock, generator, statistics, and the rule's own state where it has one.

        Holds tensors, numbers and strings only, so ``torch.load(weights_only=True)`` reads it. A run that loads it goes
        on exactly as an uninterrupted one.
        """
        state: dict[str, Any] = {
            "version": _STATE_VERSION,
            "steps": self._steps,
            "total": self.total,
            "accuracy": self._accuracy,
            "generator": self.generator.get_state(),
            "stats": self.stats.state_dict(),
        }
        if hasattr(self.rule, "state_dict"):
            state["rule"] = self.rule.state_dict()  # type: ignore[attr-defined]
        if self.log is not None:
            state["log"] = self.log.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any], *, length: str | None = None) -> None:
        """Go on from :meth:`state_dict`.

        Args:
            state: what it returned.
            length: what to do where the state was saved with another ``total`` and the keep fraction depends on
                progress, t steps done. "stretch": the schedule spans this training's ``total``; progress becomes
                ``t / (total - 1)``, so the keep fraction jumps once, as a learning-rate schedule made for the new
                length does. "saved": nothing jumps; the saved ``total`` stays in force, and past it the schedule stays
                where it ended.

        Raises:
            ChooseLength: the totals differ, so that progress would jump, and ``length`` is None.
            ValueError, TypeError: the state is of something else. The trimmer is then as before.

        Notes:
            Where the keep fraction does not depend on progress, nothing can jump and any ``total`` will do.

        Example:
            >>> state = {**Trimmer(total=11).state_dict(), "steps": 5}
            >>> trim = Trimmer(total=21)
            >>> trim.load_state_dict(state, length="stretch"); trim.progress, trim.total
            (0.25, 21)
            >>> trim.load_state_dict(state, length="saved"); trim.progress, trim.total
            (0.5, 11)
        """
        check_state(state, ("version", "steps", "total", "accuracy", "generator", "stats"), "a Trimmer")
        if state["version"] != _STATE_VERSION:
            raise ValueError(
                f"expected `state` of version {_STATE_VERSION}, got {describe(state['version'])}. "
                "It was saved by something else, or by another release of batchtrim."
            )
        steps = check_count("state['steps']", state["steps"], minimum=0)
        total = self._resumed_total(steps, state["total"], length)
        accuracy = check_progress("state['accuracy']", state["accuracy"])
        drawn = state["generator"]
        if not (
            isinstance(drawn, Tensor) and drawn.dtype == torch.uint8 and drawn.shape == self.generator.get_state().shape
        ):
            raise ValueError(f"expected `state['generator']` to be a torch.Generator's state, got {describe(drawn)}.")
        if ("rule" in state) != hasattr(self.rule, "state_dict"):
            raise ValueError(
                f"expected `state` of a trimmer with {self.rule!r}, got one of a trimmer with another rule."
            )
        self.stats.load_state_dict(state["stats"])
        if "rule" in state:
            self.rule.load_state_dict(state["rule"])  # type: ignore[attr-defined]
        if self.log is not None and "log" in state:
            self.log.load_state_dict(state["log"])
        self._steps, self._accuracy = steps, accuracy
        # whoever keeps the saved length knows that this training goes on beyond it
        self._overrun_told = length == "saved" and total != self.total
        self.total = total
        self.generator.set_state(drawn.cpu())
        self._set_keep()

    def __repr__(self) -> str:
        parts = [f"keep={self.schedule!r}", f"total={self.total}", f"select={self.rule!r}"]
        parts += [f"scale={self.scale!r}"] if self.scale != "kept" else []
        parts += [f"unit={self.unit!r}"] if self.unit != "sample" else []
        parts += [f"scope={self.scope!r}"] if self.scope != "local" else []
        return f"Trimmer({', '.join(parts)}, at step {self._steps}, keeping {self._keep:.4g})"

    @property
    def _reads_accuracy(self) -> bool:
        return getattr(self.schedule, "reads", "progress") == "accuracy"

    def _moves(self, *totals: int | None) -> bool:
        """Whether the keep fraction changes with progress, over trainings of these lengths."""
        if not getattr(self.schedule, "needs_total", True):
            return False
        return len({self._ask(at) for total in totals for at in _probe_points(total)}) > 1

    def _tell_overrun(self) -> None:
        self._overrun_told = True
        if self._moves(self.total):
            warnings.warn(
                f"expected at most total={self.total} calls of step(), got {self._steps}. The schedule is over, and "
                f"{self._keep:.4g} of each batch is kept from here on. Does `total` count epochs, and step() "
                "is called once a batch? Count both alike.",
                ClockPastTotal,
                stacklevel=3,
            )

    def _resumed_total(self, steps: int, saved: Any, length: str | None) -> int | None:
        """The ``total`` that is in force after going on from a state with another one."""
        if length is not None:
            check_choice("length", length, LENGTHS)
        if saved is not None:
            saved = check_count("state['total']", saved)
        if saved == self.total or not self._moves(saved, self.total):
            return self.total
        if length == "saved" and saved is not None:
            return saved
        if length == "stretch" and self.total is not None and steps <= self.total:
            return self.total
        if length == "stretch":
            raise ValueError(
                f"expected `state` of at most total={self.total} steps, which the schedule is stretched over, got "
                f"{steps} steps of total={saved}. Does one of the two count batches and the other epochs?"
            )
        raise ChooseLength(
            f"expected `state` of a trimmer with total={self.total}, got total={saved}. Progress would jump from "
            f"{progress_at(steps, saved):.4g} to {progress_at(steps, self.total):.4g}. Say what is meant: "
            "load_state_dict(state, length='stretch') stretches the schedule over this training, jump included; "
            "length='saved' goes on by the saved total and stays at the schedule's end beyond it."
        )

    def _probe(self) -> None:
        for at in _probe_points(self.total):
            self._ask(at)

    def _ask(self, at: float) -> float:
        name = "accuracy" if self._reads_accuracy else "progress"
        return check_schedule_output(self.schedule, f"{name} {at:.4g}", self.schedule(at))

    def _set_keep(self) -> None:
        self._keep = self._ask(self._accuracy if self._reads_accuracy else self.progress)
        self._keep_tensor.fill_(self._keep)

    def _flatten(
        self, losses: Tensor | Losses, rank_by: Tensor | Losses | None, mask: Tensor | None
    ) -> tuple[Losses, Tensor]:
        """The vector there is to choose from, and the scores to rank it by."""
        joint = self.scope == "global"
        if not isinstance(losses, Losses):
            check_losses(losses, allow_empty=joint)
            losses = Losses(losses)
        elif losses.values.numel() == 0:
            check_losses(losses.values, allow_empty=joint)
        values = losses.values
        if mask is not None:
            check_like("mask", mask, values, torch.bool)
            losses = losses.masked(mask)
        flat = losses if values.ndim == 1 and losses.unit is None else flatten(losses, self.unit)
        if rank_by is None:
            return flat, flat.values.detach()
        if isinstance(rank_by, Losses):
            ranked = flatten(rank_by, self.unit)
            check_like("rank_by", ranked.values, flat.values)
        else:
            check_losses(rank_by, "rank_by", allow_empty=joint)
            check_like("rank_by", rank_by, values)
            # by their plain mean: the weights and the reduction are those of the losses trained on
            ranked = flatten(Losses(rank_by, losses.mask), self.unit)
        return flat, ranked.values.detach()

    def _choose(self, flat: Losses, scores: Tensor) -> Selection:
        if self.scope == "global" and world_size(self.process_group) > 1:
            return self._choose_jointly(flat, scores)
        selection = select_valid(self.rule, scores, self._keep, flat.mask, self.generator)
        if flat.weights is not None or flat.counts is not None or flat.reduction != "mean":
            selection = normalized(selection, flat)
        self.last = Choice(flat.values.detach(), selection, flat.mask)
        self.stats.record(self.last.losses, selection, flat.mask)
        self._single_rows = self._single_rows + 1 if selection.size == 1 and self._keep < 1.0 else 0
        if self._single_rows == _SINGLE_ROWS:
            self._tell_single_rows()
        return selection

    def _choose_jointly(self, flat: Losses, scores: Tensor) -> Selection:
        if flat.terms:
            raise ValueError(f"expected `losses` with one divisor and scope='global', got {SUM_OF_TERMS}")
        weights = divisors(flat)
        joined = select_over_ranks(
            self.rule,
            flat.values,
            scores,
            self._keep,
            mask=flat.mask,
            weights=weights,
            generator=self.generator,
            settings=(repr(self.schedule), self.total, self.scale, self.unit),
            steps=self._steps,
            group=self.process_group,
        )
        selection = joined.selection
        if flat.reduction == "sum":
            ranks = world_size(self.process_group)
            selection = replace(selection, normalizer=1.0 / ranks, batch_normalizer=1.0 / ranks)
        elif flat.counts is not None:
            counts = flat.counts[selection.indices]
            selection = replace(selection, weights=counts if selection.weights is None else selection.weights * counts)
        self.last = Choice(flat.values.detach(), selection, flat.mask)
        self.stats.record(joined.values, joined.chosen)
        return selection

    def _compiled(self, flat: Losses, scores: Tensor) -> Tensor:
        """The same loss with fixed shapes. Statistics are not recorded in a compiled step."""
        self.last = None  # not the choice of an earlier batch
        mask = flat.mask
        n: Tensor | int = scores.shape[0]
        if mask is not None:
            n = mask.sum()
            scores = torch.where(mask, scores, float("-inf"))
        kept = self.rule.compiled_mask(scores, self._keep_tensor, n)  # type: ignore[attr-defined]
        if mask is not None:
            kept &= mask
        if flat.terms:
            return torch.stack([reduce_mask(term, kept, self.scale) for term in flat.terms]).sum()
        return reduce_mask(flat, kept, self.scale)

    def _tell_single_rows(self) -> None:
        warnings.warn(
            f"expected batches of several samples to choose from, got {_SINGLE_ROWS} of one in a row: whatever is kept "
            "of one is all of it, so nothing is trimmed. If a padding-free collator packs the batch into one row, "
            "choose tokens with unit='element'; if micro-batches hold one sample each, choose from the whole window "
            "with batchtrim.accumulate.",
            NothingToChoose,
            stacklevel=4,
        )


def _probe_points(total: int | None) -> list[float]:
    """Where a schedule is asked to find out about it: every progress of a short training, a thousand of a long one."""
    points = min(total or _PROBE_POINTS, _PROBE_POINTS)
    return [progress_at(i, points) for i in range(points)]
