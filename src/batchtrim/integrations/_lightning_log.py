"""Write what was kept to Lightning's loggers, and to the callbacks that monitor it."""

from __future__ import annotations

from typing import Any

import torch

from batchtrim.integrations import log_values, summed
from batchtrim.trimmer import Trimmer

__all__ = ["LightningLog"]


class LightningLog:
    """The values of a trimmer's statistics: since they were last logged, and at the end of an epoch those of all of it.

    Args:
        wanted: False logs nothing.

    Attributes:
        logged: statistics of this epoch that are logged already, for a checkpoint; None if there are none.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.logged: dict[str, Any] | None = None
        self._at = 0

    def start(self, trainer: Any) -> None:
        """Begin a training."""
        self.logged, self._at = None, trainer.global_step

    def after_batch(self, trim: Trimmer | None, trainer: Any, module: Any, name: str) -> None:
        """Log every ``log_every_n_steps``; ``name`` stands before the slash in the names of the values."""
        every: int = trainer.log_every_n_steps
        if every and trainer.global_step - self._at >= every:
            self._log(trim, trainer, module, name)

    def end_epoch(self, trim: Trimmer | None, trainer: Any, module: Any, name: str) -> None:
        """Log the rest of an epoch, and leave the values of all of it in ``callback_metrics``."""
        self._log(trim, trainer, module, name)
        if trim is not None and self.logged is not None:
            trim.stats.load_state_dict(self.logged)
            self.logged = None
            self._values(trim, trainer, module, name)

    def _log(self, trim: Trimmer | None, trainer: Any, module: Any, name: str) -> None:
        self._at = trainer.global_step
        if not self.wanted or trim is None:
            return
        part = trim.stats.state_dict()
        self.logged = part if self.logged is None else summed(self.logged, part)
        values = self._values(trim, trainer, module, name)
        for logger in trainer.loggers if values else ():
            logger.log_metrics(values, step=trainer.global_step)

    def _values(self, trim: Trimmer, trainer: Any, module: Any, name: str) -> dict[str, float]:
        """Return the values since the statistics were last reset, averaged over ranks; reset them."""
        strategy, device = trainer.strategy, module.device
        values = log_values(trim, lambda numbers: strategy.reduce(numbers.to(device), reduce_op="mean"))
        values = {key.replace("trim/", f"{name}/", 1): value for key, value in values.items()}
        trainer.callback_metrics.update({key: torch.tensor(value, device="cpu") for key, value in values.items()})
        return values
