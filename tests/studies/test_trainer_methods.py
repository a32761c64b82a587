"""Each method of the lab gives the same result in the Hugging Face Trainer as in the lab's own loop."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

pytest.importorskip("transformers")
from accelerate.data_loader import SeedableRandomSampler
from studies.trainer_methods import count_samples, make_trainer
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from batchtrim.lab.methods.table import METHODS
from batchtrim.lab.run import loading
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.run.loop import Training
from studies import text_runs
from tiers import few

SMALL = RunConfig(
    dataset="digits", model="mlp", width=64, optimizer="sgd", lr=0.3, momentum=0.0, weight_decay=0.0, epochs=7,
    batch_size=8, train_size=60, seed=3, device="cpu",
)  # fmt: skip
# by default a rule through TrimmedTrainer, a hook that weighs samples, and one with a second network
DEFAULT = ("ordered_sgd", "infobatch", "proxy")
WHOLE = ("full", "focal", "superloss", "rho_loss", "proxy")  # all samples, or two networks more
PARAMS = {"ohem": {"min_keep": 2}, "small_loss": {"ramp_epochs": 2}, "loss_drop": {"drop": 0.3}, "proxy": {"every": 2}}


class Classifier(nn.Module):
    """A network of the lab as a Hugging Face classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, labels: Tensor | None = None) -> SequenceClassifierOutput:
        logits = self.network(x)
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]


def lab_order(sampler: Any) -> Iterator[int]:
    """Give the rows in the order of the lab's loop."""
    if not hasattr(sampler, "order"):
        sampler.order = Generator().manual_seed(sampler.initial_seed)
    yield from torch.randperm(len(sampler.data_source), generator=sampler.order).tolist()


def trained_by_both(name: str, out: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Training, Any, Tensor]:
    """Return the lab's training and a finished Trainer, of one network on the same 60 digits, and the lab's losses."""
    monkeypatch.setattr(SeedableRandomSampler, "__iter__", lab_order)
    config = dataclasses.replace(SMALL, method=name, method_params=PARAMS.get(name, {})).resolved()
    lab = Training(config, loading.load_images(config))
    method = Training(config, lab.images).method  # another one, as the lab's own makes it
    torch.manual_seed(config.seed)
    model = Classifier(lab._network(config.width))
    lab.prepare()
    losses, before = [], lab._loss
    monkeypatch.setattr(lab, "_loss", lambda *args: losses.append(loss := before(*args)) or loss)
    while lab.epoch < lab.epochs:
        lab.train_epoch()
    inputs = lab.batches(torch.arange(len(lab.labels)))
    rows = [{"x": x, "labels": label} for x, label in zip(inputs, lab.labels, strict=True)]
    arguments = TrainingArguments(
        str(out), per_device_train_batch_size=8, learning_rate=0.3, lr_scheduler_type="cosine", seed=3, optim="sgd",
        max_grad_norm=0.0, report_to=[], save_strategy="no", logging_steps=10**9, disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = make_trainer(
        method, name == "full", lambda width: Classifier(lab._network(width)), 64, model=model, args=arguments,
        train_dataset=rows,
    )  # fmt: skip
    trainer.train()
    return lab, trainer, torch.stack(losses)


@pytest.mark.parametrize("name", few(METHODS, default=DEFAULT))
def test_a_method_ends_where_the_labs_loop_ends(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab, trainer, losses = trained_by_both(name, tmp_path, monkeypatch)
    assert (lab.counts.samples_forward, lab.counts.samples_backward) == count_samples(trainer)
    assert (lab.counts.samples_backward < 60 * 7) == (name not in WHOLE)  # what is compared has left something out
    assert lab.counts.steps == trainer.state.global_step
    for name_, value in lab.model.state_dict().items():
        torch.testing.assert_close(trainer.model.network.state_dict()[name_], value, rtol=1e-4, atol=1e-6)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('methods = ["full", "infobach"]', "expected `method` to be one of full, .*got 'infobach'. Did you mean"),
        ("", "expected settings methods, .*, got none called methods."),
        ("methods = [", "to be TOML, got a mistake in it"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line(
    change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "config.toml"
    given = (Path(__file__).parents[2] / "records/2026-11-24-trec/config.toml").read_text()
    settings.write_text("\n".join(line for line in given.splitlines() if "methods" not in line) + "\n" + change)
    (tmp_path / "trec").mkdir()
    words = ["text_runs", str(settings), "--out", str(tmp_path / "out"), "--data-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        text_runs.main()
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])
    assert not (tmp_path / "out").exists()
