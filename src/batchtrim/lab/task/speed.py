"""A small network like those of training-speed records: a whitening first layer, then wide, shallow groups.

The design is that of the CIFAR-10 speed runs (arXiv 2404.00498 and the code it describes), rewritten for small
images with any number of channels. The first convolution is set from the training images and never trained: its
outputs are decorrelated patches, so that the rest starts from well-conditioned input.

N images, C channels, K x K patch, P = C * K * K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SpeedNet", "patch_whitening"]

_PATCH_IMAGES = 2000
_EPS = 1e-2  # added to the variance of a patch component, so that noise is not amplified
_HEAD_SCALE = 1 / 3


def patch_whitening(images: Tensor, mean: Sequence[float], std: Sequence[float], kernel: int) -> Tensor:
    """Return the filters (P, C, K, K) that decorrelate patches of normalised images, largest variance first.

    ``w_j = v_j / sqrt(lambda_j + eps)`` for the eigenpairs of the patches' second moments.

    Args:
        images: uint8 (N, C, H, W); up to 2,000 of them, evenly spaced, are used, so that nothing is random.
        mean: per channel, in [0, 255]; ``std`` likewise.
        kernel: K.
    """
    some = images[:: max(1, len(images) // _PATCH_IMAGES)].float()
    some = (some - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    patches = F.unfold(some, kernel, stride=2).transpose(1, 2).flatten(0, 1).double()
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + _EPS).sqrt()).T.flip(0)
    # the sign of an eigenvector is arbitrary: make its largest entry positive
    largest = filters.gather(1, filters.abs().argmax(1, keepdim=True))
    return (filters * largest.sign()).float().reshape(-1, images.shape[1], kernel, kernel)


class SpeedNet(nn.Module):
    """Whitened patches and their negatives, then groups of two 3 x 3 convolutions, each group halving the side.

    Convolutions start as the identity on the channels that they share with their input. Norm layers have a
    trained offset and no trained scale. The head takes the maximum of each channel, and its outputs are divided
    by 3, which together with a large learning rate keeps early steps small.

    Args:
        shape: (channels, height, width).
        width: of the first group; the others have twice as many.
        kernel: the side of the whitened patches, in pixels.
        stride: the pixels from one patch to the next; 2 makes the network four times cheaper.
        norm: makes a norm layer for a number of channels.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        width: int,
        norm: Callable[[int], nn.Module],
        *,
        kernel: int,
        stride: int,
    ):
        super().__init__()
        channels, side = shape[0], min(shape[1:])
        components = min(channels * kernel * kernel, 16)
        self.whiten = nn.Conv2d(channels, 2 * components, kernel, stride, padding=kernel // 2 - (kernel % 2 == 0))
        self.whiten.weight.requires_grad_(False)
        nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        side = (side + 2 * self.whiten.padding[0] - kernel) // stride + 1  # type: ignore[operator]
        groups: list[nn.Module] = []
        inputs = 2 * components
        for outputs in (width, 2 * width, 2 * width):
            if side < 2:  # an image of 8 pixels allows fewer
                break
            groups.append(_Group(inputs, outputs, norm))
            inputs, side = outputs, side // 2
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(inputs, classes, bias=False)

    @torch.no_grad()
    def prepare(self, images: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
        """Set the first layer from the training images; see :func:`patch_whitening`."""
        filters = patch_whitening(images, mean, std, self.whiten.kernel_size[0])
        filters = filters[: self.whiten.out_channels // 2]
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.groups(F.gelu(self.whiten(x)))
        return self.head(x.amax((2, 3))) * _HEAD_SCALE


class _Group(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module]):
        super().__init__()
        self.conv1, self.norm1 = _identity_conv(inputs, outputs), _offset_only(norm(outputs))
        self.conv2, self.norm2 = _identity_conv(outputs, outputs), _offset_only(norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


def _identity_conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=math.sqrt(5))
    nn.init.dirac_(conv.weight.data[: min(inputs, outputs)])
    return conv


def _offset_only(norm: nn.Module) -> nn.Module:
    norm.weight.requires_grad_(False)  # type: ignore[union-attr]
    if isinstance(norm, nn.BatchNorm2d):
        norm.momentum = 0.4  # runs are short
    return norm
