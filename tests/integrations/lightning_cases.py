"""A LightningModule for the tests. As ``lightning_cases.py RANK RANKS STORE FOLDER`` one rank under DDP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import batchtrim
from batchtrim.integrations.lightning import TrimmingCallback

BATCH, SAMPLES = 8, 32

# The marks of a module whose tests train small modules as users write them.
QUIET = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no:UserWarning"),
]


def data() -> TensorDataset:
    draw = torch.Generator().manual_seed(2)
    return TensorDataset(torch.randn(SAMPLES, 6, generator=draw), torch.randint(0, 3, (SAMPLES,), generator=draw))


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))


class Module(pl.LightningModule):
    def __init__(self, engine: str | None = None) -> None:
        super().__init__()
        self.model = new_model()
        self.engine = engine
        self.keeps: list[float] = []

    def on_train_start(self) -> None:
        if self.engine:
            self.step = batchtrim.TrimmedForward(self.model, nn.CrossEntropyLoss(), self.trim, self.engine)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        self.keeps.append(round(self.trim.keep, 6))
        if self.engine:
            return self.step(x, y)
        return self.trim(F.cross_entropy(self.model(x), y, reduction="none"))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plain(Module):
    """A module as found: it returns the mean."""

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.model(x), y)


class Loader(DataLoader[Any]):
    """Goes on where it was, as a resumable loader does; PyTorch's own starts again."""

    position = 0

    def __iter__(self) -> Any:
        skip, self.position = self.position, 0
        for number, batch in enumerate(super().__iter__()):
            if number >= skip:
                self.position = (number + 1) % len(self)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def loader() -> Loader:
    return Loader(data(), BATCH)


def trainer(folder: Path, callback: TrimmingCallback, **options: Any) -> pl.Trainer:
    defaults: dict[str, Any] = dict(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    return pl.Trainer(callbacks=[callback], **{**defaults, **options})


def on_a_rank(rank: int, ranks: int, folder: Path, scope: str, engine: str | None) -> None:
    """Under DDP. The sampler deals rows out in turn: a step sees as many successive rows in all."""
    module = Module(engine)
    callback = TrimmingCallback(0.3, scope=scope, select=batchtrim.hardest())
    fit = trainer(folder, callback, strategy="ddp", devices=ranks, max_epochs=2, use_distributed_sampler=False)
    fit.fit(module, DataLoader(data(), BATCH // ranks, sampler=DistributedSampler(data(), ranks, rank, shuffle=False)))
    torch.save(
        {"weights": module.model.state_dict(), "logged": {k: float(v) for k, v in fit.callback_metrics.items()}},
        folder / f"{scope}_{engine}_{rank}.pt",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each_scope, each_engine in (("global", None), ("global", "two_pass"), ("local", None)):
        on_a_rank(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[4]), each_scope, each_engine)
