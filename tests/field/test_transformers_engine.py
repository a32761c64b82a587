"""Engines under the Hugging Face Trainer: they run, with the model's own outputs, and train as the plain graph."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))

import transformers
from hf_cases import arguments, data, new_model

from batchtrim.errors import EngineFallback, EngineRefused
from batchtrim.integrations.transformers import TrimmedTrainer
from tiers import few

pytestmark = [pytest.mark.usefixtures("settled"), pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")]

BERT: dict[str, Any] = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
    max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip


def bert(head: str, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    made: Any = transformers.BertConfig(**{**BERT, **config})
    return getattr(transformers, f"Bert{head}")(made)


def vit() -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3,
    )  # fmt: skip
    config = transformers.ViTConfig(**small)
    return transformers.ViTForImageClassification(config)


def t5() -> nn.Module:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(
        vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    config = transformers.T5Config(**small)
    return transformers.T5ForConditionalGeneration(config)


def images() -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": torch.tensor(n % 3)} for n in range(40)]


def labelled(label: Any) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(2)
    return [{**row, "labels": label(draw)} for row in data("sequence", 40)]


def spans() -> list[dict[str, Any]]:
    """Of which one in four ends outside, which counts not."""
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in data("sequence", 40)]
    return [
        {**row, "start_positions": torch.tensor(n % 4), "end_positions": torch.tensor(99 if n % 4 == 0 else 4)}
        for n, row in enumerate(rows)
    ]


CASES: dict[str, tuple[Any, Any]] = {
    "causal": (lambda: new_model("causal"), lambda: data("causal", 40)),
    "sequence": (lambda: new_model("sequence"), lambda: data("sequence", 40)),
    "token": (lambda: new_model("token"), lambda: data("token", 40)),
    "image": (vit, images),
    "masked": (lambda: bert("ForMaskedLM"), lambda: data("causal", 40)),
    "multi-label": (
        lambda: bert("ForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        lambda: labelled(lambda draw: torch.randint(0, 2, (3,), generator=draw).float()),
    ),
    "regression": (
        lambda: bert("ForSequenceClassification", num_labels=1),
        lambda: labelled(lambda draw: torch.randn((), generator=draw)),
    ),
    "answers": (lambda: bert("ForQuestionAnswering"), spans),
    "sequence to sequence": (t5, lambda: data("causal", 40)),
}


def trained(
    model: Any, rows: Any, engine: str | None, folder: Path, **options: Any
) -> tuple[dict[str, Tensor], TrimmedTrainer]:
    torch.manual_seed(0)
    extra = {name: options.pop(name) for name in ("per_sample_loss", "trim_options") if name in options}
    args = arguments(
        str(folder), learning_rate=0.1, max_steps=3, optim="sgd", per_device_train_batch_size=8, **options
    )  # fmt: skip
    trainer = TrimmedTrainer(model=model, args=args, train_dataset=rows, keep=0.4, engine=engine, **extra)
    trainer.train()
    return model.state_dict(), trainer


def last(trainer: TrimmedTrainer) -> Any:
    step = trainer.losses._step
    assert step is not None
    return step.last


@pytest.mark.slow  # a trace takes seconds; by default test_shared_trains_a_custom_loss_as_exact_does has one
@pytest.mark.parametrize("case", CASES)
def test_the_shared_engine_runs(case: str, tmp_path: Path) -> None:
    """It was refused: a forward whose loss functions are being recorded cannot be traced."""
    model, rows = CASES[case]
    plain, _ = trained(model(), rows(), None, tmp_path)
    shared, trainer = trained(model(), rows(), "shared", tmp_path)
    assert last(trainer).engine == "shared"
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("engine", few(["exact", "shared", "two_pass"], ["exact", "two_pass"]))
def test_outputs_are_the_models_own(engine: str, tmp_path: Path) -> None:
    _, trainer = trained(new_model("sequence"), data("sequence", 40), engine, tmp_path)
    outputs = last(trainer).outputs
    assert type(outputs).__name__ == "SequenceClassifierOutput"
    assert outputs.logits.shape == (8, 3)
    assert outputs.loss.ndim == 0


@pytest.mark.parametrize("engine", few(["exact", "shared", "two_pass"], ["two_pass"]))
def test_a_custom_function(engine: str, tmp_path: Path) -> None:
    def loss(outputs: Any, labels: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits, labels, reduction="none", label_smoothing=0.1)

    plain, _ = trained(new_model("sequence"), data("sequence", 40), None, tmp_path, per_sample_loss=loss)
    own, trainer = trained(new_model("sequence"), data("sequence", 40), engine, tmp_path, per_sample_loss=loss)
    assert last(trainer).engine == engine
    assert type(last(trainer).outputs).__name__ == "SequenceClassifierOutput"
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_label_smoothing(tmp_path: Path) -> None:
    plain, _ = trained(new_model("sequence"), data("sequence", 40), None, tmp_path, label_smoothing_factor=0.2)
    shared, trainer = trained(
        new_model("sequence"), data("sequence", 40), "shared", tmp_path, label_smoothing_factor=0.2
    )
    assert last(trainer).engine == "shared"
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-6)


class Head(nn.Module):
    """Of whatever loss."""

    def __init__(self, loss: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.loss = nn.Embedding(32, 8), nn.Linear(8, 3), loss
        self.first = self.head.bias.detach().clone()

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids).mean(1))
        return {"loss": self.loss(logits, labels, self), "logits": logits}


WEIGHTS = torch.tensor([0.1, 1.0, 20.0])


LOSSES: dict[str, Any] = {
    "weights": lambda out, y, _: F.cross_entropy(out, y, weight=WEIGHTS),
    "smoothing": lambda out, y, _: F.cross_entropy(out, y, label_smoothing=0.2),
    "sum": lambda out, y, _: F.cross_entropy(out, y, reduction="sum") / len(y),
    "none": lambda out, y, _: F.cross_entropy(out, y, reduction="none").mean(),
    "two terms": lambda out, y, _: F.cross_entropy(out, y) + F.cross_entropy(out, y, ignore_index=0),
    "factor": lambda out, y, _: 0.5 * F.cross_entropy(out, y),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", few(LOSSES, ["weights"]))
def test_shared_trains_a_custom_loss_as_exact_does(name: str, tmp_path: Path) -> None:
    loss = LOSSES[name]
    plain, _ = trained(Head(loss), data("sequence", 40), None, tmp_path)
    shared, trainer = trained(Head(loss), data("sequence", 40), "shared", tmp_path)
    assert last(trainer).engine == "shared"
    torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-6)


def squared(out: Tensor, y: Tensor, _: Any) -> Tensor:
    return F.mse_loss(out.softmax(-1), F.one_hot(y, 3).float())


def test_a_loss_without_a_standard_form(tmp_path: Path) -> None:
    with pytest.raises(EngineRefused, match=r"cannot run Head .* none of the standard forms. Pass per_sample_loss="):
        trained(Head(squared), data("sequence", 40), "shared", tmp_path)
    plain, _ = trained(Head(squared), data("sequence", 40), None, tmp_path)
    with pytest.warns(EngineFallback, match=r"none of the standard forms. Continuing with engine='exact'"):
        auto, trainer = trained(Head(squared), data("sequence", 40), "auto", tmp_path)
    assert last(trainer).engine == "exact"
    torch.testing.assert_close(auto, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_reentrant_checkpoints_are_named(tmp_path: Path) -> None:
    model: Any = bert("ForSequenceClassification", num_labels=3)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(EngineRefused, match=r"without backward\(\) \(RuntimeError: When use_reentrant=True"):
        trained(model, data("sequence", 40), "shared", tmp_path)


def changing(out: Tensor, y: Tensor, model: Head) -> Tensor:
    """Twice the loss, from the second step on."""
    return (1.0 + (model.head.bias.detach() != model.first).any()) * F.cross_entropy(out, y)


@pytest.mark.slow
def test_a_loss_that_changes_later(tmp_path: Path) -> None:
    """Proven on the first batch, it is held against the model's own in every step: never another loss in silence."""

    def model() -> Head:
        return Head(changing)

    plain, _ = trained(model(), data("sequence", 40), None, tmp_path)
    with pytest.raises(EngineRefused, match=r"cannot run Head .* it computes: it was .*, but its proven form gives"):
        trained(model(), data("sequence", 40), "shared", tmp_path)
    with pytest.warns(EngineFallback, match="Continuing with engine='exact'"):
        auto, _ = trained(model(), data("sequence", 40), "auto", tmp_path)
    torch.testing.assert_close(auto, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, at a graph break
@pytest.mark.parametrize("case", few(["causal", "sequence"], ["sequence"]))
def test_a_compiled_model_runs_compiled(case: str, tmp_path: Path) -> None:
    model, rows = CASES[case]
    plain, _ = trained(model(), rows(), None, tmp_path)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    own = model()
    trained(torch.compile(own, backend=backend), rows(), None, tmp_path, remove_unused_columns=False)
    assert graphs
    torch.testing.assert_close(own.state_dict(), plain, rtol=1e-4, atol=1e-6)
