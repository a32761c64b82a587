"""Models that the shared engine refuses, with the reason, and how `auto` continues."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zoo
from harness import BATCH, agree, train
from torch import nn

import batchtrim
from batchtrim.engine.reasons import line_of, told
from batchtrim.errors import EngineFallback, EngineRefused
from tiers import few

REFUSED = {
    "layer_drop": (zoo.LayerDrop, zoo.vectors, "cannot be traced as one graph"),
    "branching": (zoo.Branching, zoo.vectors, "[Dd]ata-dependent"),
    "sparse": (zoo.Sparse, zoo.vectors, "sparse"),
    "one_batch_size": (lambda: zoo.HardCoded(BATCH), zoo.vectors, "one batch size only"),
    "lstm_dropout": (lambda: zoo.Recurrent(0.3), lambda batch: zoo.tokens(batch, 2), "random numbers in another order"),
}


QUICK = ("layer_drop", "sparse", "one_batch_size")  # "branching" is below, with the line that is named


@pytest.mark.parametrize("name", few(REFUSED, QUICK))
def test_refuses_and_says_why(name: str) -> None:
    make, data, reason = REFUSED[name]
    with pytest.raises(EngineRefused, match=reason):
        train(make, data, "shared")


@pytest.mark.parametrize("name", few(REFUSED, ("layer_drop",)))
def test_auto_continues_with_exact_after_one_warning(name: str) -> None:
    make, data, reason = REFUSED[name]
    exact = train(make, data, "exact")
    with pytest.warns(EngineFallback, match=reason) as caught:
        auto = train(make, data, "auto")
    assert sum(issubclass(each.category, EngineFallback) for each in caught) == 1
    assert auto.step.last.engine == "exact"
    torch.testing.assert_close(auto.gradients, exact.gradients, rtol=0, atol=0)
    agree(exact, auto, 0.0)
    assert auto.step.trim.stats.compute() == exact.step.trim.stats.compute()


@pytest.mark.slow  # by default test_testing.py has a report on one
def test_contrastive_loss_is_refused_by_its_operator() -> None:
    with pytest.raises(EngineRefused, match=r"aten\.\w+.* mixes rows"):
        train(lambda: zoo.Mlp(8), zoo.vectors, "shared", loss=zoo.contrastive)


@pytest.mark.slow
def test_a_trace_that_is_not_the_model_is_refused_with_the_state_put_back() -> None:
    """torch 2.13 traces a deque of limited length as one without a limit."""
    torch.manual_seed(0)
    model = zoo.Queue()
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    for factor in (1, 3):  # 1, 1 + 2; then 2 + 3, for the queue has lost its 1: the trace says 1 + 2 + 3
        step(x, y)
        torch.testing.assert_close(step.last.outputs, model.a(x) * factor)
    with pytest.raises(EngineRefused, match="its trace differs from the model"):
        step(x, y)
    assert list(model.queue) == [1, 2]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "jvp": lambda run, x: torch.func.jvp(run, (x,), (x,)),
    "grad": lambda run, x: torch.func.grad(run)(x),
    "vmap": lambda run, x: torch.func.vmap(run)(x[None]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func.jvp compiles a script
@pytest.mark.parametrize("name", few(TRANSFORMS, ["grad"]))
def test_transforms_are_refused_by_name_and_only_inside(name: str) -> None:
    step = batchtrim.TrimmedForward(zoo.Mlp(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")
    x, y = zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,))
    with pytest.raises(EngineRefused, match=r"inside torch\.func or with forward-mode derivatives \(jvp\)"):
        TRANSFORMS[name](lambda v: step(v, y), x)
    step(x, y).backward()
    assert step.last is not None
    assert step.last.engine == "shared"


def test_the_line_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(EngineRefused, match=r"as one graph at `x = .* > 0 else .*` \(odd\.py:\d+\): Data-dep"):
        train(zoo.Branching, zoo.vectors, "shared")


class Yielding(nn.Module):
    """Returns its outputs one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, 5) for _ in range(2))

    def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
        return (head(x) for head in self.heads)


class Reordering(nn.Linear):
    """Moves what it used last to the end."""

    def __init__(self) -> None:
        super().__init__(8, 5)
        self.used = OrderedDict(a=1.0, b=2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.used.move_to_end(next(iter(self.used)))
        return super().forward(x)


@pytest.mark.slow
def test_what_torch_does_not_trace_is_named() -> None:
    def first(out: Any, y: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(next(iter(out)), y, reduction="none")

    with pytest.raises(EngineRefused, match=r"it returns a generator, which can be read only once\. Return a list"):
        train(Yielding, zoo.vectors, "shared", loss=first)
    with pytest.raises(EngineRefused, match=r"leaves another order of the OrderedDict that it holds \('b', 'a'\)"):
        train(Reordering, zoo.vectors, "shared")
    plain, weighted = (batchtrim.per_sample(nn.CrossEntropyLoss(weight=w)) for w in (None, torch.rand(5) + 0.1))
    with pytest.raises(EngineRefused, match="model: its loss is a sum of terms whose entries count differently"):
        train(lambda: zoo.Mlp(8), zoo.vectors, "shared", loss=lambda out, y: plain(out, y) + weighted(out, y))


class Counts(zoo.Mlp):
    """Keeps a list of the sizes of its batches."""

    sizes: list[int]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        return super().forward(x)


@pytest.mark.slow
def test_a_list_that_grows_in_every_step_is_refused_with_the_cure() -> None:
    model = Counts(8)
    model.sizes = []
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), "shared")

    def steps() -> None:
        for _ in range(4):
            step.engine.capture.limit = 1  # type: ignore[union-attr]
            step(zoo.vectors(BATCH), torch.randint(0, 5, (BATCH,)))

    with pytest.raises(EngineRefused, match=r"each time with a new trace\. Hold what changes in a tensor"):
        steps()


class Encoder(nn.Module):
    """Sets ``requires_grad`` of its input in training, as the feature encoder of wav2vec2 does."""

    __module__ = "transformers.models.wav2vec2.modeling_wav2vec2"

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)
        self._requires_grad = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x[:, None]
        if self._requires_grad and self.training:
            hidden.requires_grad = True
        return self.layer(hidden.tanh())[:, 0]


def test_the_line_that_is_named_is_one_that_has_source() -> None:
    frames = [
        '  File "/own/model.py", line 3, in forward',
        "    x = held.value",
        '  File "<string>", line 5, in getvalue',
    ]
    reason = told(RuntimeError("\n".join(["Unsupported", "from user code:", *frames, "", "Set TORCHDYNAMO_VERBOSE=1"])))
    assert reason == "it cannot be traced as one graph at `x = held.value` (model.py:3): Unsupported"
    in_python = [f'  File "{functools.__file__}", line 997, in __get__', "    with self.lock:"]
    told_with_it = told(RuntimeError("\n".join(["Unsupported", "from user code:", *frames[:2], *in_python, ""])))
    assert told_with_it == reason


@pytest.mark.parametrize(
    "raised",
    [
        ["raised exception ValueError('too many values')"],
        ["raised exception ValueError([ConstantVariable(str: 'too many values')])"],  # torch 2.10
        ["raised exception ExceptionVariable(ValueError)", "raise ValueError('too many values')"],  # torch 2.8
    ],
)
def test_an_error_of_the_tracer_alone_is_not_said_to_be_the_models(raised: list[str]) -> None:
    """As where torch 2.13 reads ``dict(parameter_dict)``."""
    lines = ["Observed exception", *(f"  {line}" for line in raised)]
    assert told(RuntimeError("\n".join(lines))) == "its trace raises ValueError: too many values"


def test_a_size_is_fixed_by_a_line_of_the_model_or_by_none_that_is_named() -> None:
    assert line_of("y = x.view(12, -1)  # own/model.py:3 in forward") == "`y = x.view(12, -1)` (model.py:3)"
    assert line_of("if isinstance(x, dict):  # src/batchtrim/engine/shared.py:315 in step_1") == ""
    assert line_of("") == ""


class Ragged(nn.Module):
    """Takes samples of several lengths as one nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).tanh().to_padded_tensor(0.0).sum(1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, of nested tensors
def test_a_nested_batch_is_named_as_the_reason() -> None:
    def ragged(size: int) -> torch.Tensor:
        return torch.nested.nested_tensor([torch.randn(1 + n % 3, 8) for n in range(size)], layout=torch.jagged)

    with pytest.raises(EngineRefused, match=r"nested tensor, whose number .*\. Pass a padded tensor with a mask"):
        train(Ragged, ragged, "shared")


@pytest.mark.slow
def test_a_speech_encoder_that_asks_for_an_input_gradient_runs() -> None:
    exact, shared = (train(Encoder, zoo.vectors, engine) for engine in ("exact", "shared"))
    agree(exact, shared)
    assert shared.step.forward.model._requires_grad is True


class Captioned(nn.Module):
    """Takes the number of images for a Python number, as a message in its forward does; not that of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.read, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, text: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        name = f"{image.shape[0]} images"
        seen = self.look(image).tanh().mean(0) * len(name)
        return self.last((self.read(text) + seen).tanh())


@pytest.mark.slow
def test_another_size_than_the_batch_may_be_a_number() -> None:
    """One trace for each number of images; equal to the batch size, it is not taken for it."""

    def pairs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        return zoo.vectors(size), zoo.vectors(size)

    exact, shared = (train(Captioned, pairs, engine, steps=3) for engine in ("exact", "shared"))
    agree(exact, shared)
    assert shared.step.last.engine == "shared"


class Series(nn.Module):
    """An LSTM on data, which require no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.last = nn.LSTM(2, 8, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.rows(x.unflatten(1, (4, 2)))[0][:, -1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # by the switch itself
def test_an_lstm_that_torch_cannot_trace_is_refused_with_the_cure() -> None:
    """The reason was an assertion of torch's, with the types of all its tensors."""
    reason = ""
    try:  # another torch release may trace it
        train(Series, zoo.vectors, "shared", steps=2)
    except EngineRefused as refused:
        reason = str(refused)
    assert reason.endswith("inside torch.backends.mkldnn.flags(enabled=False), it can)") or not reason
    with torch.backends.mkldnn.flags(enabled=False):
        exact, shared = (train(Series, zoo.vectors, engine, steps=3) for engine in ("exact", "shared"))
    agree(exact, shared)
    assert shared.step.last.engine == "shared"


def test_compilation_that_is_switched_off_for_now() -> None:
    """A stance of the user's: without a trace the step is a plain one, and a later step may trace."""
    step = batchtrim.TrimmedForward(nn.Linear(8, 5), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    x, y = torch.randn(12, 8), torch.arange(12) % 5
    with torch.compiler.set_stance("force_eager"):
        step(x, y).backward()
        assert step.last.engine == "exact"
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(EngineRefused, match="fail_on_recompile"):
        step(x, y)
    step(x, y).backward()
    assert step.last.engine == "shared"


class Graph:
    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


class OfGraphs(zoo.Mlp):
    def forward(self, graph: Graph) -> torch.Tensor:
        return super().forward(graph.x)


def test_a_batch_whose_tensors_are_not_seen() -> None:
    """As torch_geometric's: it ran with "exact", without a word."""
    x, y = torch.randn(BATCH, 8), torch.zeros(BATCH, dtype=torch.int64)
    step = batchtrim.TrimmedForward(OfGraphs(8), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.5), engine="shared")
    with pytest.raises(EngineRefused, match="it finds no tensor of the batch in Graph"):
        step(Graph(x), y)
