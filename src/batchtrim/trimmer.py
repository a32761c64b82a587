"""The trimmer: schedule, selection rule and clock in one object, called in place of the mean of the losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from batchtrim._attributes import Checked, fixed, fixed_method
from batchtrim._by_name import by_name
from batchtrim._checks import check_choice, check_count, check_rule, check_state, describe, is_number
from batchtrim._copied import Copied
from batchtrim._deprecated import record_as_before, trimmer_log
from batchtrim._transforms import check_live, compiling, fixed_shapes, in_backward, outside, plain_losses, transforming
from batchtrim.choice import Choice
from batchtrim.clock import Clock
from batchtrim.distributed import select_over_ranks, world_size
from batchtrim.errors import NothingToChoose
from batchtrim.reduction import SCALES, normalized, reduce, reduce_mask, term_divisors, with_terms
from batchtrim.schedules import as_schedule, linear
from batchtrim.selection import Rule, Selection, hardest
from batchtrim.selection.base import changeable_keep, k_follows_losses, masked_choice, select_again, select_valid
from batchtrim.stats import KeepStats
from batchtrim.unreduced import UNITS, Losses, as_one, counted, divisors, to_rank

__all__ = ["Trimmer"]

_STATE_VERSION = 1
SCOPES = ("local", "global")
_SINGLE_ROWS = 3  # so many batches of one sample in a row are no accident; one may be the last of an epoch


class Trimmer(Copied):
    """Mini-batch trimming: keep the hardest samples of each batch, fewer as training goes on.

    At progress p keep the ``k = max(1, round(q(p) * B))`` samples of B with the largest losses, and return their mean,
    ``L = (1/k) * sum of the k largest l_i``. The defaults are the paper's: q falls linearly from 1.0 to 0.2.

    Source: Fassold, arXiv 2110.13058. Differences from the author's code: progress is clamped at the end of training
    instead of falling below the last keep fraction; a run of one epoch and a batch of one sample work; losses with
    more than one dimension are averaged per sample first (``unit``).

    Args:
        keep: a schedule, a number in (0, 1], or a callable from progress in [0, 1] to such a number. It is a fraction
            of the samples, or with :class:`batchtrim.loss_mass` of their loss.
        total: how many times :meth:`step` is called in the whole training: epochs, if it is called once an epoch,
            or batches. Progress is ``min(1, steps / (total - 1))``: 0 in the first of ``total``, 1 in the last.
            Needed if the schedule depends on progress.
        select: which samples to keep, :class:`batchtrim.hardest` by default.
        scale: "kept" divides by the number kept (the paper); "batch" divides by the batch size, which leaves a
            sample's weight what it is in plain training. The mean of the hardest k has a larger gradient than the mean
            of all; ``stats`` reports the ratio of the two losses.
        unit: "sample" ranks losses of shape (B, ...) by each sample's mean over the entries that count; "element"
            chooses among all entries (tokens, pixels). Either way keep 1 gives the criterion's own value.
        scope: "local" trims this process's batch; "global" chooses from the joined batch of all ranks, with its
            loss and gradient under DDP and FSDP; see :mod:`batchtrim.distributed`. Statistics are then those of the
            joined batch, and a rank without samples calls with losses of shape (0,).
        process_group: with scope "global", the ranks that average gradients together; all of them by default.
        seed: for rules that draw. The generator belongs to the trimmer and is part of :meth:`state_dict`.

    Attributes:
        last: the last :class:`batchtrim.Choice`, to inspect or to log; None before the first, and after a compiled step
            or one inside ``torch.vmap``, which ``stats`` do not count either.

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

    rule = Checked[Rule](check_rule)
    scale = Checked[str](check_choice, SCALES)
    unit = Checked[str](check_choice, UNITS)
    scope = Checked[str](check_choice, SCOPES)
    _to_change = (
        "Call step() to move along the schedule; for other arguments make a Trimmer, and load this one's state_dict()."
    )
    divided_by = 1  # what a trainer's backward divides the loss by; `batchtrim.integrations.accelerate` sets it

    @by_name
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
        schedule = as_schedule(keep)
        if total is None and getattr(schedule, "needs_total", True):
            raise ValueError(
                "expected `total`, the number of times step() will be called, got None. "
                "Pass the number of epochs (and call step() once an epoch) or of batches (once a batch); "
                "if it is not known, pass a constant keep."
            )
        check_rule("select", select)
        if total is not None:
            hint = "If the length of training is unknown (-1), count batches instead, or pass a constant keep."
            known = not is_number(total) or total >= 1
            total = check_count("total", total, hint="It counts calls of step()." if known else hint)
        self._clock = Clock(schedule, total)
        self.rule, self.scale, self.unit, self.scope = select, scale, unit, scope
        if process_group is not None and self.scope != "global":
            raise ValueError("expected `scope` 'global' with a `process_group`, got 'local'. Local asks no other rank.")
        if process_group is not None:
            world_size(process_group)
        self.process_group = process_group
        self._seed = check_count("seed", seed, minimum=0)
        self.generator = torch.Generator("cpu").manual_seed(self._seed)
        self.log = trimmer_log(log, self.unit)
        self.stats = KeepStats()
        self.last: Choice | None = None
        self._single_rows, self._uncounted = 0, False
        self._keep_tensor = changeable_keep(self._clock.keep)  # an input of a compiled step, which is not compiled anew

    @by_name
    def __call__(
        self,
        losses: Tensor | Losses,
        *,
        rank_by: Tensor | Losses | None = None,
        mask: Tensor | None = None,
        **logged: Any,
    ) -> Tensor:
        """Return the trimmed loss of a batch; use it in place of ``losses.mean()``.

        Args:
            losses: (B,) or (B, ...), one loss per sample or entry, floating point, not reduced. Gradient is not
                needed: a validation loop may call this too. Or what :class:`batchtrim.per_sample` returned, or a sum.
            rank_by: shape of ``losses``, or what another ``per_sample`` returned: rank by these, per sample by their
                plain mean, and train on ``losses``. For label smoothing, mixup and class weights. Every entry that
                counts in ``losses`` needs a score.
            mask: bool, shape of ``losses``: False where an entry does not count (padding, ignored labels).
            logged: deprecated: ``ids``, ``outputs`` and ``labels``. Pass them to :meth:`batchtrim.KeepLog.record`.

        Returns:
            0-d. With keep 1 the plain mean, bit for bit. If nothing counts, a 0 with a graph.

        Raises:
            PassUnreducedLosses, TypeError, ValueError: the losses are reduced, or not losses.

        Notes:
            Of equal losses the lower index is kept. A NaN or inf loss counts as largest and is kept, so the step is
            NaN as in plain training and a gradient scaler skips it. No gradient flows through the selection.
            On the meta device and under FakeTensorMode, rules whose k follows from ``keep`` work, without a mask.
            No device sync, unless a mask is given or the rule's k depends on the losses. Backward runs on the full
            graph, so dropped samples still cost their share; :class:`batchtrim.TrimmedForward` saves that.
        """
        flat, scores = self._flatten(losses, rank_by, mask)
        if (compiling() or transforming()) and fixed_shapes(self.rule, self.scope, flat, scores):
            return self._fixed(flat, scores)
        selection = self._choose(flat, scores, rank_by is None)
        if logged or self.log is not None:
            record_as_before(self.log, self.last, logged, "trim")
        return reduce(flat if flat.terms else flat.values, selection, self.scale)

    @fixed_method("The rule is trim.rule.")
    @by_name
    def select(
        self,
        losses: Tensor | Losses,
        *,
        rank_by: Tensor | Losses | None = None,
        mask: Tensor | None = None,
        **logged: Any,
    ) -> Selection:
        """Choose as :meth:`__call__` does, and count it in ``stats``; :func:`batchtrim.reduce` then gives the loss."""
        flat, scores = self._flatten(losses, rank_by, mask)
        selection = self._choose(flat, scores, rank_by is None)
        if flat.terms and not selection.terms:
            selection = with_terms(selection, flat)
        if logged or self.log is not None:
            record_as_before(self.log, self.last, logged, "trim.select")
        return selection

    @by_name
    def step(self, n: int = 1, *, accuracy: float | None = None) -> None:
        """Advance the clock, like a learning-rate scheduler: once an epoch or once a batch, as ``total`` counts.

        Past ``total`` the schedule stays at its end. The first step beyond it gives a
        :class:`batchtrim.errors.ClockPastTotal` warning if the keep fraction depends on progress: most often
        ``total`` counts epochs and this is called once a batch.

        Args:
            n: how many steps.
            accuracy: running training accuracy in [0, 1], for :class:`batchtrim.by_accuracy`.
        """
        self._clock.step(n, accuracy)
        self._keep_tensor.fill_(self._clock.keep)

    @fixed
    def last_selection(self) -> Selection | None:
        """The selection in :attr:`last`."""
        return None if self.last is None else self.last.selection

    @fixed
    def expected_keep(self) -> float:
        """The expected fraction of the next batch that will be kept, before its losses are known.

        This is ``keep``; for rules whose k depends on the losses (``loss_mass``, ``above``, ``percentile``) it is the
        fraction kept of the last batch. Engines use it to decide whether a smaller backward pays.
        """
        if not k_follows_losses(self.rule):
            return self.keep
        selection = self.last_selection
        return selection.k / selection.candidates if selection is not None and selection.candidates else self.keep

    @fixed
    def seed(self) -> int:
        """The seed that the generator was made with; to draw anew, ``trim.generator.manual_seed(seed)``."""
        return self._seed

    @fixed
    def schedule(self) -> Callable[[float], float]:
        """The keep schedule."""
        return self._clock.schedule

    @fixed
    def total(self) -> int | None:
        """The number of steps that the schedule spans: the saved run's if its length was kept."""
        return self._clock.total

    @fixed
    def steps(self) -> int:
        """The number of calls of :meth:`step`."""
        return self._clock.steps

    @fixed
    def progress(self) -> float:
        """The fraction of training that is done, in [0, 1]; 0 if ``total`` is 1 or unknown."""
        return self._clock.progress

    @fixed
    def keep(self) -> float:
        """The current keep fraction, in (0, 1]."""
        return self._clock.keep

    def state_dict(self) -> dict[str, Any]:
        """Return clock, generator, statistics, and the rule's own state if it has one.

        It holds tensors, numbers and strings only, so ``torch.load(weights_only=True)`` reads it. A run that loads it
        continues exactly as an uninterrupted one.
        """
        state: dict[str, Any] = {
            "version": _STATE_VERSION,
            "steps": self.steps,
            "total": self.total,
            "accuracy": self._clock.accuracy,
            "generator": self.generator.get_state(),
            "stats": self.stats.state_dict(),
        }
        if hasattr(self.rule, "state_dict"):
            state["rule"] = self.rule.state_dict()  # type: ignore[attr-defined]
        if self.log is not None:
            state["log"] = self.log.state_dict()
        return state

    @by_name
    def load_state_dict(self, state: dict[str, Any], *, length: str | None = None) -> None:
        """Continue from :meth:`state_dict`.

        Args:
            length: what to do if the state was saved with another ``total``, and keep depends on progress. "stretch":
                after t steps progress is ``t / (total - 1)``, so keep jumps once, as a learning-rate schedule made for
                the new length does. "saved": nothing jumps; the saved ``total`` applies, and past it keep stays.

        Raises:
            ChooseLength: the totals differ, so that progress would jump, and ``length`` is None.
            ValueError, TypeError: the state is not a trimmer's. The trimmer is then unchanged.

        Notes:
            If the keep fraction does not depend on progress, nothing can jump, and any ``total`` works.

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
        clock = self._clock.resumed(state["steps"], state["accuracy"], state["total"], length)
        drawn, own = state["generator"], self.generator.get_state()
        if not (isinstance(drawn, Tensor) and drawn.dtype == torch.uint8 and drawn.shape == own.shape):
            raise ValueError(f"expected `state['generator']` to be a torch.Generator's state, got {describe(drawn)}.")
        if ("rule" in state) != hasattr(self.rule, "state_dict"):
            raise ValueError(
                f"expected `state` of a trimmer with {self.rule!r}, got one of a trimmer with another rule."
            )
        KeepStats().load_state_dict(state["stats"])  # an error shows before anything has changed
        if "rule" in state:
            self.rule.load_state_dict(state["rule"])  # type: ignore[attr-defined]
        self.stats.load_state_dict(state["stats"])
        if self.log is not None and "log" in state:
            self.log.load_state_dict(state["log"])
        self._clock = clock
        self.generator.set_state(drawn.cpu())
        self._keep_tensor.fill_(clock.keep)

    def __repr__(self) -> str:
        parts = [f"keep={self.schedule!r}", f"total={self.total}", f"select={self.rule!r}"]
        parts += [f"scale={self.scale!r}"] if self.scale != "kept" else []
        parts += [f"unit={self.unit!r}"] if self.unit != "sample" else []
        parts += [f"scope={self.scope!r}"] if self.scope != "local" else []
        return f"Trimmer({', '.join(parts)}, at step {self.steps}, keeping {self.keep:.4g})"

    def _flatten(
        self, losses: Tensor | Losses, rank_by: Tensor | Losses | None, mask: Tensor | None
    ) -> tuple[Losses, Tensor]:
        """Return the vector there is to choose from, and the scores to rank it by."""
        check_live()
        flat, scores = to_rank(losses, rank_by, mask, self.unit, allow_empty=self.scope == "global")
        return as_one(flat) if flat.terms and self.scope == "local" else flat, scores

    def _choose(self, flat: Losses, scores: Tensor, ranked_by_itself: bool) -> Selection:
        if transforming() and not compiling():
            plain = plain_losses(flat, scores, repr(self.rule))
            with outside():
                return self._choose(*plain, ranked_by_itself)
        if self.scope == "global" and world_size(self.process_group) > 1:
            return self._choose_jointly(flat, scores)
        again = in_backward() != -1 and not compiling()
        selection = (select_again if again else select_valid)(self.rule, scores, self.keep, flat.mask, self.generator)
        if flat.weights is not None or flat.counts is not None or flat.reduction != "mean":
            selection = normalized(selection, flat)
        values = scores if ranked_by_itself else flat.values.detach()
        if again:
            return selection  # it is counted already
        self.last = Choice(values, selection, flat.mask)
        self.stats.record(values, selection, flat.mask)
        self._single_rows = self._single_rows + 1 if selection.size == 1 and self.keep < 1.0 else 0
        if self._single_rows == _SINGLE_ROWS:
            warnings.warn(NothingToChoose(_SINGLE_ROWS), stacklevel=4)
        return selection

    def _choose_jointly(self, flat: Losses, scores: Tensor) -> Selection:
        flat = counted(flat)
        joined = select_over_ranks(
            self.rule, flat.values, scores, self.keep, mask=flat.mask, weights=divisors(flat), generator=self.generator,
            settings=(repr(self.schedule), self.total, self.scale, self.unit), steps=self.steps,
            summed=flat.reduction == "sum", terms=term_divisors(flat), group=self.process_group,
        )  # fmt: skip
        selection = joined.selection
        if flat.reduction == "sum":
            ranks = world_size(self.process_group)
            selection = replace(selection, normalizer=1.0 / ranks, batch_normalizer=1.0 / ranks)
        if flat.counts is not None:
            counts = flat.counts[selection.indices]
            selection = replace(selection, weights=counts if selection.weights is None else selection.weights * counts)
        if flat.terms:
            selection = with_terms(selection, flat, joined.terms)
        self.last = Choice(flat.values.detach(), selection, flat.mask)
        self.stats.record(joined.values, joined.chosen)
        return selection

    def _fixed(self, flat: Losses, scores: Tensor) -> Tensor:
        """Return the loss with fixed shapes. Statistics are not recorded: not in a compiled step, nor by vmap."""
        self.last, self._uncounted = None, True  # not the choice of an earlier batch
        return reduce_mask(flat, masked_choice(self.rule, scores, self._keep_tensor, flat.mask), self.scale)
