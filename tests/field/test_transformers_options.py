"""Options of Hugging Face's Trainer as its users combine them: trained as Trainer trains, or refused."""

from __future__ import annotations

import copy
import itertools
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
from transformers import Trainer

import batchtrim
from batchtrim.integrations._recorder import NotFound
from batchtrim.integrations.transformers import TrimmedTrainer
from tiers import few

pytestmark = [pytest.mark.usefixtures("settled"), pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")]


# renamed within transformers 5
CHECKPOINTING = next(
    {name: True}
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(transformers.TrainingArguments, name)
)


class Dividing(Trainer):
    """Divides by the micro-batches of a window, as BERT, which takes the number of items and leaves it, needs."""

    loss_is_scaled_for_ga = False

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False  # the same, for transformers 5.0


class LowRank(nn.Module):
    """LoRA by hand: a frozen layer and two thin ones beside it."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def low_rank() -> Any:
    model: Any = new_model("sequence").requires_grad_(False)
    attention = model.bert.encoder.layer[0].attention.self
    attention.query, attention.value = LowRank(attention.query), LowRank(attention.value)
    model.classifier.requires_grad_(True)
    return model


def tuples() -> Any:
    model = new_model("sequence")
    model.config.return_dict = False
    return model


def ignored() -> list[dict[str, Any]]:
    """Of every third sample no label counts."""
    rows = data("token", 40)
    return [
        {**row, "labels": torch.full_like(row["labels"], -100)} if n % 3 == 0 else row for n, row in enumerate(rows)
    ]


def named(length: bool) -> list[dict[str, Any]]:
    return [{**row, "length": int(row["attention_mask"].sum()), "text": "?"} for row in data("sequence", 40)]


def train(each: Any, model: Any, rows: Any, folder: Path, **options: Any) -> Any:
    torch.manual_seed(0)
    names = ("keep", "engine", "trim_options", "per_sample_loss", "over")
    own = {name: options.pop(name) for name in names if name in options}
    args = arguments(
        str(folder),
        **{**dict(learning_rate=0.1, max_steps=3, optim="sgd", per_device_train_batch_size=8), **options},
    )
    trainer = each(model=model, args=args, train_dataset=rows, **own)
    trainer.train()
    return trainer


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "bf16": (lambda: new_model("sequence"), lambda: data("sequence", 40), {"bf16": True}),
    "checkpointing": (lambda: new_model("sequence"), lambda: data("sequence", 40), CHECKPOINTING),
    "noise in the embeddings": (
        lambda: new_model("sequence"), lambda: data("sequence", 40), {"neftune_noise_alpha": 5.0}
    ),
    "by length, further columns": (
        lambda: new_model("sequence"), lambda: named(True), {"train_sampling_strategy": "group_by_length"}
    ),
    "tuples": (tuples, lambda: data("sequence", 40), {}),
    "low rank": (low_rank, lambda: data("sequence", 40), {}),
    "samples without labels": (lambda: new_model("token"), ignored, {}),
    "accumulation": (lambda: new_model("sequence"), lambda: data("sequence", 40), {"gradient_accumulation_steps": 2}),
    "an incomplete window": (
        lambda: new_model("sequence"), lambda: data("sequence", 24),
        {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_everything_kept_trains_as_the_trainer(case: str, tmp_path: Path) -> None:
    make, rows, options = CASES[case]
    plain = train(Dividing, make(), rows(), tmp_path, **options)
    trimmed = train(TrimmedTrainer, make(), rows(), tmp_path, keep=1.0, **options)
    torch.testing.assert_close(trimmed.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-6)


SHARED = ("bf16", "checkpointing", "noise in the embeddings", "tuples", "low rank")


@pytest.mark.parametrize("case", few(SHARED, []))
def test_the_shared_engine_trains_as_the_plain_graph(case: str, tmp_path: Path) -> None:
    """By default test_transformers_engine.py trains a causal model under the shared engine."""
    make, rows, options = CASES[case]
    plain = train(TrimmedTrainer, make(), rows(), tmp_path, keep=0.4, **options)
    shared = train(TrimmedTrainer, make(), rows(), tmp_path, keep=0.4, engine="shared", **options)
    assert shared.losses._step.last.engine == "shared"
    near = 2e-3 if case == "bf16" else 1e-6
    torch.testing.assert_close(shared.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=near)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
}


@pytest.mark.parametrize(("task", "setting"), few(itertools.product(["causal", "token"], SETTINGS), []))
def test_kept_tokens_under_the_shared_engine(task: str, setting: str, tmp_path: Path) -> None:
    """It was refused: the trace took the sizes of the labels for others than those of the tokens.

    By default test_gradient_is_the_hand_computed_one (integrations/test_transformers.py) has a case of it.
    """
    unit = {"unit": "element"}
    options = SETTINGS[setting]
    found = []
    for engine in (None, "shared"):
        trainer = train(
            TrimmedTrainer,
            new_model(task),
            data(task, 64),
            tmp_path,
            keep=0.4,
            engine=engine,
            trim_options=unit,
            **options,
        )
        found.append(trainer.model.state_dict())
    assert trainer.losses._step.last.engine == "shared"
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-3 if "bf16" in options else 1e-6)


@pytest.mark.parametrize("scaled", [None, True, False])
def test_a_term_added_in_compute_loss_is_averaged_over_the_window(scaled: bool | None, tmp_path: Path) -> None:
    """It counted once for every micro-batch; and what ``loss_is_scaled_for_ga`` says is of the Trainer's own loss."""

    def with_term(base: Any) -> Any:
        class Mine(base):
            def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **extra: Any) -> Any:
                loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **extra)
                loss = loss + 0.1 * model.classifier.weight.square().sum()
                return (loss, outputs) if return_outputs else loss

        return Mine

    trimmed = with_term(TrimmedTrainer)
    if scaled is not None:
        trimmed.loss_is_scaled_for_ga = scaled
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    rows = data("sequence", 48)
    plain = train(with_term(Dividing), new_model("sequence"), rows, tmp_path, **options)
    found = train(trimmed, new_model("sequence"), rows, tmp_path, keep=1.0, **options)
    torch.testing.assert_close(found.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-6)
    assert found.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-4)


def of_classes(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0] if isinstance(outputs, tuple) else outputs.logits, labels, reduction="none")


def test_predictions_of_a_model_that_returns_a_tuple(tmp_path: Path) -> None:
    """With a function of one's own the logits were taken for the loss: there were no predictions."""
    rows, found = data("sequence", 10), []
    for model in (new_model("sequence"), tuples()):
        trainer = TrimmedTrainer(
            model=model, args=arguments(str(tmp_path)), train_dataset=rows, keep=0.5, per_sample_loss=of_classes
        )
        found.append(trainer.predict(rows))  # type: ignore[arg-type]
    assert found[1].predictions.shape == (10, 3)
    torch.testing.assert_close(*(torch.as_tensor(each.predictions) for each in found))
    assert found[1].metrics["test_loss"] == pytest.approx(found[0].metrics["test_loss"])


@pytest.mark.parametrize("own", [None, of_classes])
def test_predictions_without_labels(own: Any, tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in data("sequence", 10)]
    trainer = TrimmedTrainer(
        model=new_model("sequence"), args=arguments(str(tmp_path)), train_dataset=rows, keep=0.5, per_sample_loss=own
    )
    found = trainer.predict(rows)  # type: ignore[arg-type]
    assert found.predictions.shape == (10, 3)
    assert found.label_ids is None


def test_label_smoothing_with_a_custom_function_is_refused(tmp_path: Path) -> None:
    """It was left out without a word."""
    with pytest.raises(ValueError, match=r"expected `label_smoothing_factor` 0 with a `per_sample_loss`, got 0.1"):
        TrimmedTrainer(
            model=new_model("sequence"), args=arguments(str(tmp_path), label_smoothing_factor=0.1), keep=0.5,
            per_sample_loss=of_classes,
        )  # fmt: skip


def flat_tokens(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="none")


def tokens_by_sample(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs.logits.transpose(1, 2), labels, reduction="none")


@pytest.mark.parametrize(
    ("own", "unit", "said"),
    [
        (flat_tokens, "sample", r"whose first dimension is the batch, 8 samples, got shape \(72,\)"),
        (flat_tokens, "element", r"to mask the losses of labels that are -100"),
        (tokens_by_sample, "sample", r"to mask the losses of labels that are -100"),
        (tokens_by_sample, "element", r"to mask the losses of labels that are -100"),
    ],
)
def test_losses_of_tokens_say_what_they_are_of(own: Any, unit: str, said: str, tmp_path: Path) -> None:
    """Tokens passed for samples, and padding for tokens with a loss of 0, without a word."""
    with pytest.raises(ValueError, match=said + r".*batchtrim\.token_losses"):
        train(
            TrimmedTrainer, new_model("token"), data("token", 40), tmp_path, keep=0.4, per_sample_loss=own,
            trim_options={"unit": unit},
        )  # fmt: skip


def test_losses_of_tokens_with_their_mask(tmp_path: Path) -> None:
    """As the message says to write it: trained as by the model's own loss."""
    found = []
    for own in (None, lambda outputs, labels: batchtrim.token_losses(outputs.logits, labels)):
        trainer = train(TrimmedTrainer, new_model("token"), data("token", 40), tmp_path, keep=0.4, per_sample_loss=own)
        found.append(trainer.model.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)


def mixture() -> tuple[Any, Any]:
    small: dict[str, Any] = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, output_router_logits=True, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**small)), data("causal", 16)


def speech(reduction: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    small: dict[str, Any] = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2), num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, mask_time_prob=0.0, hidden_dropout=0.0,
        attention_dropout=0.0, activation_dropout=0.0, final_dropout=0.0, feat_proj_dropout=0.0, layerdrop=0.0,
        ctc_loss_reduction=reduction,
    )  # fmt: skip
    rows = [{"input_values": torch.randn(400), "labels": torch.randint(1, 9, (4,))} for _ in range(24)]
    for number, row in enumerate(rows):
        row["labels"][4 - number % 3 :] = -100
    return transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**small)), rows


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_speech_model_with_ctc(reduction: str, tmp_path: Path) -> None:
    """It was refused. Everything kept is as the Trainer trains, and each sample's loss is that of its own alone."""
    plain = train(Trainer, *speech(reduction), tmp_path, learning_rate=0.01)
    model, rows = speech(reduction)
    trimmed = train(TrimmedTrainer, model, rows, tmp_path, keep=1.0, learning_rate=0.01)
    torch.testing.assert_close(trimmed.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-6)
    model, rows = speech(reduction)
    batch = {name: torch.stack([row[name] for row in rows[:4]]) for name in rows[0]}
    found = trimmed.losses.model_losses.find(model.train(), batch).losses.values
    alone = torch.stack([model(**{name: value[n : n + 1] for name, value in batch.items()}).loss for n in range(4)])
    torch.testing.assert_close(found, alone * (4 if reduction == "sum" else 1), rtol=1e-4, atol=1e-5)


def contrastive() -> tuple[Any, Any]:
    text: dict[str, Any] = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    vision: dict[str, Any] = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    rows = [{**row, "pixel_values": torch.randn(3, 8, 8)} for row in data("causal", 16)]
    return Paired(transformers.CLIPModel(config)), rows


class Paired(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor, labels: Any = None) -> Any:
        return self.model(input_ids, pixel_values, attention_mask, return_loss=True)


@pytest.mark.parametrize("engine", [None, "auto"])
@pytest.mark.parametrize("make", [mixture, contrastive])
def test_a_loss_that_is_not_a_mean_over_samples_is_refused(make: Any, engine: str | None, tmp_path: Path) -> None:
    """A router's balance, samples against one another: before anything is trained."""
    torch.manual_seed(0)
    model, rows = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((NotFound, ValueError), match="expected"):
        train(TrimmedTrainer, model, rows, tmp_path, keep=0.5, engine=engine)
    torch.testing.assert_close(model.state_dict(), before)


def test_a_resume_length_is_checked_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected `resume_length` to be one of 'stretch', 'saved', got 'strech'"):
        TrimmedTrainer(model=new_model("sequence"), args=arguments(str(tmp_path)), resume_length="strech")


def of_classes_twice(outputs: Any, labels: Tensor) -> batchtrim.Losses:
    weighted = batchtrim.per_sample(nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])))
    return weighted(outputs.logits, labels) + batchtrim.per_sample(nn.CrossEntropyLoss())(outputs.logits, labels)


@pytest.mark.parametrize("engine", [None, "exact"])
def test_micro_batches_have_no_weight_for_a_sum_of_terms(engine: str | None, tmp_path: Path) -> None:
    """Weighted by one count for all terms, weights after a step were off by up to 0.06."""
    options = {"keep": 0.5, "per_sample_loss": of_classes_twice, "engine": engine}
    train(TrimmedTrainer, new_model("sequence"), data("sequence", 10), tmp_path, **options)
    with pytest.raises(ValueError, match="under gradient accumulation, got a sum of 2 terms that count differently"):
        train(
            TrimmedTrainer, new_model("sequence"), data("sequence", 10), tmp_path, **options,
            gradient_accumulation_steps=2,
        )  # fmt: skip
