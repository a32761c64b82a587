"""Networks for small images, in one registry: residual networks, a small CNN, an MLP, a small vision transformer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchtrim.lab.files import look_up
from batchtrim.lab.task import own_models
from batchtrim.lab.task.names import NORMS
from batchtrim.lab.task.speed import SpeedNet

Norm = Callable[[int], nn.Module]


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(groups for groups in (8, 4, 2, 1) if channels % groups == 0), channels)


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class PadShortcut(nn.Module):
    """A shortcut without parameters: every second pixel, and zeros for the new channels (He et al., option A)."""

    def __init__(self, extra: int):
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, shortcut: nn.Module):
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, stride), norm(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs), norm(outputs)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x), inplace=True)


class ResNet(nn.Module):
    """A 3 x 3 stem, stages of basic blocks that double the channels and halve the side, mean over pixels, linear.

    Args:
        blocks: how many blocks each stage has.
        width: channels of the first stage.
        projection: shortcuts across stages are 1 x 1 convolutions (ImageNet style) instead of padding (CIFAR style).
    """

    def __init__(
        self, blocks: list[int], channels: int, classes: int, width: int, norm: Norm, *, projection: bool = False
    ):
        super().__init__()
        self.stem, self.norm = _conv(channels, width), norm(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut: nn.Module = nn.Identity()
                if stride == 2 and projection:
                    shortcut = nn.Sequential(_conv(inputs, outputs, stride, kernel=1), norm(outputs))
                elif stride == 2:
                    shortcut = PadShortcut(outputs - inputs)
                stages.append(BasicBlock(inputs, outputs, stride, norm, shortcut))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)), inplace=True)
        return self.head(self.blocks(x).mean((2, 3)))


class VisionTransformer(nn.Module):
    """Patches, a learned position for each, pre-norm transformer blocks, mean over patches, linear (no dropout)."""

    def __init__(self, shape: tuple[int, int, int], classes: int, width: int, depth: int = 4, heads: int = 4):
        super().__init__()
        channels, height, side = shape
        patch = 4 if side % 4 == 0 and side > 8 else 2
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.position = nn.Parameter(torch.randn(1, (height // patch) * (side // patch), width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def _small_cnn(shape: tuple[int, int, int], classes: int, width: int, norm: Norm) -> nn.Module:
    stages: list[nn.Module] = []
    inputs = shape[0]
    for outputs in (width, 2 * width):
        stages += [_conv(inputs, outputs), norm(outputs), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        inputs = outputs
    return nn.Sequential(*stages, nn.Flatten(), nn.Linear(inputs * (shape[1] // 4) * (shape[2] // 4), classes))


def _mlp(shape: tuple[int, int, int], classes: int, width: int) -> nn.Module:
    inputs = shape[0] * shape[1] * shape[2]
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


@dataclass(frozen=True)
class ModelRow:
    """A network of the registry: its builder takes (image shape, classes, width, norm)."""

    build: Callable[[tuple[int, int, int], int, int, Norm], nn.Module]
    width: int | None
    uses_norm: bool = True


def _residual(blocks: list[int], width: int, projection: bool = False) -> ModelRow:
    return ModelRow(
        lambda shape, classes, width, norm: ResNet(blocks, shape[0], classes, width, norm, projection=projection), width
    )


def _speed(width: int, kernel: int, stride: int) -> ModelRow:
    return ModelRow(
        lambda shape, classes, width, norm: SpeedNet(shape, classes, width, norm, kernel=kernel, stride=stride), width
    )


MODELS: dict[str, ModelRow] = {
    "mlp": ModelRow(lambda shape, classes, width, norm: _mlp(shape, classes, width), 128, uses_norm=False),
    "cnn": ModelRow(_small_cnn, 32),
    "vit": ModelRow(lambda shape, classes, width, norm: VisionTransformer(shape, classes, width), 64, uses_norm=False),
    **{f"resnet{6 * n + 2}": _residual([n] * 3, 16) for n in range(1, 6)},
    "speed": _speed(32, kernel=3, stride=1),
    "speed_lite": _speed(32, kernel=4, stride=2),
    "resnet18": _residual([2, 2, 2, 2], 64, projection=True),
    "resnet34": _residual([3, 4, 6, 3], 64, projection=True),
}


def find_model(name: str) -> ModelRow:
    """Return the registry's row of that name, or one for the user's own network; an error suggests the nearest name."""
    if isinstance(name, str) and own_models.is_own_model(name):
        return ModelRow(lambda shape, classes, width, norm: own_models.build_own(name, shape, classes), None, False)
    other = "FILE.py:FUNCTION or hf:ARCHITECTURE (with lists in brackets: hf:resnet:depths=[1,1])"
    return look_up("model", name, MODELS, other)


def build(
    name: str, shape: tuple[int, int, int], classes: int, width: int | None = None, norm: str = "batch"
) -> nn.Module:
    """Make a network for images of ``shape`` (channels, height, width); weights depend on torch's global seed.

    Args:
        name: a name in ``MODELS``. resnet8, 14, 20, 26 and 32 have 6n+2 layers in three stages (He et al. 2015,
            section 4.2); resnet18 and resnet34 have the four stages of their ImageNet namesakes behind a 3 x 3 stem.
            speed and speed_lite are :class:`batchtrim.lab.task.speed.SpeedNet`, whose first layer is set from data.
        width: channels (or features) of the first stage; None means the registry's default.
        norm: ``batch`` or ``group`` (no statistics shared within a batch). Networks without norm layers ignore it.
    """
    row = find_model(name)
    if norm not in NORMS:
        raise ValueError(f"expected `norm` to be one of {', '.join(NORMS)}, got {norm!r}.")
    if width is not None and (not isinstance(width, int) or width < 1):
        raise ValueError(f"expected `width` to be a positive int, got {width!r}.")
    return row.build(shape, classes, width or row.width or 0, nn.BatchNorm2d if norm == "batch" else _group_norm)


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
