"""The engines on a GPU: cuDNN's norms and recurrences, precisions, compiled models, memory, DDP."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import zoo
from on_gpu import each_loss, moved, off_by, report_of, sequences
from torch import Tensor, nn

import batchtrim
from batchtrim.errors import EngineRefused

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about odd models is not the subject

GROUP = lambda width: nn.GroupNorm(2, width)  # noqa: E731
BATCH = lambda width: nn.BatchNorm2d(width)  # noqa: E731

NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Any]]] = {
    "mlp": (lambda: zoo.Mlp(8), zoo.vectors),
    "mlp_dropout": (lambda: zoo.Mlp(8, 0.3), zoo.vectors),
    "group_norm": (lambda: zoo.Residual(GROUP), zoo.images),
    "group_norm_channels_last": (lambda: zoo.Residual(GROUP), zoo.images_channels_last),
    "encoder": (lambda: zoo.Encoder(True, 0.0, 1), zoo.tokens),
    "encoder_dropout": (lambda: zoo.Encoder(True, 0.2, 1), zoo.tokens),
    "time_major": (lambda: zoo.Encoder(False, 0.0, 1), zoo.tokens),
    "tied": (zoo.Tied, zoo.tokens),
    "checkpointed": (lambda: zoo.Checkpointed(False), zoo.vectors),
    "recurrent": (zoo.Recurrent, zoo.tokens),
    "batch_attention": (zoo.BatchAttention, zoo.vectors),
    "shuffled": (zoo.Shuffled, zoo.vectors),
}


@pytest.mark.parametrize("engine", ["exact", "shared", "two_pass", "auto"])
@pytest.mark.parametrize("name", NETWORKS)
def test_no_engine_is_wrong(device: torch.device, name: str, engine: str) -> None:
    report = report_of(*NETWORKS[name], device, engine)
    assert report.verdict != "wrong", report
    if engine == "shared" and name not in ("recurrent", "checkpointed"):
        assert report.verdict == "right", report
        assert report.engine == "shared"


@pytest.mark.parametrize("engine", ["shared", "auto"])
def test_batch_norm_of_cudnn_is_approximate_and_reported(device: torch.device, engine: str) -> None:
    report = report_of(lambda: zoo.Residual(BATCH), zoo.images, device, engine)
    assert report.verdict in ("approximate", "right"), report


class Bag(nn.Module):
    """Bags of one word each: its offsets, cut to some rows, point beyond the words."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(50, 16, mode="sum"), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bag(x, torch.arange(len(x), device=x.device)))


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h.gather(1, h.detach().softmax(1).multinomial(16)))


class Gated(nn.Module):
    """A gate whose loss is a binary cross-entropy, which takes no NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.a(x).sigmoid()
        return self.b(gates) + F.binary_cross_entropy(gates, gates.detach().round(), reduction="none").mean(1, True)


@pytest.mark.parametrize("make", [Bag, Drawing, Gated])
def test_no_check_of_two_pass_ends_the_process(device: torch.device, make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randint(50, (12,), device=device) if make is Bag else torch.randn(12, 64, device=device)
    step = batchtrim.TrimmedForward(make().to(device), each_loss, batchtrim.Trimmer(0.4), "two_pass")
    with contextlib.suppress(EngineRefused):
        step(x, torch.arange(12, device=device) % 5).backward()
    assert torch.ones(3, device=device).sum().item() == 3.0  # a kernel that found a wrong number leaves no GPU behind


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(64, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("engine", ["shared", "auto", "two_pass"])
def test_cudnn_recurrence(device: torch.device, engine: str) -> None:
    report = report_of(Lstm, sequences, device, engine)
    assert report.verdict != "wrong", report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["shared", "two_pass"])
def test_autocast_is_no_further_off_than_exact(device: torch.device, engine: str, dtype: torch.dtype) -> None:
    if device.type != "cuda" and dtype == torch.float16:
        pytest.skip("autocast to float16 is the GPU's")

    x = zoo.tokens(12).to(device)
    plain, ours = (off_by(lambda: zoo.Encoder(True, 0.0, 1), x, dtype, each) for each in ("exact", engine))
    assert ours <= max(1.5 * plain, 0.05), (plain, ours)


def test_grad_scaler_with_the_shared_engine(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("a GPU's scaler")
    torch.manual_seed(0)
    first = zoo.Residual(GROUP).to(device).train()
    x, y = zoo.images(16).to(device), torch.randint(0, 5, (16,), device=device)
    networks = {}
    for engine in ("exact", "shared"):
        model = networks[engine] = copy.deepcopy(first)
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), engine)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**30)
        for _ in range(25):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = step(x, y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert step.last is not None
        assert step.last.engine == engine
        assert scaler.get_scale() < 2.0**30
    for ours, theirs in zip(networks["shared"].parameters(), networks["exact"].parameters(), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=5e-3)


def test_dropout_draws_what_a_plain_step_draws(device: torch.device) -> None:
    x, y = zoo.vectors(16).to(device), torch.randint(0, 5, (16,), device=device)
    after = []
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        step = batchtrim.TrimmedForward(
            zoo.Mlp(8, 0.3).to(device).train(), nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), engine
        )
        values = []
        for seed in range(4):
            torch.manual_seed(seed)
            loss = step(x, y)
            loss.backward()
            values.append(loss.detach().cpu())
        after.append((torch.stack(values), torch.rand(3, device=device).cpu()))
    torch.testing.assert_close(*after)


@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead"}, {"dynamic": True}], ids=str)
@pytest.mark.parametrize("name", ["mlp", "group_norm", "encoder", "mlp_dropout"])
def test_compiled_models(device: torch.device, name: str, options: dict[str, Any]) -> None:
    """The gradient of the kept losses of one forward is that of a whole backward; dropout draws Inductor's numbers."""
    make, batch_of = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(device).train()
    plain = copy.deepcopy(model)
    model.compile(**options)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    for number in range(4):
        size = (12, 12, 7, 9)[number]
        torch.manual_seed(10 + number)
        x, y = moved((batch_of(size), torch.randint(0, 5, (size,))), device)
        model.zero_grad(set_to_none=True)
        loss = step(x, y)
        loss.backward()
        assert step.last is not None
        assert step.last.engine == "shared"
        if name == "mlp_dropout":
            assert all(each.grad.isfinite().all() for each in model.parameters())
            continue
        plain.zero_grad(set_to_none=True)
        losses = F.cross_entropy(plain(x), y, reduction="none")
        expected = losses.topk(batchtrim.keep_count(0.4, size)).values.mean()
        expected.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)


def test_shared_holds_less_memory_than_exact(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("memory of the GPU's allocator")
    peaks = {}
    for engine in ("exact", "shared"):
        torch.manual_seed(0)
        model = nn.Sequential(*(each for _ in range(8) for each in (nn.Linear(1024, 1024), nn.GELU()))).to(device)
        model.append(nn.Linear(1024, 5).to(device))
        x, y = torch.randn(4096, 1024, device=device), torch.randint(0, 5, (4096,), device=device)
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.2), engine)
        step(x, y).backward()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model.zero_grad(set_to_none=False)
        step(x, y).backward()
        peaks[engine] = torch.cuda.max_memory_allocated() - before
        del model, step
    assert peaks["shared"] <= peaks["exact"]


def test_a_traced_step_never_waits_for_the_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("nothing to wait for")
    torch.manual_seed(0)
    model = zoo.Residual(GROUP).to(device).train()
    x, y = zoo.images(16).to(device), torch.randint(0, 5, (16,), device=device)
    step = batchtrim.TrimmedForward(model, each_loss, batchtrim.Trimmer(0.4), "shared")
    for _ in range(3):
        step(x, y).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x, y).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_tf32_is_not_a_reason_to_refuse(device: torch.device) -> None:
    torch.backends.cudnn.deterministic = False
    torch.set_float32_matmul_precision("high")
    if hasattr(torch.backends.cudnn, "conv"):
        torch.backends.cudnn.conv.fp32_precision = "tf32"
    else:
        torch.backends.cudnn.allow_tf32 = True
    try:
        torch.manual_seed(0)
        model = zoo.Residual(GROUP).to(device).train()
        step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
        for _ in range(3):
            step(zoo.images(64).to(device), torch.randint(0, 5, (64,), device=device)).backward()
            assert step.last is not None
            assert step.last.engine == "shared"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_distributed_data_parallel_over_nccl(device: torch.device, tmp_path: Any) -> None:
    if device.type != "cuda":
        pytest.skip("nccl is for GPUs")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        inner = zoo.Residual(GROUP).to(device).train()
        gradients = {}
        for engine in ("exact", "shared"):
            model = nn.parallel.DistributedDataParallel(copy.deepcopy(inner))
            for scope in ("local", "global"):
                step = batchtrim.TrimmedForward(
                    model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4, scope=scope), engine
                )
                torch.manual_seed(1)
                x, y = zoo.images(16).to(device), torch.randint(0, 5, (16,), device=device)
                model.zero_grad(set_to_none=True)
                step(x, y).backward()
                assert step.last is not None
                assert step.last.engine == engine
                gradients[engine, scope] = torch.cat([each.grad.flatten() for each in model.parameters()])
        for scope in ("local", "global"):
            torch.testing.assert_close(gradients["shared", scope], gradients["exact", scope], rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


def test_out_of_memory_leaves_the_model_as_it_was(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("memory of the GPU")

    class Hungry(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 5)
            self.hungry = False

        def forward(self, x: Tensor) -> Tensor:
            if self.hungry:
                torch.empty(2**50, device=x.device)
            return self.head(x)

    model = Hungry().to(device)
    step = batchtrim.TrimmedForward(model, nn.CrossEntropyLoss(), batchtrim.Trimmer(0.4), "shared")
    x, y = torch.randn(16, 8, device=device), torch.randint(0, 5, (16,), device=device)
    step(x, y).backward()
    model.hungry = True
    with pytest.raises((torch.OutOfMemoryError, RuntimeError)):
        step(x, y)
    model.hungry = False
    loss = step(x, y)
    loss.backward()
    assert loss.isfinite()
