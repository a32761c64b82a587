"""A trace that runs compiled: its forward, and a backward that cuts tensors to the kept rows and runs on them.

Backward takes the rows where it reads them, so the compiler fuses the cut with the operators that follow, and a tensor
that is read once is not copied. Both are compiled when they first run, for every batch size and every k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from batchtrim.engine.backward import Runs, run_backward
from batchtrim.engine.cutting import KeptRows, cut, gather, spread
from batchtrim.engine.inductor import CannotCompile, Compiled, Inductor, with_strides
from batchtrim.engine.layout import RowLayout
from batchtrim.engine.symbolic import as_symbolic, new_size, restrided, without_data
from batchtrim.errors import EngineFallback

if TYPE_CHECKING:
    from batchtrim.engine.sliced import SlicedStep
    from batchtrim.engine.split import Slices
    from batchtrim.engine.tape import Tape

__all__ = ["CompiledStep"]


# For better code, Inductor may assume on which side of a bound a size lies (such as k below 4096). For sizes that
# do not fit, the backward is recompiled, at most this often.
_BACKWARDS = 3


@dataclass
class _Backward:
    """A compiled backward and its arguments: positions of the backward's inputs, whole or already cut."""

    compiled: Compiled
    given: list[tuple[int, bool]]


class CompiledStep:
    """Run one trace compiled, as long as that works.

    Attributes:
        failed: the reason why it is not compiled, or None.
    """

    def __init__(self, step: SlicedStep, compiler: Inductor) -> None:
        self.step = step
        self.compiler = compiler
        self.failed: str | None = None
        self._told = False
        self._forward: Compiled | None = None
        self._backwards: dict[bool, list[_Backward]] = {False: [], True: []}

    def forward(self, args: list[Any]) -> Any:
        """Run the forward; return None if it must run operator by operator."""
        if self._forward is None:
            self._try(self._compile_forward)
        if self.failed is not None or self._forward is None or not self._forward.fits(args):
            return None
        return self._forward.run(args)

    def backward(self, args: list[Any], tape: Tape, keep: bool) -> list[Any] | None:
        """Run the backward of the kept rows; return None if it must run operator by operator."""
        known = self._backwards[tape.approximate]
        found = self._fitting(known, args, tape)
        if found is None and len(known) < _BACKWARDS:
            self._try(lambda: known.append(self._compile_backward(tape)))
            found = self._fitting(known, args, tape)
        if found is None:
            return None
        run, inputs = found
        if not keep:
            tape.kept.clear()
            tape.saved.clear()
            args.clear()
        return list(run(inputs))

    def _fitting(self, known: list[_Backward], args: list[Any], tape: Tape) -> tuple[Callable[..., Any], Any] | None:
        """Return the first compiled backward that fits the current sizes, and its inputs."""
        chosen = tape.chosen
        assert chosen is not None
        whole = {**dict(enumerate(args)), **tape.saved}
        for each in known:
            inputs = [chosen.batch, *([] if chosen.tokens is None else [chosen.tokens]), chosen.rows]
            inputs += [tape.kept[at] if on_kept else whole[at] for at, on_kept in each.given]
            if each.compiled.fits(inputs):
                return each.compiled.run, inputs
        return None

    def _try(self, compile_: Callable[[], None]) -> None:
        if self.failed is None:
            try:
                compile_()
            except CannotCompile as error:
                self.failed = str(error)
        if self.failed is not None and not self._told:
            self._told = True
            warnings.warn(
                f"Inductor does not compile the graphs of the shared engine ({self.failed}). They run operator "
                "by operator.",
                EngineFallback,
                stacklevel=2,
            )

    def _compile_forward(self) -> None:
        graph = self.step.forward_graph
        inputs = [node.meta["val"] for node in graph.graph.find_nodes(op="placeholder")]
        self._forward = self.compiler.compile(with_strides(graph), inputs, visible=self.step.outputs, backward=False)

    def _compile_backward(self, tape: Tape) -> _Backward:
        assert tape.chosen is not None
        step, slices = self.step, self.step.slices(tape.approximate)
        whole = [self._as_saved(place) for place in range(len(step.places))]
        like = next(each for each in whole if isinstance(each, Tensor))
        rows, _ = new_size(like, tape.chosen.k)
        sizes = [as_symbolic(step.symbols[0], like)]
        if tape.chosen.tokens is not None:
            sizes.append(as_symbolic(step.symbols[1] - step.lost, like))

        def kept_rows(rows: Tensor, sizes: Sequence[Any]) -> KeptRows:
            return KeptRows(rows, *sizes, *([step.lost] if len(sizes) > 1 else []))

        chosen = kept_rows(rows, sizes)
        parts = (slices.upper, slices.lower, slices.beside)
        upper, lower, beside = (_Late(with_strides(part.graph)).run_list for part in parts)
        wanted = self._wanted(slices)
        with without_data(like):
            kept = {at: cut(whole[at], slices.cuts[at], chosen) for at, on_kept in wanted if on_kept}

        def sliced(*inputs: Any) -> Sequence[Any]:
            rows, *values = inputs[len(sizes) :]
            now = kept_rows(rows, inputs[: len(sizes)])
            given: list[Any] = [None] * len(step.places)
            cut_before: dict[int, Tensor] = {}
            for (at, on_kept), value in zip(wanted, values, strict=True):
                if on_kept:
                    cut_before[at] = value
                else:
                    given[at] = value
            runs = Runs(upper, lower, beside, _LazyRows, spread)
            return run_backward(step, slices, now, given, cut_before, runs)

        inputs = [*sizes, rows, *(kept[at] if on_kept else whole[at] for at, on_kept in wanted)]
        compiled = self.compiler.compile(sliced, inputs, visible=len(inputs), backward=True)
        return _Backward(compiled, wanted)

    def _as_saved(self, place: int) -> Any:
        """Return a stand-in for an input of backward, in the memory layout that the compiled forward leaves."""
        value = self.step.places[place].meta["val"]
        at = self.step.saved_at.get(place)
        if not isinstance(value, Tensor) or at is None or at >= len(self._forward.strides):  # type: ignore[union-attr]
            return value
        return restrided(value, self._forward.strides[at])  # type: ignore[union-attr]

    def _wanted(self, slices: Slices) -> list[tuple[int, bool]]:
        step = self.step
        upper = {step.place[node] for node in slices.upper.inputs if node not in slices.upper.sizes}
        below = [*slices.lower.inputs, *slices.beside.inputs]
        lower = {step.place[node] for node in below if node in step.place}
        cut_before = upper & step.given & slices.cuts.keys()
        whole = (upper - cut_before) | lower
        return [*((at, True) for at in sorted(cut_before)), *((at, False) for at in sorted(whole))]


class _LazyRows:
    """The kept rows of a tensor, not yet taken."""

    def __init__(self, tensor: Tensor, layout: RowLayout, kept: KeptRows) -> None:
        self.taken = lambda: gather(tensor, layout, kept)


class _Late(fx.Interpreter):
    """Run a graph, and take rows when they are first read: taken earlier, they would leave the cache and use memory."""

    def run_list(self, args: list[Any]) -> Any:
        return self.run(*args)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        def value(node: fx.Node) -> Any:
            found = self.env[node]
            if isinstance(found, _LazyRows):
                found = self.env[node] = found.taken()
            return found

        return fx.map_arg(args, value)
