"""Record and restore torch's generators of random numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["TorchGenerators"]


class TorchGenerators:
    """The state of torch's default generators: that of the CPU, and those of the CUDA devices among ``devices``."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.cpu = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in set(devices) if device.type == "cuda"}

    def restore(self) -> None:
        """Set the generators to the recorded state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)

    def same(self, other: TorchGenerators) -> bool:
        """Return True if nothing was drawn between the two, as far as both recorded a device."""
        both = self.cuda.keys() & other.cuda.keys()
        return torch.equal(self.cpu, other.cpu) and all(torch.equal(self.cuda[d], other.cuda[d]) for d in both)
