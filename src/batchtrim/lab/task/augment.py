"""Make batches from an image tensor: gather, crop, flip and normalise whole batches by tensor indexing.

N images, B batch, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from batchtrim.lab.task.names import AUGMENTS


class Batches:
    """Turns row numbers into network input: float32 (B, C, H, W), normalised per channel.

    Crop: each image is padded with black by an eighth of its side (4 pixels at 28 or 32) and cut back to its size
    at its own random offset. Flip: each image is mirrored with probability one half. All draws come from one
    generator, whose state is this object's whole state.

    Args:
        images: uint8 (N, C, H, W).
        mean: per channel, in [0, 255]; ``std`` likewise.
        augment: one of ``AUGMENTS``.
        seed: of the random numbers.
        device: holds the images and the batches.
    """

    def __init__(
        self,
        images: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augment: str = "none",
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        if augment not in AUGMENTS:
            raise ValueError(f"expected `augment` to be one of {', '.join(AUGMENTS)}, got {augment!r}.")
        self.device = torch.device(device)
        self.flip = "flip" in augment
        self.margin = round(images.shape[-1] / 8) if "crop" in augment else 0
        height, width = images.shape[-2:]
        padded = images.to(self.device)  # no copy if there is no margin: images may be mapped from a file
        if self.margin:
            padded = F.pad(padded, [self.margin] * 4)
        # A view (N, C, 2m+1, 2m+1, H, W) of all crops: choosing one per image is then a plain gather of rows.
        self.cuts = padded.unfold(2, height, 1).unfold(3, width, 1)
        self.mean = torch.tensor(mean, device=self.device).view(1, -1, 1, 1)
        self.scale = 1.0 / torch.tensor(std, device=self.device).view(1, -1, 1, 1)
        self.generator = torch.Generator(device=self.device).manual_seed(seed)

    def __call__(self, rows: Tensor, share: slice = slice(None)) -> Tensor:
        """Return the images of ``rows`` int64 (B,), augmented and normalised, or those of a ``share`` of them.

        Numbers are drawn for all rows either way, so that generators of processes that share batches stay equal.
        """
        mine = rows[share]
        if self.margin:
            offsets = self._draw(2 * self.margin + 1, 2, len(rows))[:, share]
            pixels = self.cuts[mine, :, offsets[0], offsets[1]]
        else:
            pixels = self.cuts[mine, :, 0, 0]
        if self.flip:
            mirrored = self._draw(2, len(rows))[share].bool().view(-1, 1, 1, 1)
            pixels = torch.where(mirrored, pixels.flip(3), pixels)
        return (pixels.float() - self.mean) * self.scale

    def _draw(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the generator's state, with which the same rows give the same images again."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue drawing from the saved state."""
        self.generator.set_state(state["generator"].cpu())
