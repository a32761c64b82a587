"""One run on several processes: this rank under ``torchrun``, its part of a batch, sums over all ranks.

Start it with ``torchrun --nproc-per-node 2 -m batchtrim.lab.cli train ...``. Every process draws the same order and
augmentation, and works on its own part of each batch; DistributedDataParallel averages the gradients. What dropout and
random methods draw depends on the part, so a checkpoint holds it for every process.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from batchtrim._checks import import_extra
from batchtrim.lab.methods.table import find_method
from batchtrim.lab.run.config import RunConfig


@dataclass(frozen=True)
class Ranks:
    """This process's place: ``rank`` of ``world``, ``local`` of them on this machine."""

    rank: int = 0
    world: int = 1
    local: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """Return the ranks as ``torchrun`` sets them, or one rank alone.

        Raises:
            ValueError: the environment holds a part of them: this process would wait for others for ever.
        """
        world = _number("WORLD_SIZE", "1")
        if world <= 1:
            return cls()
        return cls(_number("RANK"), world, _number("LOCAL_WORLD_SIZE"))

    @property
    def share(self) -> slice:
        """This process's entries of a batch: every ``world``-th, so that shares differ by at most one."""
        return slice(self.rank, None, self.world)

    def sum(self, *numbers: float, device: torch.device) -> list[float]:
        """Return each number summed over all processes."""
        if self.world == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def agree(self, decision: bool, device: torch.device) -> bool:
        """Return the first process's decision, in all of them."""
        return bool(self.sum(float(decision and self.rank == 0), device=device)[0])

    def gather(self, mine: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what each process passes, by rank."""
        found: list[Any] = [mine] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(found, mine)
        return found

    def fabric(self, config: RunConfig) -> Any:
        """Return the Lightning Fabric, joined to all processes, that places the run's model and runs its backward."""
        fabric = import_extra("lightning_fabric", "lab", "the training loop")
        if self.world == 1:
            return fabric.Fabric(accelerator=config.device, devices=1, precision=config.precision)
        if config.engine != "exact" or not find_method(config.method).any_engine:
            raise ValueError(
                f"expected a method that chooses within a batch, with engine 'exact', under torchrun, "
                f"got '{config.method}' with '{config.engine}'. Others need the whole run in one process."
            )
        launched = fabric.Fabric(
            accelerator=config.device,
            devices=self.local,
            num_nodes=self.world // self.local,
            strategy="ddp",
            precision=config.precision,
        )
        launched.launch()
        return launched

    def leave(self) -> None:
        """Leave the process group; the next run joins one again."""
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def batches(self, rows: Tensor, size: int) -> list[Tensor]:
        """Split ``rows`` into batches; drop a last one with fewer rows than processes, since each needs a row."""
        return [batch for batch in rows.split(size) if len(batch) >= self.world]


def _number(name: str, default: str | None = None) -> int:
    """Return a number that ``torchrun`` puts into the environment."""
    text = os.environ.get(name, default)
    if text is None or not text.strip().isdecimal():
        raise ValueError(
            f"expected {name} to be a number, as torchrun sets it for a run on several processes, got "
            f"{'nothing' if text is None else repr(text)}. For a run on one, unset WORLD_SIZE."
        )
    return int(text)
