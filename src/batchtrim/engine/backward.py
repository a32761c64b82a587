"""Run the parts of a backward: the upper one on the kept rows, the lower one on all.

The same code runs when operators run one by one and while a compiler traces them; :class:`Runs` holds what differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from batchtrim.engine.cutting import KeptRows
from batchtrim.engine.layout import Layout, RowLayout
from batchtrim.engine.split import Crossing, Slices

if TYPE_CHECKING:
    from batchtrim.engine.sliced import SlicedStep

__all__ = ["Runs", "run_backward"]


@dataclass(frozen=True)
class Runs:
    """The functions that run the parts of a backward, cut rows, and put them back."""

    upper: Callable[[list[Any]], Any]
    lower: Callable[[list[Any]], Any]
    beside: Callable[[list[Any]], Any]
    cut: Callable[..., Any]
    put_back: Callable[..., Tensor]


def run_backward(
    step: SlicedStep, slices: Slices, chosen: KeptRows, whole: list[Any], kept: dict[int, Tensor], runs: Runs
) -> list[Any]:
    """Run the upper part on the kept rows, put its gradients back, run the lower part.

    Args:
        whole: the backward's inputs by position, on all rows; emptied.
        kept: inputs already cut; emptied.
    """
    known: dict[fx.Node, Any] = {}

    def given(node: fx.Node, on_kept: bool) -> Any:
        if node in known:
            return known[node]
        if on_kept and node in slices.upper.sizes:
            return slices.upper.sizes[node](chosen.k)
        place = step.place[node]
        if on_kept and place in kept:
            return kept[place]
        value = whole[place]
        if on_kept and place in step.multiples:
            return value // chosen.batch * chosen.k
        layout = slices.cuts.get(place)
        return runs.cut(value, layout, chosen) if on_kept and layout is not None else value

    inputs = [given(node, True) for node in slices.upper.inputs]
    if slices.upper.beside:
        inputs += runs.beside([given(node, False) for node in slices.beside.inputs])
    inputs += [_Across(each, chosen, runs) for each in slices.upper.crossings.values()]
    kept.clear()
    found: dict[fx.Node, Any] = {}
    if slices.upper.outputs:
        found = dict(zip(slices.upper.outputs, runs.upper(inputs), strict=True))
    for node in list(found):
        layout = slices.proof.verdicts[node].layouts[0]
        if isinstance(layout, RowLayout):
            found[node] = runs.put_back(found[node], layout, chosen)
    if slices.lower.outputs:
        known = found
        inputs = [given(node, False) for node in slices.lower.inputs]
        whole.clear()
        found.update(zip(slices.lower.outputs, runs.lower(inputs), strict=True))
    (output,) = step.backward_graph.graph.find_nodes(op="output")
    return [found[node] if isinstance(node, fx.Node) else node for node in output.args[0]]


@dataclass(frozen=True)
class _Across:
    """Puts back the gradients of an operator that runs on all rows, and cuts its results."""

    crossing: Crossing
    chosen: KeptRows
    runs: Runs

    def put_back(self, value: Tensor, at: int) -> Tensor:
        return self._each(self.runs.put_back, value, self.crossing.gradients[at])

    def cut(self, results: Any) -> Any:
        if isinstance(results, Tensor):
            return self._each(self.runs.cut, results, self.crossing.results[0])
        return [self._each(self.runs.cut, *each) for each in zip(results, self.crossing.results, strict=True)]

    def _each(self, function: Callable[..., Any], value: Any, layout: Layout) -> Any:
        return function(value, layout, self.chosen) if isinstance(layout, RowLayout) else value
