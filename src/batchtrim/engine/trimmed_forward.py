"""The public interface of the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchtrim._attributes import fixed
from batchtrim._by_name import by_name
from batchtrim._checks import check_choice, check_count, check_criterion, describe
from batchtrim.engine.auto import AutoEngine
from batchtrim.engine.batch import StepResult
from batchtrim.engine.compilation import compiled_part
from batchtrim.engine.exact import ExactEngine
from batchtrim.engine.forward import Forward
from batchtrim.engine.protocol import Engine
from batchtrim.engine.two_pass import TwoPassEngine
from batchtrim.engine.wrappers import is_placed
from batchtrim.losses import Losses, per_sample
from batchtrim.trimmer import Trimmer

__all__ = ["ENGINES", "TrimmedForward"]


def _shared(forward: Forward, trim: Trimmer) -> Engine:
    from batchtrim.engine.shared import SharedEngine  # it imports sympy, which is slow

    return SharedEngine(forward, trim)


ENGINES: dict[str, Callable[[Forward, Trimmer], Engine]] = {
    "auto": AutoEngine,
    "exact": ExactEngine,
    "shared": _shared,
    "two_pass": TwoPassEngine,
}


class TrimmedForward:
    """Run a forward, choose rows, and return a loss whose backward computes the kept rows only.

    ::

        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), trim)
        loss = step(x, y)
        loss.backward()

    Args:
        model: an unmodified module; with several processes, wrapped in DistributedDataParallel.
        per_sample_loss: ``(outputs, y) -> losses``, a tensor (B,) or (B, ...) or :class:`batchtrim.Losses`. A loss
            module with a ``reduction`` (``nn.CrossEntropyLoss()``) is used without its reduction; wrap a function
            as ``batchtrim.per_sample(F.cross_entropy)``.
        trim: the trimmer that chooses. Call its ``step()`` as without an engine.
        engine: "auto", "exact", "two_pass" or "shared"; see :mod:`batchtrim.engine`.
        rank_by: ``(outputs, y) -> losses`` to rank by, if that is not the loss trained on.
        batch_dim: the dimension of the tensors in ``x`` that holds the batch; 1 for time-major inputs.

    Raises:
        EngineRefused: engine "shared" cannot run this model exactly. "auto" warns once and continues with another.

    Notes:
        Two passes run the model's Python twice, including hooks, the second time on a smaller batch. Buffers,
        attributes, what hooks collect, and random generators end up as after one forward. Inside ``torch.no_grad()``
        every engine is one plain forward.

    Example:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> step = TrimmedForward(model, nn.CrossEntropyLoss(), Trimmer(0.5))
        >>> loss = step(torch.randn(8, 3), torch.randint(0, 2, (8,)))
        >>> loss.backward(); step.last.selection.k
        4
    """

    _to_change = "Make a new TrimmedForward, which traces anew."

    @by_name
    def __init__(
        self,
        model: nn.Module,
        per_sample_loss: Callable[[Any, Any], Tensor | Losses],
        trim: Trimmer,
        engine: str = "auto",
        *,
        rank_by: Callable[[Any, Any], Tensor | Losses] | None = None,
        batch_dim: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected `model` to be a torch.nn.Module, got {describe(model)}.")
        if isinstance(model, nn.modules.loss._Loss):
            raise TypeError(
                f"expected `model` before the loss, got {describe(model)}. Did you mean "
                "TrimmedForward(model, per_sample_loss, trim)?"
            )
        if not isinstance(trim, Trimmer):
            raise TypeError(f"expected `trim` to be a batchtrim.Trimmer, got {describe(trim)}.")
        check_criterion("per_sample_loss", per_sample_loss)
        if rank_by is not None:
            check_criterion("rank_by", rank_by)
        check_choice("engine", engine, ENGINES)
        if isinstance(per_sample_loss, nn.Module) and hasattr(per_sample_loss, "reduction"):
            per_sample_loss = per_sample(per_sample_loss, unit=trim.unit)
        if isinstance(per_sample_loss, per_sample) and per_sample_loss.unit != trim.unit:
            raise ValueError(
                f"expected `per_sample_loss` and `trim` to have one unit, got {per_sample_loss.unit!r} and "
                f"{trim.unit!r}. Give both the same unit."
            )
        batch_dim = check_count("batch_dim", batch_dim, minimum=0)
        self.forward = Forward(model, per_sample_loss, rank_by, batch_dim, trim.unit)
        self._trim = trim
        self._kind = engine
        self._engine = ENGINES[engine](self.forward, trim)
        self._last: StepResult | None = None
        self._in_order = False

    def __call__(self, x: Any, y: Any = None) -> Tensor:
        """Return the trimmed loss of a batch, with a graph.

        Args:
            x: what the model takes: a tensor, a tuple or list of them (``model(*x)``), or a mapping (``model(**x)``).
            y: targets, in any form ``per_sample_loss`` takes.

        Returns:
            0-d. :attr:`last` holds all losses, the outputs and the selection, detached, until the next call.
        """
        if self._kind != "exact" and torch.compiler.is_dynamo_compiling():
            return self.untraced(self, x, y)
        self._last = None  # frees the outputs of the batch before
        try:
            step = self._engine(x, y)
        except TypeError as error:
            if y is None:
                error.add_note("batchtrim got no targets: step(x, y) gives x to the model, and y to the loss.")
            raise
        chosen = self.trim.last
        mask = None if chosen is None else chosen.mask
        loss, losses, outputs, selection, _, engine, approximate = step
        self._last = StepResult(
            loss.detach(), losses, outputs, selection, mask, engine or self.engine.name, approximate
        )
        self._in_order = False
        return loss

    @fixed
    def trim(self) -> Trimmer:
        """The trimmer that chooses."""
        return self._trim

    @fixed
    def engine(self) -> Engine:
        """The engine that runs a step."""
        return self._engine

    @fixed
    def model(self) -> nn.Module:
        """The model, as it was given."""
        return self.forward.model

    @fixed
    def per_sample_loss(self) -> Callable[[Any, Any], Tensor | Losses]:
        """The loss, un-reduced."""
        return self.forward.per_sample_loss

    @fixed
    def rank_by(self) -> Callable[[Any, Any], Tensor | Losses] | None:
        """What samples are ranked by, if not by their loss."""
        return self.forward.rank_by

    @fixed
    def batch_dim(self) -> int:
        """The dimension of the inputs that holds the batch."""
        return self.forward.batch_dim

    @property
    def last(self) -> StepResult | None:
        """The last step, detached, with its kept rows in rising order; None before the first."""
        if self._last is not None and not self._in_order:  # sorted on request, not in every step
            self._last = self._last._replace(selection=self._last.selection.rising())
            self._in_order = True
        return self._last

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            owners = {} if name.startswith("_") else {"model": self.forward.model, "trim": self._trim}
            owner = next((each for each, value in owners.items() if hasattr(value, name)), None)
            if owner is None:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise AttributeError(
                f"expected an attribute of a TrimmedForward, got .{name}, which its {owner} has: step.{owner}.{name}."
            )

    def untraced(self, call: Callable[..., Any], *args: Any) -> Any:
        """Return ``call(*args)``, a part of a step. A compiled function that calls it does not trace it."""
        if not torch.compiler.is_dynamo_compiling():
            return call(*args)
        from batchtrim.engine.inductor import not_traced

        return not_traced(self._called_compiled, call, *args)

    def _called_compiled(self, call: Callable[..., Any], *args: Any) -> Any:
        """Compile the model, as the compiled function that calls would have done, and call."""
        model = self.forward.model
        if self._kind != "exact" and compiled_part(model) is None and not is_placed(model):
            self.forward.model = torch.compile(model)  # type: ignore[assignment]
            self._engine = ENGINES[self._kind](self.forward, self.trim)
        return call(*args)

    def __getstate__(self) -> dict[str, Any]:
        """Return the arguments to recreate it, for pickle and deepcopy, without traces and measurements."""
        return {"forward": self.forward, "trim": self.trim, "engine": self._kind}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.forward, self._trim, self._kind = state["forward"], state["trim"], state["engine"]
        self._engine = ENGINES[self._kind](self.forward, self.trim)
        self._last, self._in_order = None, False

    def __repr__(self) -> str:
        name = self.engine.name
        running = getattr(self.engine, "running", self.engine).name
        name = name if running == name else f"{name} ({running})"
        return f"TrimmedForward({type(self.forward.model).__name__}, engine={name!r}, {self.trim!r})"
