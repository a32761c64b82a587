"""No engine is silently wrong: every attack is computed right, reported as approximate, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo
from attacks import ATTACKS, KINDS, Attack

import batchtrim
from batchtrim.engine import ENGINES
from batchtrim.engine.batch import kept_loss, padded_rows
from batchtrim.engine.exact import ExactEngine
from batchtrim.testing import EngineReport, check_engine
from tiers import few, in_part, one_of_each

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about odd models is not the subject


def tried(attack: Attack, engine: str, steps: int = 9) -> EngineReport:
    first, *more = attack.batches()
    return check_engine(
        attack.make(), first, attack.loss(), engine=engine, steps=steps, more=more, verbose=False, **attack.options
    )


def test_every_kind_has_several_members() -> None:
    counted = {kind: sum(attack.kind == kind for attack in ATTACKS.values()) for kind in KINDS}
    assert min(counted.values()) >= 5, counted
    assert len(ATTACKS) >= 120


# one of each kind in every run, all of them among the slow tests
DEFAULT = one_of_each(ATTACKS, lambda name: ATTACKS[name].kind)


# Exact runs beside every other engine here. By itself in every run: what moves state, the batch, a graph or a compile.
MOVING = {2, 6, 7, 8, 10, 11, 18, 22, 24, 25, 27, 28, 29}


@pytest.mark.parametrize("name", few(ATTACKS, [name for name in DEFAULT if ATTACKS[name].kind in MOVING]))
def test_exact_is_right(name: str) -> None:
    report = tried(ATTACKS[name], "exact")
    assert report.verdict == "right", report
    assert report.gradient_error == 0.0


ALSO = (
    "weak_signs_of_the_batch", "weak_mean_of_words_in_training", "backward_inside_of_a_backward",
    "hook_that_moves_a_buffer", "hook_that_moves_a_weight", "tensor_of_a_parameter",
)  # fmt: skip


@pytest.mark.parametrize("name", few(ATTACKS, [*DEFAULT, *ALSO]))
def test_two_pass_is_never_silently_wrong(name: str) -> None:
    attack = ATTACKS[name]
    report = tried(attack, "two_pass")
    assert report.verdict != "wrong", report
    assert attack.two_pass in ("either", report.verdict), report
    if report.verdict == "refused":
        assert "the two-pass engine cannot run this model: " in str(report.refused)


# Each takes seconds to trace: these few in every run, all of them among the slow tests.
# Numbers of Python are drawn in test_between_steps.py.
FEW = (
    "detached_if_compiled", "unknown_words_caught", "channels_linked_by_a_sparse_buffer", "hook_that_moves_a_buffer",
    "list_of_a_parameter", "every_view_with_every_crop",
)  # fmt: skip


@pytest.mark.parametrize("name", FEW)
def test_shared_is_never_silently_wrong(name: str) -> None:
    traced(name, "shared")


# torch 2.8 itself fails to trace these
REFUSED_BY_OLD_TORCH = {"scanned_with_a_captured_weight", "frozen_weight_of_a_tensor_class"}


@pytest.mark.slow
@pytest.mark.parametrize("name", in_part(ATTACKS))
def test_traced_engines_are_never_silently_wrong(name: str) -> None:
    report = traced(name, "shared")
    if report.verdict != "right" or name in DEFAULT:  # elsewhere auto runs shared
        traced(name, "auto")


def traced(name: str, engine: str) -> EngineReport:
    torch._dynamo.reset()
    attack = ATTACKS[name]
    report = tried(attack, engine)
    assert report.verdict != "wrong", report
    if engine == "shared" and not (torch.__version__ < "2.10" and name in REFUSED_BY_OLD_TORCH):
        assert attack.shared in ("either", report.verdict), report
    elif engine == "shared":
        assert report.verdict in ("right", "refused"), report
    else:
        assert report.verdict in ("right", "approximate"), report  # it trains whatever exact trains
    return report


class Naive:
    """The naive way: forward, cut every tensor that has B rows, then forward and backward."""

    name = "naive"

    def __init__(self, forward: Any, trim: batchtrim.Trimmer) -> None:
        self.forward, self.trim, self.exact = forward, trim, ExactEngine(forward, trim)

    def __call__(self, x: Any, y: Any, selection: Any = None) -> Any:
        with torch.no_grad():
            losses, outputs = self.forward(x, y)
        selection = self.trim.select(losses).rising()
        kept, _ = self.forward(*self.cut(x, y, padded_rows(selection), selection.size))
        step = batchtrim.engine.batch.StepResult(
            kept_loss(kept, selection, self.trim), losses.values, outputs, selection
        )
        return step._replace(engine=self.name)

    def cut(self, x: Any, y: Any, rows: torch.Tensor, batch: int) -> Any:
        def taken(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            return tensor.index_select(dim, rows) if tensor.ndim > dim and tensor.shape[dim] == batch else tensor

        map_tensors = batchtrim.engine.batch.map_tensors
        return map_tensors(lambda t: taken(t, self.forward.batch_dim), x), map_tensors(lambda t: taken(t, 0), y)


# What two_pass refuses since it cannot tell, and the naive way of cutting happens to get right: the second line writes
# into parameters what they hold already, the third keeps tensors with a graph, which are cut too. A gradient's
# sum over the kept rows is that over all rows.
RIGHT_BY_LUCK = {
    "packed_sequence", "names_of_samples", "identity_over_the_batch",
    "weights_clipped_in_the_forward", "renormalised_embedding", "double_precision", "in_double_precision",
    "features_kept_with_their_graph", "likeness_of_all_views",
    "gradients_rounded_by_the_step_before", "hook_on_two_gradients", "hook_that_moves_a_weight",
    "gradient_added_to_an_attribute",
}  # fmt: skip


CUT_WRONG = [name for name, attack in ATTACKS.items() if attack.two_pass == "refused"]


@pytest.mark.parametrize("name", few(CUT_WRONG, one_of_each(CUT_WRONG, lambda name: ATTACKS[name].kind)[::2]))
def test_check_engine_finds_each_attack(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "naive", Naive)
    report = tried(ATTACKS[name], "naive", steps=6)
    assert report.verdict == ("right" if name in RIGHT_BY_LUCK else "wrong"), report
