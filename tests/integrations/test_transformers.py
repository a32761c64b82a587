"""TrimmedTrainer: gradients worked out by hand, padding, clock, logs, resuming."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from hf_cases import CASES, Gradient, Recording, arguments, check, data, new_model
from transformers import Trainer, TrainerCallback

import batchtrim
from batchtrim.integrations._labels import Counting, shares
from batchtrim.integrations.transformers import TrimmedTrainer
from launch import run_ranks
from tiers import few

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("settled")


STEPS = [(task, options, steps) for task, options in CASES for steps in (1, 4)]
# a trace takes seconds, and without accumulation the micro-batch is the window
QUICK = [case for case in STEPS if "engine" not in case[1] and (case[2] == 4 or case == STEPS[0])]


@pytest.mark.parametrize(("task", "options", "accumulation"), few(STEPS, QUICK))
def test_gradient_is_the_hand_computed_one(
    task: str, options: dict[str, Any], accumulation: int, tmp_path: Path
) -> None:
    check(task, accumulation, str(tmp_path), **options)


@pytest.mark.slow
def test_gradient_on_two_ranks(tmp_path: Path) -> None:
    run_ranks(HERE / "hf_cases.py", 2, tmp_path)


def test_padding_changes_nothing(tmp_path: Path) -> None:
    """The same batches with more padding: the same step."""
    weights = []
    for extra in (0, 4):
        rows = data("causal", 20)
        for row in rows:
            for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
                row[name] = F.pad(row[name], (0, extra), value=value)
        args = arguments(str(tmp_path), learning_rate=0.1, max_steps=3, optim="sgd")
        trainer = TrimmedTrainer(
            model=new_model("causal"), args=args, train_dataset=rows, keep=0.3, trim_options={"unit": "element"}
        )
        trainer.train()
        weights.append(trainer.model.state_dict())  # type: ignore[union-attr]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-4, atol=1e-6)


class Watch(TrainerCallback):
    """The keep fraction each step ran with."""

    def __init__(self) -> None:
        self.keeps: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        assert self.trainer.trim is not None
        self.keeps.append(round(self.trainer.trim.keep, 6))

    trainer: TrimmedTrainer


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_steps": 5}, [1.0, 0.8, 0.6, 0.4, 0.2]),
        ({"max_steps": -1, "num_train_epochs": 3}, [1.0, 1.0, 0.6, 0.6, 0.2, 0.2]),
        ({"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}, [1.0, 0.6, 0.2]),
    ],
)
@pytest.mark.parametrize("over", ["micro", "window"])
def test_keep_follows_the_clock(options: dict[str, Any], expected: list[float], over: str, tmp_path: Path) -> None:
    watch = Watch()
    args = arguments(str(tmp_path), **options)
    watch.trainer = TrimmedTrainer(
        model=new_model("sequence"), args=args, train_dataset=data("sequence", 10), callbacks=[watch], over=over
    )
    watch.trainer.train()
    assert watch.keeps == expected


def test_logs_are_of_the_kept_and_of_all_samples(tmp_path: Path) -> None:
    trainer = Recording(
        model=new_model("sequence"), args=arguments(str(tmp_path)), train_dataset=data("sequence", 5), keep=0.4
    )
    model = copy.deepcopy(new_model("sequence"))
    trainer.train()
    batch = trainer.seen[0]
    losses = F.cross_entropy(model(**{**batch, "labels": None}).logits, batch["labels"], reduction="none")
    kept = losses.topk(2).values
    found = trainer.state.log_history[0]
    assert found["trim/kept"] == 2
    for name, value in {
        "trim/threshold": kept.min(), "trim/kept_loss": kept.mean(), "trim/mean_loss": losses.mean(),
        "trim/ratio": kept.mean() / losses.mean(), "loss": kept.mean(),
    }.items():  # fmt: skip
        assert found[name] == pytest.approx(value.item(), rel=1e-5), name


def test_evaluation_is_the_plain_mean(tmp_path: Path) -> None:
    rows = data("causal", 5)
    trainer = TrimmedTrainer(
        model=new_model("causal"), args=arguments(str(tmp_path)), train_dataset=rows, eval_dataset=rows, keep=0.2
    )
    trainer.train()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    labels = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        plain = trainer.model.eval()(**{**batch, "labels": labels}).loss.item()  # type: ignore[union-attr]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-5)
    assert trainer.trim is not None
    assert trainer.trim.stats.compute()["batches"] == 0, "evaluation is not counted"


@pytest.mark.parametrize("over", ["micro", "window"])
def test_resuming_equals_an_uninterrupted_run(over: str, tmp_path: Path) -> None:
    """With dropout, a rule that draws, and a checkpoint in the middle of an epoch."""

    def trainer(folder: str, **options: Any) -> TrimmedTrainer:
        args = arguments(
            str(tmp_path / folder), max_steps=-1, num_train_epochs=2, learning_rate=0.01, save_strategy="steps",
            save_steps=4, gradient_accumulation_steps=2, per_device_train_batch_size=3, **options,
        )  # fmt: skip
        return TrimmedTrainer(
            model=new_model("sequence", dropout=0.2), args=args, train_dataset=data("sequence", 18), over=over,
            keep=batchtrim.linear(0.8, 0.3), trim_options={"select": batchtrim.percentile_topk()},
        )  # fmt: skip

    whole = trainer("whole")
    whole.train()
    assert whole.state.global_step == 6
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, tensor in whole.model.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(resumed.model.state_dict()[name], tensor), name  # type: ignore[union-attr]
    assert whole.trim is not None
    assert resumed.trim is not None
    assert torch.equal(whole.trim.generator.get_state(), resumed.trim.generator.get_state())


def test_a_window_without_labels_changes_nothing(tmp_path: Path) -> None:
    """Nothing to choose from is a loss of 0, not of 0 / 0."""
    for over in ("micro", "window"):
        weights = shares(torch.zeros(2, dtype=torch.int64), over, "local", True)
        assert [weight.item() for weight in weights] == [0.0, 0.0]
    rows = data("token", 4)
    for row in rows:
        row["labels"] = torch.full_like(row["labels"], -100)
    args = arguments(str(tmp_path), learning_rate=0.1, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    for unit, over in (("sample", "micro"), ("element", "window")):
        trainer = TrimmedTrainer(
            model=new_model("token"), args=args, train_dataset=rows, keep=0.5, over=over, trim_options={"unit": unit}
        )
        trainer.train()
        for name, tensor in new_model("token").state_dict().items():
            assert torch.equal(trainer.model.state_dict()[name], tensor), name  # type: ignore[union-attr]


def test_scores_and_trains_in_bf16(tmp_path: Path) -> None:
    """Autocast in the scoring pass as in training: near the gradient in fp32, at accumulation 2."""
    found = []
    for bf16 in (False, True):
        gradient = Gradient()
        args = arguments(str(tmp_path), bf16=bf16, gradient_accumulation_steps=2)
        model, rows = new_model("causal"), data("causal", 10)
        TrimmedTrainer(
            model=model, args=args, train_dataset=rows, keep=0.9, over="window", callbacks=[gradient]
        ).train()
        found.append(gradient.value)
    assert not torch.equal(*found)
    assert F.cosine_similarity(*found, dim=0) > 0.999
    torch.testing.assert_close(found[1].norm(), found[0].norm(), rtol=0.02, atol=0.0)


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch


@pytest.mark.parametrize("over", ["micro", "window"])
def test_keeping_everything_is_the_plain_trainer(over: str, tmp_path: Path) -> None:
    """With dropout: a window's two passes draw what the plain Trainer's one pass draws."""
    args = arguments(str(tmp_path), max_steps=3, learning_rate=0.1, gradient_accumulation_steps=2, optim="sgd")
    model, rows = new_model("sequence", dropout=0.3), data("sequence", 30)
    # normalised as the Trainer's documentation asks: left to the model, this one's loss is not divided by the window
    plain = Trainer(model=copy.deepcopy(model), args=args, train_dataset=rows, compute_loss_func=summed)
    trimmed = TrimmedTrainer(
        model=copy.deepcopy(model), args=args, train_dataset=rows, keep=1.0, over=over, trim_options={"unit": "element"}
    )
    for trainer in (plain, trimmed):
        torch.manual_seed(0)
        trainer.train()
    for name, tensor in plain.model.state_dict().items():  # type: ignore[union-attr]
        torch.testing.assert_close(trimmed.model.state_dict()[name], tensor, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


def test_a_checkpoint_without_a_trimmer_warns(tmp_path: Path) -> None:
    def trainer() -> TrimmedTrainer:
        args = arguments(str(tmp_path), max_steps=2, save_strategy="steps", save_steps=1)
        return TrimmedTrainer(model=new_model("sequence"), args=args, train_dataset=data("sequence", 10))

    trainer().train()
    (tmp_path / "checkpoint-1" / "trimmer_0.pt").unlink()
    with pytest.warns(UserWarning, match=r"trimmer_0.pt is missing: the clock is restored"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_static_graph_of_several_ranks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP took the gradient that finds the losses for its first backward, and averaged none over the ranks."""
    args, model = arguments(str(tmp_path)), new_model("sequence")
    args.ddp_static_graph = True
    TrimmedTrainer(model=model, args=args)
    monkeypatch.setattr(type(args), "world_size", 2)
    TrimmedTrainer(model=model, args=args, per_sample_loss=summed)
    with pytest.raises(ValueError, match="expected `args` without ddp_static_graph"):
        TrimmedTrainer(model=model, args=args)


def test_what_is_refused(tmp_path: Path) -> None:
    model, rows = new_model("sequence"), data("sequence", 5)
    with pytest.raises(ValueError, match="expected `per_sample_loss` in place of `compute_loss_func`, got"):
        TrimmedTrainer(model=model, args=arguments(str(tmp_path)), train_dataset=rows, compute_loss_func=summed)
    with pytest.raises(ValueError, match="expected `over` 'micro' with an engine"):
        TrimmedTrainer(model=model, args=arguments(str(tmp_path)), over="window", engine="exact")
    with pytest.raises(ValueError, match="expected `engine` to be one of"):
        TrimmedTrainer(model=model, args=arguments(str(tmp_path)), engine="fast")
    with pytest.raises(ValueError, match="expected `unit` 'sample' with a `keep_log`"):
        TrimmedTrainer(
            model=model, args=arguments(str(tmp_path)), keep_log=batchtrim.KeepLog(5), trim_options={"unit": "element"}
        )
    with pytest.raises(TypeError, match="expected `select` among `trim_options`, got it by itself"):
        TrimmedTrainer(model=model, args=arguments(str(tmp_path)), select=batchtrim.loss_mass())
    with pytest.raises(TypeError, match=r"`per_sample_loss` .*Give an instance: nn\.CrossEntropyLoss\(\)"):
        TrimmedTrainer(model=model, args=arguments(str(tmp_path)), per_sample_loss=torch.nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match="expected `over` to be one of"):
        TrimmedTrainer(model=model, args=arguments(str(tmp_path)), over="batch")
    with pytest.raises(ValueError, match="A trainer does not know the training accuracy"):
        TrimmedTrainer(model=model, args=arguments(str(tmp_path)), keep=batchtrim.by_accuracy({0.0: 1.0, 0.8: 0.5}))
    with pytest.raises(ValueError, match="expected batches with a tensor `labels`"):
        Counting()({"input_ids": [0.0, 0.0]})


def test_counts_the_labels_that_are_not_ignored() -> None:
    labels = torch.tensor([0, -100, 2, 1])
    assert Counting(-100)({"labels": labels}) == 3
    assert Counting()({"labels": labels}) == 4
    tokens = torch.tensor([[1, -100, -100], [1, 2, -100]])
    assert Counting(-100, shift=1)({"labels": tokens}) == 1
    assert Counting(-100)({"labels": tokens}) == 3
    assert Counting(-100, entries=False)({"labels": tokens}) == 2
    assert Counting()({"start_positions": torch.zeros(3), "labels_of_mine": tokens}) == 3
