"""One forward, backward on the kept rows only. See :mod:`batchtrim.engine.replay` for how."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim.engine import batch_norm
from batchtrim.engine.batch import Forward, Step, map_tensors, tensor_shapes
from batchtrim.engine.exact import ExactEngine, is_training_step
from batchtrim.engine.guard import Guard, module_names
from batchtrim.engine.layouts import close
from batchtrim.engine.plan import Diverged, Plan, Refused, Unchained
from batchtrim.engine.replay import Recorder, Replayer, no_graph
from batchtrim.engine.two_pass import NOT_ELEMENTS, kept_loss, padded_rows
from batchtrim.errors import EngineRefused
from batchtrim.losses import Losses
from batchtrim.selection import Selection
from batchtrim.trimmer import Trimmer

__all__ = ["SharedEngine"]

_VERIFY_EVERY = 500  # steps of one shape between two calibrations
_PROVE_EVERY = 4  # steps between two in which one operator, each in turn, is computed for real and compared
# uses after which a plan is looked at again that has chains to be tried, or undecided operators (all-zero outputs, say)
_LOOK_AGAIN = (1, 4, 16, 64)
_TRIES_OF_CHAINS = 2  # steps of one shape that may read what nobody did before, until all its products are remembered
_TRIES = 4  # steps that may run unlike their calibration before the engine gives up
_PLANS = 256  # batch shapes remembered


class SharedEngine:
    """One forward of B rows, backward of k. Cost: (1 + 2q) / 3 of a plain step.

    The first step of every batch shape calibrates (cost of two passes), and every ``verify_every``-th after it. In
    between, every ``prove_every``-th step computes one operator for real, each in its turn, and compares. A step that
    does not run like the calibrated one is done again exactly.

    Raises:
        EngineRefused: this model cannot be run so; the message names the operator, its module and the reason.
    """

    name = "shared"

    def __init__(
        self, forward: Forward, trim: Trimmer, verify_every: int = _VERIFY_EVERY, prove_every: int = _PROVE_EVERY
    ) -> None:
        reason = refusal(forward, trim)
        if reason is not None:
            raise EngineRefused(reason)
        self.forward = forward
        self.trim = trim
        self.verify_every = verify_every
        self.prove_every = prove_every
        self.follow_chains = True  # False: remember every product, whatever becomes of it
        self.exact = ExactEngine(forward, trim)
        self.guard = Guard(forward.inner)
        self.plans: dict[Any, Plan] = {}
        self._failures: Counter[Any] = Counter()
        self._unchained: Counter[Any] = Counter()
        self._selection: Selection | None = None

    def __call__(self, x: Any, y: Any, selection: Selection | None = None) -> Step:
        if self.trim.keep == 1.0 or not is_training_step():
            return self.exact(x, y, selection)
        key = self._key(x, y)
        plan = self.plans.get(key)
        if plan is not None:
            plan.used += 1
            if plan.used % self.verify_every == 0 or (plan.unsettled and plan.used in _LOOK_AGAIN):
                plan = None
        self.guard.begin()
        self._selection = selection
        try:
            return self._two_passes(x, y, key, plan)
        except _NothingToSave:
            self.guard.rollback()
        except Unchained:
            self.guard.rollback()
            del self.plans[key]
            self._unchained[key] += 1
        except Diverged as diverged:
            self.guard.rollback()
            self._count_failure(key, str(diverged))
        except Refused as refused:
            self.guard.rollback()
            raise EngineRefused(f"the shared engine cannot run this model: {refused}", self._selection) from None
        except BaseException:  # an error in the model, out of memory, Ctrl-C: as if the step had not begun
            self.guard.rollback()
            raise
        return self.exact(x, y, self._selection)

    def pays(self, x: Any, y: Any) -> bool:
        """Whether a step on a batch like this is worth it, as far as known: unknown before the first of its shape."""
        plan = self.plans.get(self._key(x, y))
        return plan is None or plan.pays(self.trim.expected_keep, self.guard.device.type)

    def _two_passes(self, x: Any, y: Any, key: Any, plan: Plan | None) -> Step:
        forward, guard = self.forward, self.guard
        chains = self.plans[key].chains if key in self.plans else {}
        with module_names(forward.inner) if plan is None else nullcontext(str) as where:
            recorder = Recorder(guard, plan, where, chains)
            with no_graph(), recorder:
                losses, outputs = forward(x, y, model=forward.inner)
            scores = forward.scores(outputs, y)
            losses = losses.detach()
            outputs = map_tensors(Tensor.detach, outputs)
        guard.between()
        if self._selection is None:
            self._selection = self.trim.select(losses, rank_by=scores).rising()
        selection, batch = self._selection, losses.values.shape[0]
        normed = batch_norm.has_batch_norm(guard.modules)
        rows = padded_rows(selection, batch // batch_norm.COMPANIONS if normed and 2 * selection.k < batch else 0)
        if selection.k == 0 or rows.shape[0] >= batch:
            raise _NothingToSave
        if plan is None and not losses.values.isfinite().all():
            raise _NothingToSave  # NaN equals nothing: calibrate another time
        replayer = Replayer(guard, recorder.finish(), plan, rows, batch, self._operator_to_prove(plan))
        kept = self._second_pass(replayer, x, y, batch, normed)
        found = replayer.finish()
        if not guard.end():
            raise Refused("something in it draws random numbers in a way torch's operators do not show")
        self._check_losses(losses.values[rows], kept.values.detach(), found)
        if plan is None:
            found.operators, found.flops, found.remembered = recorder.operators, recorder.flops, recorder.remembered
            found.batch = batch
            self._adopt(key, found)
        return Step(kept_loss(kept, selection, self.trim), losses.values, outputs, selection, engine=self.name)

    def _operator_to_prove(self, plan: Plan | None) -> int:
        if plan is None or plan.used % self.prove_every:
            return -1
        provable = plan.provable()
        return provable[plan.used // self.prove_every % len(provable)] if provable else -1

    def _second_pass(self, replayer: Replayer, x: Any, y: Any, batch: int, normed: bool) -> Losses:
        norms = batch_norm.KeptBatchNorm() if normed or self.guard.device.type == "cuda" else nullcontext()
        try:
            with norms, replayer:
                kept, _ = self.forward(*self.forward.rows(x, y, replayer.rows, batch))
        except (Diverged, Refused, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise Diverged(f"it runs on {batch} samples but not on {replayer.k} of them ({error})") from error
        return kept

    def _check_losses(self, expected: Tensor, kept: Tensor, plan: Plan) -> None:
        """Kept rows must have the losses they had among all rows. On a CPU in every step; elsewhere it would sync."""
        if not (expected.is_cpu or self._calibrated_now(plan)):
            return
        finite = expected.isfinite()
        if not close(expected[finite], kept[finite]):
            reason = "a sample's loss depends on the other samples of its batch"
            if plan.unmatched:
                reason += f" (seen first at {plan.unmatched[0]})"
            if self._calibrated_now(plan) or not finite.all():
                raise Refused(reason)
            raise Diverged("the kept rows came out unlike the whole batch's")

    def _calibrated_now(self, plan: Plan) -> bool:
        return plan not in self.plans.values()

    def _adopt(self, key: Any, found: Plan) -> None:
        """Trust a calibration; where it contradicts an earlier one, no step in between can be vouched for."""
        old = self.plans.get(key)
        if old is not None:
            found.used = old.used
            for before, now in zip(old.steps, found.steps, strict=False):
                if before.layouts is not None and now.layouts is None and not found.undecided:
                    raise Refused(f"{before.func} in {now.where} no longer lies as it did")
        if len(self.plans) >= _PLANS:
            del self.plans[next(iter(self.plans))]
        if not self.follow_chains or self._unchained[key] >= _TRIES_OF_CHAINS:
            found.chains = {}
        self.plans[key] = found
        self._failures.pop(key, None)

    def _count_failure(self, key: Any, reason: str) -> None:
        self.plans.pop(key, None)
        self._failures[key] += 1
        if self._failures.total() >= _TRIES:
            raise EngineRefused(f"the shared engine cannot run this model: {reason}", self._selection)

    def _key(self, x: Any, y: Any) -> Any:
        """What a plan holds for: shapes and dtypes of the batch, mode of every module, autocast."""
        modes = hash(tuple(module.training for module in self.guard.modules))
        device = self.guard.device.type
        cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return tensor_shapes(x), tensor_shapes(y), modes, cast


class _NothingToSave(Exception):
    """Everything is kept, or nothing is: one plain forward is all there is to do."""


def refusal(forward: Forward, trim: Trimmer) -> str | None:
    """Why the engine cannot run a model, as far as looking at it tells; None where nothing speaks against it."""
    if trim.unit != "sample":
        return NOT_ELEMENTS
    for name, module in forward.model.named_modules():
        what = f"{name or 'the model'} ({type(module).__name__})"
        if is_compiled(module):
            return f"{what} is compiled and runs no operators one could see"
        if isinstance(module, torch.jit.ScriptModule):
            return f"{what} is a script module and runs no operators one could see"
        if isinstance(module, nn.SyncBatchNorm):
            return f"{what} shares statistics between processes inside the forward"
        if isinstance(module, nn.DataParallel):
            return f"{what} splits the batch over devices itself; use DistributedDataParallel"
        if any(base.__name__ in ("FSDPModule", "FullyShardedDataParallel") for base in type(module).__mro__):
            return f"{what} gathers its parameters in every forward"
    return None


def is_compiled(module: nn.Module) -> bool:
    """Whether a module, or its call, went through torch.compile."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
