"""Lightning: add a callback, and call self.trim in place of the mean. An engine in training_step saves time as well."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import batchtrim  # +
from _data import command_line, digits
from batchtrim.integrations.lightning import TrimmingCallback  # +


class Digits(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, y = batch
        return self.trim(F.cross_entropy(self.model(x), y, reduction="none"))  # was: F.cross_entropy(self.model(x), y)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=3e-3)


class FasterDigits(Digits):
    """The same step with an engine, which runs backward on the kept rows only."""

    def on_train_start(self) -> None:
        self.step = batchtrim.TrimmedForward(self.model, nn.CrossEntropyLoss(), self.trim)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.step(*batch)


def main(epochs: int = 10, module: type[Digits] = Digits) -> float:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=[TrimmingCallback(batchtrim.linear(1.0, 0.2))],  # +
        accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module(), DataLoader(digits(), 64, shuffle=True), DataLoader(digits(train=False), 512))
    metrics = {name: round(value.item(), 3) for name, value in trainer.callback_metrics.items()}
    print(metrics)
    return metrics["accuracy"]


if __name__ == "__main__":
    command_line(main)
