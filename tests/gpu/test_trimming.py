"""Rules, trimmer and log with losses on a GPU: the same choice as on the CPU, without waiting for the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import batchtrim

pytestmark = pytest.mark.filterwarnings("ignore")

RULES: dict[str, Callable[[], Any]] = {
    "hardest": batchtrim.hardest,
    "easiest": batchtrim.easiest,
    "between": lambda: batchtrim.between(0.1),
    "above": lambda: batchtrim.above(0.5),
    "percentile": batchtrim.percentile,
    "superquantile": batchtrim.superquantile,
    "loss_mass": batchtrim.loss_mass,
}


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """Raise where anything inside waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["spread", "ties", "nan"])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_chooses_as_on_the_cpu(device: torch.device, rule: str, kind: str) -> None:
    losses = torch.rand(257)
    if kind == "ties":
        losses = (losses * 8).floor() / 8
    if kind == "nan":
        losses[17] = torch.nan
    for scale in ("kept", "batch"):
        results = []
        for place in (torch.device("cpu"), device):
            own = losses.detach().clone().to(place).requires_grad_()
            trim = batchtrim.Trimmer(0.3, select=RULES[rule](), scale=scale)
            loss = trim(own * 2.0)
            loss.backward()
            assert loss.device.type == place.type
            assert trim.last_selection is not None
            results.append((trim.last_selection.rising().indices.cpu(), loss.detach().cpu(), own.grad.cpu()))
        torch.testing.assert_close(results[0], results[1], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_choose_as_on_the_cpu(device: torch.device, dtype: torch.dtype) -> None:
    losses = torch.rand(200).to(dtype)
    for rule in (batchtrim.hardest(), batchtrim.loss_mass()):
        chosen = []
        for place in ("cpu", device):
            trim = batchtrim.Trimmer(0.4, select=rule)
            trim(losses.to(place))
            assert trim.last_selection is not None
            chosen.append(trim.last_selection.rising().indices.cpu())
        assert torch.equal(*chosen)


def test_masks_weights_and_units_agree_with_the_cpu(device: torch.device) -> None:
    losses, mask = torch.rand(12, 9), torch.rand(12, 9) > 0.3
    for unit in ("sample", "element"):
        values = []
        for place in ("cpu", device):
            trim = batchtrim.Trimmer(0.4, unit=unit)
            values.append(trim(losses.to(place), mask=mask.to(place)).cpu())
        torch.testing.assert_close(*values)


def test_drawing_rules_draw_from_their_own_generator_alone(device: torch.device) -> None:
    losses = torch.rand(64, device=device)
    torch.manual_seed(3)
    before = torch.get_rng_state(), torch.rand(3, device=device).cpu()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    batchtrim.Trimmer(0.4, select=batchtrim.uniform(), seed=5)(losses)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(3, device=device).cpu(), before[1])


def test_a_step_never_waits_for_the_gpu(device: torch.device) -> None:
    model = nn.Linear(8, 5).to(device)
    x, y = torch.randn(64, 8, device=device), torch.randint(0, 5, (64,), device=device)
    trim = batchtrim.Trimmer(0.4)
    trim(F.cross_entropy(model(x), y, reduction="none")).backward()  # whatever is set up once
    with no_wait(device):
        for _ in range(3):
            trim(F.cross_entropy(model(x), y, reduction="none")).backward()


def test_a_model_and_its_criterion_train_like_the_rule(device: torch.device) -> None:
    model = nn.Linear(8, 5).to(device)
    x, y = torch.randn(64, 8, device=device), torch.randint(0, 5, (64,), device=device)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4))
    expected = F.cross_entropy(model(x), y, reduction="none").topk(26).values.mean()
    torch.testing.assert_close(step(x, y), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler_skips_overflow_and_continues(device: torch.device, dtype: torch.dtype) -> None:
    if device.type != "cuda" and dtype == torch.float16:
        pytest.skip("autocast to float16 is the GPU's")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 5)).to(device)
    plain = copy.deepcopy(model)
    x, y = torch.randn(64, 8, device=device), torch.randint(0, 5, (64,), device=device)
    scales = []
    for network, trimmed in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device.type, init_scale=2.0**40, enabled=dtype == torch.float16)
        trim = batchtrim.Trimmer(0.4)
        for _ in range(30):
            with torch.autocast(device.type, dtype):
                losses = F.cross_entropy(network(x), y, reduction="none")
            loss = trim(losses) if trimmed else losses.topk(26).values.mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1]
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs)


def test_compiled_trimming_is_one_graph(device: torch.device) -> None:
    trim = batchtrim.Trimmer(0.3)
    losses = torch.rand(50, device=device)
    torch.testing.assert_close(torch.compile(lambda x: trim(x * 1.0), fullgraph=True)(losses), trim(losses))


def test_keep_log_notes_what_happens_on_the_gpu(device: torch.device) -> None:
    losses = torch.rand(100)
    tables = []
    for place in ("cpu", device):
        log, trim = batchtrim.KeepLog(100), batchtrim.Trimmer(0.3)
        trim(losses.to(place))
        assert trim.last_selection is not None
        log.record(batchtrim.Choice(losses.to(place), trim.last_selection), ids=torch.arange(100))
        log.end_epoch()
        tables.append(log.table())
    torch.testing.assert_close(tables[0], tables[1], equal_nan=True)


def test_state_is_restored_across_devices(device: torch.device) -> None:
    trim = batchtrim.Trimmer(total=10)
    for _ in range(4):
        trim(torch.rand(20, device=device))
        trim.step()
    other = batchtrim.Trimmer(total=10)
    other.load_state_dict(trim.state_dict())
    assert other.keep == trim.keep
    losses = torch.rand(20)
    torch.testing.assert_close(other(losses), trim(losses.to(device)).cpu())
