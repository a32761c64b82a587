"""Two passes: right without dropout and BatchNorm, and without the side effects of similar projects."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import zoo
from harness import BATCH, error, gradient, train
from torch import nn

import batchtrim
from batchtrim.engine.batch import padded_rows
from batchtrim.engine.tolerance import Tolerance
from batchtrim.errors import EngineRefused

CASES = {
    "group_norm": (lambda: zoo.Residual(lambda width: nn.GroupNorm(2, width)), zoo.images),
    "encoder": (lambda: zoo.Encoder(False), zoo.tokens),
    "tied": (zoo.Tied, zoo.tokens),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_exact_where_samples_do_not_interact(name: str) -> None:
    make, data = CASES[name]
    exact, other = train(make, data, "exact"), train(make, data, "two_pass")
    assert other.chosen == exact.chosen
    for ours, theirs in zip(other.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5


@pytest.mark.parametrize("make", [lambda: zoo.Residual(nn.BatchNorm2d), lambda: zoo.Encoder(True, 0.3)])
def test_buffers_and_generators_are_those_of_one_forward(make: object) -> None:
    data = zoo.images if isinstance(make(), zoo.Residual) else zoo.tokens  # type: ignore[operator]
    exact, other = (train(make, data, engine, lr=0.0) for engine in ("exact", "two_pass"))  # type: ignore[arg-type]
    torch.testing.assert_close(other.buffers, exact.buffers)
    assert all(torch.equal(a, b) for a, b in zip(other.generators, exact.generators, strict=True))


def test_one_kept_sample_does_not_break_batch_norm() -> None:  # nor with "shared", in test_shared.py
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 5))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.05), "two_pass")
    step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
    assert step.last.selection.k == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((object(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5)), "expected `model` to be a torch.nn.Module"),
        ((nn.Linear(2, 2), nn.CrossEntropyLoss(), 0.5), "expected `trim` to be a batchtrim.Trimmer, got 0.5"),
        ((nn.Linear(2, 2), None, batchtrim.Trimmer(0.5)), "expected `per_sample_loss` to be callable"),
    ],
)
def test_wrong_arguments(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        batchtrim.TrimmedForward(*arguments)  # type: ignore[arg-type]


def test_wrong_engine_and_averaged_loss() -> None:
    with pytest.raises(ValueError, match="expected `engine` to be one of 'auto', 'exact', 'shared', 'two_pass'"):
        batchtrim.TrimmedForward(nn.Linear(2, 2), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "fast")
    step = batchtrim.TrimmedForward(nn.Linear(8, 5), nn.functional.cross_entropy, batchtrim.Trimmer(0.5))
    with pytest.raises(ValueError, match="reduction='none'"):
        step(zoo.vectors(4), torch.randint(0, 5, (4,)))


@pytest.mark.parametrize(
    ("kept", "companions", "expected"),
    [
        ([0, 3], 0, [0, 3]),
        ([3], 0, [3, 0]),
        ([], 0, [0, 3]),
        ([1, 4], 2, [1, 4, 0, 3]),
        ([0, 1, 2, 3, 4], 4, [0, 1, 2, 3, 4, 5]),
        ([0, 1, 2, 3, 4, 5], 4, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_companions_are_dropped_samples_spread_over_the_batch(
    kept: list[int], companions: int, expected: list[int]
) -> None:
    selection = batchtrim.Selection(indices=torch.tensor(kept, dtype=torch.int64), size=6, candidates=6)
    assert padded_rows(selection, companions).tolist() == expected


def step_of(model: nn.Module, loss: Any = None, keep: float = 0.5, engine: str = "two_pass") -> Any:
    return batchtrim.TrimmedForward(model.train(), loss or nn.CrossEntropyLoss(), batchtrim.Trimmer(keep), engine)


class Mixing(nn.Module):
    """Counts, draws, changes its batch in place, then mixes the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(8, 5), nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(()))
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        self.calls += 1
        x.mul_(2)
        x = self.norm(x) + torch.rand(1)
        return self.layer(x - x.mean(0).roll(1))


def test_a_refused_step_leaves_everything_as_it_was() -> None:
    torch.manual_seed(0)
    model = Mixing()
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    buffers, before, state = [b.clone() for b in model.buffers()], x.clone(), torch.get_rng_state()
    step = step_of(model)
    with pytest.raises(EngineRefused, match="samples depend on one another") as refused:
        step(x, y)
    torch.testing.assert_close(list(model.buffers()), buffers, rtol=0, atol=0)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert refused.value.selection.k == BATCH // 2  # for another engine to go on with


def test_an_interaction_is_named_with_a_sample_and_its_losses() -> None:
    step = step_of(zoo.BatchMean())
    with pytest.raises(EngineRefused, match=r"\(sample \d+ has a loss of [\d.]+ in the batch, and "):
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))


def test_a_model_at_fault_says_so_itself() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step_of(nn.Linear(3, 5))(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))


def test_approximate_steps_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 5))
    step = step_of(model)
    for _ in range(3):
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
        assert step.last.engine == "two_pass"
        assert "draws random numbers (dropout)" in step.last.approximate
    assert [record.message for record in caplog.records] == [
        "engine='two_pass' is approximate for this model: it draws random numbers (dropout), which a second pass would "
        "draw anew."
    ]
    step = step_of(zoo.Mlp(8))
    step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    assert step.last.approximate is None


class DropsLayers(nn.Module):
    """Draws one number for the whole batch, as layer drop does: nothing that a second pass could not draw again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x)
        return self.head(x if torch.rand(()) < 0.5 else self.b(x).tanh())


@pytest.mark.parametrize("scale", [3e-4, 1e-3])
def test_dropout_before_a_head_of_small_weights_is_seen(scale: float) -> None:
    """As in transformers' SEW-D: the losses moved by 1e-5, and a gradient that was off by 65 % passed for exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 5))
    with torch.no_grad():
        model[2].weight.mul_(scale)
    x, y = torch.randn(BATCH, 8), torch.randint(0, 5, (BATCH,))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    step(x, y).backward()
    assert "draws random numbers (dropout)" in step.last.approximate


def test_the_precision_of_a_model_with_dropout_is_found_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Mock(wraps=Tolerance._look_inside)
    monkeypatch.setattr(Tolerance, "_look_inside", lambda *args: look(*args))
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 5))
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(reduction="none"), batchtrim.Trimmer(0.5), "two_pass")
    x, y = torch.randn(16, 8), torch.randint(0, 5, (16,))
    for _ in range(4):
        step(x, y).backward()
    found = look.call_count
    for _ in range(3):  # between the checks in steps 4 and 8
        step(x, y).backward()
        assert step.last.approximate is not None
    assert look.call_count == found > 0


def test_a_number_drawn_for_all_samples_is_drawn_alike() -> None:
    exact, other = (
        train(DropsLayers, zoo.vectors, "exact", steps=8),
        train(DropsLayers, zoo.vectors, "two_pass", steps=8),
    )
    for ours, theirs in zip(other.gradients, exact.gradients, strict=True):
        assert error(theirs, ours) <= 1e-5
    assert other.step.last.approximate is None


def test_ctrl_c_in_the_second_pass_leaves_what_one_forward_leaves() -> None:
    class Interrupted(zoo.Mlp):
        def __init__(self) -> None:
            super().__init__(8)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            out = super().forward(x)
            if torch.is_grad_enabled() and len(x) == 3:  # the kept of 12 at 0.25, and no row that is probed
                raise KeyboardInterrupt
            return out

    model = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        step_of(model, keep=0.25)(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))
    assert float(model.seen) == 1


def test_what_the_loss_does_not_show_is_asked_in_steps_1_2_4_8() -> None:
    hook = Mock(return_value=None)  # a list would be left as after the first pass
    model = zoo.Mlp(8)
    model.register_forward_hook(hook)
    step = step_of(model)
    asked = []
    for _ in range(9):
        hook.reset_mock()
        step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
        rows = [len(call.args[1][0]) for call in hook.call_args_list]
        asked.append(len(rows) > 2)
    assert asked == [True, True, False, True, False, False, False, True, False]
    assert rows == [12, 6]


@pytest.mark.parametrize("engine", ["exact", "two_pass"])
def test_a_window_whose_batches_change_in_place(engine: str) -> None:
    class Scales(zoo.Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    torch.manual_seed(0)
    model = Scales(8)
    x, y = zoo.vectors(16), torch.randn(16, 5)

    def loss(out: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (out - y.div_(10)).square().mean(1)

    whole = step_of(model, loss, engine="exact")
    whole(x.clone(), y.clone()).backward()
    expected = gradient(model)
    model.zero_grad()
    batches = [(x[:8].clone(), y[:8].clone()), (x[8:].clone(), y[8:].clone())]
    for part in batchtrim.accumulate(step_of(model, loss, engine=engine), batches):
        part.backward()
    assert error(expected, gradient(model)) <= 1e-6
    for number, (left, targets) in enumerate(batches):
        torch.testing.assert_close(left, 2 * x[8 * number : 8 * number + 8])
        torch.testing.assert_close(targets, y[8 * number : 8 * number + 8] / 10)


def test_a_window_reads_buffers_as_plain_accumulation_does() -> None:
    class Counts(zoo.Mlp):
        def __init__(self) -> None:
            super().__init__(8)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = self.seen + 1
            return super().forward(x * (1 + self.seen))

    batches = [(zoo.vectors(8), torch.randint(0, 5, (8,))) for _ in range(3)]
    found = []
    for engine in ("exact", "two_pass"):
        torch.manual_seed(0)
        model = Counts()
        for part in batchtrim.accumulate(step_of(model, engine=engine), batches):
            part.backward()
        found.append(gradient(model))
        assert float(model.seen) == 3
    assert error(*found) <= 1e-6


def test_cached_parametrizations_get_their_gradient() -> None:
    """The second pass must not find the weights that the first made without a graph."""
    found = []
    for engine in ("exact", "two_pass"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 5))
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine)
        x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
        with nn.utils.parametrize.cached():
            step(x, y).backward()
        found.append(gradient(model))
    assert error(*found) <= 1e-5


def test_an_array_of_the_batch_changes_once() -> None:
    class Adding(nn.Linear):
        def forward(self, x: torch.Tensor, counts: np.ndarray) -> torch.Tensor:  # type: ignore[override]
            counts += 1
            return super().forward(x) * float(counts[0])

    step = step_of(Adding(8, 5), engine="two_pass")
    counts = np.zeros(2)
    step((zoo.vectors(BATCH), counts), torch.randint(0, 5, (BATCH,))).backward()
    assert counts.tolist() == [1.0, 1.0]


def test_an_object_in_the_batch_is_named() -> None:
    class Record:
        def __init__(self, x: torch.Tensor) -> None:
            self.values = {"x": x}

        def __getattr__(self, name: str) -> torch.Tensor:
            return self.__dict__["values"][name]  # a KeyError where Python asks for an AttributeError

    class Reading(nn.Linear):
        def forward(self, given: Record) -> torch.Tensor:  # type: ignore[override]
            return super().forward(given.x)

    with pytest.raises(EngineRefused, match="an object of type Record, whose rows cannot be taken"):
        step_of(Reading(8, 5), engine="two_pass")(Record(zoo.vectors(BATCH)), torch.randint(0, 5, (BATCH,)))


def test_losses_that_are_all_nan_are_no_reason_to_refuse() -> None:
    model = nn.Linear(8, 5)
    nn.init.constant_(model.weight, float("nan"))
    step = step_of(model, engine="two_pass")
    step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))).backward()
    assert step.last.engine == "two_pass"


class MixesInTraining(nn.Module):
    """Returns whom each sample was mixed with, in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        other = torch.randperm(len(x)) if self.training else None
        return self.layer(x if other is None else x + x[other]), other


def test_a_model_whose_loss_fails_in_evaluation_mode_is_refused() -> None:
    def loss(outputs: Any, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs[0], y[outputs[1]], reduction="none")

    step = batchtrim.TrimmedForward(MixesInTraining(), loss, batchtrim.Trimmer(0.5), "two_pass")
    before = torch.get_rng_state()
    with pytest.raises(EngineRefused, match=r"does not run in evaluation mode, .* \(ValueError: Expected input batch"):
        step(torch.randn(12, 8, generator=torch.Generator()), torch.arange(12) % 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_whose_copy_lacks_what_the_model_reads_is_named() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * x.scale)  # type: ignore[attr-defined]

    x = torch.randn(12, 8)
    x.scale = 2.0  # type: ignore[attr-defined]
    step = batchtrim.TrimmedForward(Scaled(8, 5), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "two_pass")
    with pytest.raises(EngineRefused, match=r"not on a copy of it \(AttributeError: .* no attribute 'scale'\)"):
        step(x, torch.arange(12) % 5)


class Padded(nn.Module):
    """A transformer of torch's own that also averages what it computes at padding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.layers, self.last = nn.TransformerEncoder(layer, 2), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.layers(self.words(x), src_key_padding_mask=x == 0).mean(1))


def test_a_shorter_way_of_attention_without_a_graph_is_no_reason_to_refuse() -> None:
    """Without a graph, torch's fast path gives zeros at padding: "its samples depend on one another"."""
    x = torch.randint(1, 50, (16, 7))
    x[::2, 4:] = 0
    step = step_of(Padded(), engine="two_pass")
    step(x, torch.randint(0, 3, (16,))).backward()
    assert "dropout" in step.last.approximate
    assert torch.backends.mha.get_fastpath_enabled()
