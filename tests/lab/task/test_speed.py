"""The network `speed`: its whitened first layer, its sizes, and that it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batchtrim.lab.run import loading, loop
from batchtrim.lab.run.config import RunConfig
from batchtrim.lab.task import models
from batchtrim.lab.task.speed import SpeedNet, patch_whitening


def images(channels: int, side: int = 16) -> torch.Tensor:
    smooth = torch.rand(500, channels, 4, 4, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(smooth, size=side, mode="bilinear") * 255).to(torch.uint8)


@pytest.mark.parametrize(("channels", "kernel"), [(1, 3), (3, 2), (3, 4)])
def test_whitened_patches_are_uncorrelated(channels: int, kernel: int) -> None:
    data = images(channels)
    mean = data.float().mean((0, 2, 3)).tolist()
    std = data.float().std((0, 2, 3)).tolist()
    filters = patch_whitening(data, mean, std, kernel)
    assert filters.shape == (channels * kernel**2, channels, kernel, kernel)
    x = (data.float() - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    out = F.conv2d(x, filters, stride=2).transpose(0, 1).flatten(1)
    second = out @ out.T / out.shape[1]
    energy = second.diagonal()
    assert (second - torch.diag(energy)).abs().max() < 0.02
    assert energy[0] == pytest.approx(1.0, abs=0.02)
    assert (energy[:-1] >= energy[1:] - 0.02).all(), "largest variance first"
    assert torch.equal(filters, patch_whitening(data, mean, std, kernel)), "nothing is drawn"


@pytest.mark.parametrize("name", ["speed", "speed_lite"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_any_shape_gives_logits_and_freezes_whitening_and_scales(
    name: str, shape: tuple[int, int, int], norm: str
) -> None:
    model = models.build(name, shape, 7, 8, norm)
    assert model(torch.randn(4, *shape)).shape == (4, 7)
    frozen = {each for each, parameter in model.named_parameters() if not parameter.requires_grad}
    assert "whiten.weight" in frozen
    assert all(each == "whiten.weight" or "norm" in each for each in frozen)


def test_it_starts_as_an_identity_and_only_the_first_layer_is_set_from_data() -> None:
    torch.manual_seed(0)
    model = models.build("speed", (1, 28, 28), 10, 24)
    assert isinstance(model, SpeedNet)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.prepare(images(1, 28), [127.0], [60.0])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"whiten.weight"}
    weight = model.groups[0].conv2.weight  # type: ignore[union-attr]
    assert torch.equal(weight, nn_identity(24))
    half = model.whiten.out_channels // 2
    assert torch.equal(model.whiten.weight[:half], -model.whiten.weight[half:])


def nn_identity(channels: int) -> torch.Tensor:
    return torch.nn.init.dirac_(torch.empty(channels, channels, 3, 3))


def test_it_trains_and_its_first_layer_stays() -> None:
    config = RunConfig(
        model="speed", width=8, optimizer="nesterov", lr=0.3, lr_schedule="triangle", epochs=8, train_size=600,
        batch_size=50, label_smoothing=0.1,
    ).resolved()  # fmt: skip
    training = loop.Training(config, loading.load_images(config))
    whitened = training.model.whiten.weight.clone()
    while training.epoch < training.epochs:
        point = training.advance()
    assert point["test_error"] < 0.2
    assert torch.equal(training.model.whiten.weight, whitened)
