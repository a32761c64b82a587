"""Hugging Face's Trainer as its users write it: each test names the public report it comes from.

A trimmed training with everything kept is held against the model's own loss, computed and stepped by hand.
"""

from __future__ import annotations

import importlib
import math
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
from hf_cases import Gradient, arguments, data, flat_gradient, new_model
from transformers import BertConfig, BertForSequenceClassification, GPT2LMHeadModel, Trainer

from batchtrim.integrations._labels import labels_of, loss_of
from batchtrim.integrations._loss_finder import LossFinder
from batchtrim.integrations._recorder import NotFound
from batchtrim.integrations.transformers import TrimmedTrainer
from batchtrim.losses import per_sample

pytestmark = [pytest.mark.usefixtures("settled"), pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")]


class MyGPT(GPT2LMHeadModel):
    """A subclass: its name is in no table."""


class Wrapped(nn.Module):
    """As PEFT and its like wrap a model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


class Remote(nn.Module):
    """As remote code writes a head: its own shift, its own loss object, a tuple as output."""

    def __init__(self, ignored: int = -100) -> None:
        super().__init__()
        self.model, self.criterion = new_model("causal"), nn.CrossEntropyLoss(ignore_index=ignored)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        shifted = logits[..., :-1, :].contiguous()
        return self.criterion(shifted.view(-1, logits.shape[-1]), labels[..., 1:].reshape(-1)), logits  # type: ignore[index]


def causal(kind: str) -> Any:
    model: Any = new_model("causal")
    if kind == "subclass":
        mine = MyGPT(model.config)
        mine.load_state_dict(model.state_dict())
        return mine
    return {"plain": lambda: model, "wrapped": lambda: Wrapped(model), "remote": Remote}[kind]()


def classifier(**config: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(BertConfig(**{**small, **config}))


def labelled(*labels: Any) -> list[dict[str, Any]]:
    return [{**row, "labels": torch.as_tensor(label)} for row, label in zip(data("sequence", 5), labels, strict=True)]


def one_step(model: Any, rows: list[Any], folder: Path, **options: Any) -> tuple[Tensor, float]:
    """The gradient and the loss of a first step with everything kept, of 5 rows."""
    gradient = Gradient()
    extra = {name: options.pop(name) for name in ("per_sample_loss", "trim_options", "engine") if name in options}
    args = arguments(str(folder), **options)
    trainer = TrimmedTrainer(
        model=model, args=args, train_dataset=rows, keep=1.0, callbacks=[gradient], **extra
    )  # fmt: skip
    trainer.train()
    return gradient.value, trainer.state.log_history[0]["loss"]


def by_hand(model: Any, rows: list[Any]) -> tuple[Tensor, float]:
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    loss = loss_of(model.train()(**batch))
    model.zero_grad()
    loss.backward()
    return flat_gradient(model), loss.item()


def assert_trained_as(model: Any, rows: list[Any], folder: Path, **options: Any) -> None:
    """The order of the rows in the only batch does not matter to a mean."""
    expected, loss = by_hand(model, rows)
    model.zero_grad(set_to_none=True)
    found, logged = one_step(model, rows, folder, **options)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert logged == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("unit", ["sample", "element"])
@pytest.mark.parametrize("kind", ["plain", "subclass", "wrapped", "remote"])
def test_a_causal_model_by_whatever_name(kind: str, unit: str, tmp_path: Path) -> None:
    """Qwen#834, transformers#27161: by class name these were trained on unshifted labels, and copied their input."""
    assert_trained_as(causal(kind), data("causal", 5), tmp_path, trim_options={"unit": unit})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, at a graph break
def test_a_compiled_model_runs_compiled(tmp_path: Path) -> None:
    """Its loss has a standard form: it runs compiled."""
    model = causal("subclass")
    expected, _ = by_hand(model, data("causal", 5))
    model.zero_grad(set_to_none=True)
    found, _ = one_step(torch.compile(model, backend="eager"), data("causal", 5), tmp_path, remove_unused_columns=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_compiled_model_without_a_standard_form(tmp_path: Path) -> None:
    model = Weighted(lambda out, y, _: F.mse_loss(out.softmax(-1), F.one_hot(y, 3).float()))
    rows = data("sequence", 5)
    expected, _ = by_hand(model, rows)
    model.zero_grad(set_to_none=True)
    with pytest.warns(UserWarning, match=r"Weighted runs without torch.compile here"):
        found, _ = one_step(torch.compile(model, backend="eager"), rows, tmp_path, remove_unused_columns=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_model_compiled_in_place(tmp_path: Path) -> None:
    """No call of a loss function was seen in it, so that it was refused."""
    model, rows = Weighted(lambda out, y, _: F.cross_entropy(out, y)), data("sequence", 5)
    expected, _ = by_hand(model, rows)
    model.zero_grad(set_to_none=True)
    model.compile(backend="eager")
    found, _ = one_step(model, rows, tmp_path, remove_unused_columns=False)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_causal_model_learns_the_next_token(tmp_path: Path) -> None:
    """Counting up: the next-token accuracy was 0.0 where the subclass was trained to copy."""
    torch.manual_seed(0)
    rows = []
    for start in range(24):
        tokens = torch.arange(start, start + 8)
        rows.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens})
    args = arguments(str(tmp_path), max_steps=100, learning_rate=0.05, per_device_train_batch_size=8, logging_steps=500)
    model = causal("subclass")
    TrimmedTrainer(model=model, args=args, train_dataset=rows, keep=0.5).train()
    tokens = torch.stack([row["input_ids"] for row in rows])
    predicted = model.eval()(input_ids=tokens).logits.argmax(-1)
    assert (predicted[:, :-1] == tokens[:, 1:]).float().mean() == 1.0


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        # simpletransformers#1116: three outputs of a regression were taken for three classes
        ({"num_labels": 3, "problem_type": "regression"}, 10 * torch.randn(5, 3)),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, torch.randint(0, 2, (5, 3)).float()),
        ({"num_labels": 3}, torch.randint(0, 2, (5, 3)).float()),
        ({"num_labels": 1}, torch.randn(5)),
        ({"num_labels": 1}, torch.randn(5, 1)),
        # mmpretrain PR 1525: labels (B, 1)
        ({"num_labels": 3}, torch.randint(0, 3, (5, 1))),
        ({"num_labels": 3}, torch.randint(0, 3, (5,))),
        ({"num_labels": 2, "problem_type": "regression"}, torch.randn(5, 2)),
    ],
)
def test_the_configuration_decides_as_in_transformers(config: dict[str, Any], labels: Tensor, tmp_path: Path) -> None:
    assert_trained_as(classifier(**config), labelled(*labels), tmp_path)


def test_classes_with_one_output(tmp_path: Path) -> None:
    """SegFormer#20: a regression of ints is an error of the model's own, in Trainer too, or trains as there."""
    rows = labelled(*torch.tensor([0, 2, 1, 2, 0]))
    trained: dict[type, Any] = {}
    for each, extra in ((Trainer, {}), (TrimmedTrainer, {"keep": 1.0})):
        model = classifier(num_labels=1)
        try:
            each(model=model, args=arguments(str(tmp_path), learning_rate=0.1), train_dataset=rows, **extra).train()
            trained[each] = model.state_dict()
        except (RuntimeError, ValueError) as error:
            trained[each] = type(error)
    first, second = trained[Trainer], trained[TrimmedTrainer]
    if isinstance(first, dict):
        torch.testing.assert_close(first, second)
    else:
        assert first is second


def test_segmentation_with_labels_larger_than_the_logits(tmp_path: Path) -> None:
    """SegFormer#20: labels larger than the logits, 255 left out."""
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16,
        num_labels=5, classifier_dropout_prob=0.0, hidden_dropout_prob=0.0, drop_path_rate=0.0,
    )  # fmt: skip
    labels = torch.randint(0, 5, (5, 32, 32)).masked_fill(torch.rand(5, 32, 32) < 0.2, 255)
    rows = [{"pixel_values": torch.randn(3, 64, 64), "labels": each} for each in labels]
    model = transformers.SegformerForSemanticSegmentation(config)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    assert_trained_as(model, rows, tmp_path)


class Weighted(nn.Module):
    """A head of one's own, of whatever loss."""

    def __init__(self, loss: Any, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.loss = nn.Embedding(32, 8), nn.Linear(8, outputs), loss

    def forward(self, input_ids: Tensor, attention_mask: Any = None, labels: Any = None) -> dict[str, Tensor]:
        logits = self.head(self.embed(input_ids).mean(1))
        return {"loss": self.loss(logits, labels, self), "logits": logits}


WEIGHTS = torch.tensor([0.1, 1.0, 20.0])


def in_place(out: Tensor, y: Tensor, _: Any) -> Tensor:
    loss = F.cross_entropy(out, y)
    loss += 0.4 * F.cross_entropy(out.flip(-1), y)
    return loss


@pytest.mark.parametrize(
    "loss",
    [
        lambda out, y, _: F.cross_entropy(out, y, weight=WEIGHTS),
        lambda out, y, _: F.cross_entropy(out, y, label_smoothing=0.2),
        lambda out, y, _: F.cross_entropy(out, y, reduction="sum") / len(y),
        lambda out, y, _: F.cross_entropy(out, y, reduction="none").mean(),
        lambda out, y, _: (F.cross_entropy(out, y, reduction="none") * WEIGHTS[y]).sum() / 7,
        lambda out, y, _: F.nll_loss(out.log_softmax(-1), y),
        lambda out, y, _: F.mse_loss(out, F.one_hot(y, 3).float()),
        lambda out, y, _: F.kl_div(out.log_softmax(-1), F.one_hot(y, 3).float(), reduction="batchmean"),
        lambda out, y, _: F.cross_entropy(out, y) + 0.4 * F.cross_entropy(out.flip(-1), y),
        in_place,  # it raised torch's "a leaf Variable that requires grad is being used in an in-place operation"
        lambda out, y, _: F.cross_entropy(out, y, reduction="none").mul_(WEIGHTS[y]).mean(),
        lambda out, y, _: F.cross_entropy(out, y) + F.cross_entropy(out, y, ignore_index=0),
        lambda out, y, _: F.cross_entropy(out, y, weight=WEIGHTS) + F.mse_loss(out, F.one_hot(y, 3).float()),
        lambda out, y, _: F.cross_entropy(out.repeat_interleave(2, 0).view(len(y), 2, 3)[:, 0], y),
    ],
)
def test_a_custom_loss_trains_as_in_the_plain_trainer(loss: Any, tmp_path: Path) -> None:
    assert_trained_as(Weighted(loss), labelled(*torch.tensor([0, 2, 1, 2, 0])), tmp_path)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda out, y, m: F.cross_entropy(out, y) + m.head.weight.square().mean(), "a further term"),
        (lambda out, y, m: F.cross_entropy(out, y) * 0 + m.head.weight.mean() * 0 + F.cross_entropy(out, y), "further"),
        (lambda out, y, _: out.logsumexp(-1).mean(), "no call of a loss function"),
        (lambda out, y, _: F.cross_entropy(out, y) + 1.0, "the sum of the losses found is"),
        (lambda out, y, _: F.cross_entropy(out, y) ** 2, "the sum of the losses found is"),
        (lambda out, y, _: F.cross_entropy(out @ out.t(), torch.arange(len(y))), "are not in the order"),
        (lambda out, y, _: F.cross_entropy(out.repeat(2, 1), y.repeat(2)), "cannot be told apart"),
        (lambda out, y, _: F.cross_entropy(out.flip(0), y.flip(0)), "are not in the order"),
        (lambda out, y, _: F.cross_entropy(out[y > 0], y[y > 0]), "cannot be told apart"),
    ],
)
def test_what_cannot_be_found_is_refused(loss: Any, reason: str, tmp_path: Path) -> None:
    """Auxiliary losses, contrastive losses, losses of only some samples: an error before anything is trained."""
    model = Weighted(loss)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(NotFound, match=rf"got Weighted: .*{reason}.* Pass per_sample_loss="):
        one_step(model, labelled(*torch.tensor([0, 2, 1, 2, 0])), tmp_path)
    torch.testing.assert_close(model.state_dict(), before)


def weighted_rows(n: int) -> list[dict[str, Any]]:
    draw = torch.Generator().manual_seed(3)
    return [{**row, "labels": torch.randint(0, 3, (), generator=draw)} for row in data("sequence", n)]


@pytest.mark.parametrize("batch", [1, 4, 7, 32])
def test_evaluation_with_class_weights(batch: int, tmp_path: Path) -> None:
    """pytorch#14184: the weighted mean over all of the data, whatever the batch size: it was 4.756 for 1.098."""
    rows, model = weighted_rows(19), new_model("sequence")
    criterion = per_sample(nn.CrossEntropyLoss(weight=WEIGHTS))
    trainer = TrimmedTrainer(
        model=model, args=arguments(str(tmp_path), per_device_eval_batch_size=batch), train_dataset=rows,
        eval_dataset=rows, keep=0.5, per_sample_loss=lambda outputs, labels: criterion(outputs.logits, labels),
    )  # fmt: skip
    together = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        logits = model.eval()(**{**together, "labels": None}).logits
    expected = F.cross_entropy(logits, together["labels"], weight=WEIGHTS).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(expected, rel=1e-5)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("kind", ["plain", "subclass", "remote"])
def test_evaluation_of_a_causal_model(kind: str, tmp_path: Path) -> None:
    rows, model = data("causal", 5), causal(kind)
    trainer = TrimmedTrainer(
        model=model, args=arguments(str(tmp_path)), train_dataset=rows, eval_dataset=rows, keep=0.5
    )  # fmt: skip
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    with torch.no_grad():
        expected = loss_of(model.eval()(**batch)).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_label_smoothing_is_the_trainers(tmp_path: Path) -> None:
    """label_smoothing_factor, for classes and for the tokens of a model that Trainer knows to be causal."""
    for task in ("sequence", "causal"):
        trained = []
        for each, extra in ((Trainer, {}), (TrimmedTrainer, {"keep": 1.0})):
            torch.manual_seed(0)
            args = arguments(str(tmp_path), label_smoothing_factor=0.3, learning_rate=0.1, max_steps=1, optim="sgd")
            model = new_model(task)
            model.config.loss_type = "ForCausalLM" if task == "causal" else None
            rows = data(task, 5)
            if task == "causal":
                for row in rows:  # Trainer takes the mean over its own number of items: nothing to leave out here
                    row["labels"] = row["input_ids"] = row["input_ids"].clamp(min=1)
                    row["attention_mask"] = torch.ones_like(row["input_ids"])
            trainer = each(model=model, args=args, train_dataset=rows, eval_dataset=rows, **extra)
            evaluated = trainer.evaluate()["eval_loss"]
            trainer.train()
            trained.append((evaluated, model.state_dict()))
        if task == "sequence":
            torch.testing.assert_close(trained[0], trained[1], rtol=1e-5, atol=1e-6)
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        out = new_model(task).eval()(**batch).logits
        out, y = (
            (out[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            if task == "causal"
            else (out, batch["labels"])
        )
        assert trained[1][0] == pytest.approx(F.cross_entropy(out, y, label_smoothing=0.3).item(), rel=1e-5)
    model = classifier(num_labels=1)
    with pytest.raises(NotFound, match="label smoothing applies to cross-entropy with classes"):
        one_step(model, labelled(*torch.randn(5)), tmp_path, label_smoothing_factor=0.1)


def test_nothing_is_left_behind(tmp_path: Path) -> None:
    """No patch outlives a call: the model's own loss and torch's functions are what they were."""
    before, model = F.cross_entropy, new_model("sequence")
    one_step(model, data("sequence", 5), tmp_path)
    batch = {name: torch.stack([row[name] for row in data("sequence", 5)]) for name in data("sequence", 1)[0]}
    assert F.cross_entropy is before
    assert model(**batch).loss.grad_fn is not None
    model(**batch).loss.backward()
    assert "forward" not in vars(model)
    assert math.isfinite(model(**batch).loss.item())


def test_a_later_batch_that_leaves_out_some_losses() -> None:
    """A model that gathers the masked tokens: placed by number on one batch, it must not be misplaced on the next."""

    def run(counted: Tensor) -> Any:
        logits = torch.randn(2, 4, 3, requires_grad=True)
        labels = torch.zeros(2, 4, dtype=torch.int64).masked_fill(~counted, -100)
        chosen = labels != -100

        def forward() -> Any:
            scaled = logits * 1
            return {"logits": scaled, "loss": F.cross_entropy(scaled[chosen], labels[chosen])}

        return finder(forward, loss_of, 2, labels_of({"labels": labels}))

    finder = LossFinder()
    run(torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(NotFound, match="cannot be told apart"):
        run(torch.tensor([[True, True, True, True], [True, False, False, False]]))


@pytest.mark.slow
def test_a_part_of_the_sweep() -> None:
    """No class of transformers gets another loss than its own; the whole is in records/2026-11-25-hf-losses."""
    study = importlib.import_module("studies.hf_losses")
    only = ["bert", "gpt2", "llama", "t5", "bart", "mixtral", "segformer", "beit", "vit", "hubert", "clip", "electra"]
    results = [study.judged(*case[1:]) for case in study.cases([], only)]
    assert not [each for each in results if each[0] == "different"]
    assert sum(each[0] == "equal" for each in results) > 50
