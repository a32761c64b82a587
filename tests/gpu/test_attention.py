"""Attention on a GPU: each kernel keeps rows separate, and dropout inside one is never redrawn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from on_gpu import Cast, each_loss, off_by, report_of, sequences
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import batchtrim

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says about odd models is not the subject

BACKENDS = {
    "math": SDPBackend.MATH,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


class Attending(nn.Module):
    def __init__(self, dropout: float = 0.0, masked: bool = False, causal: bool = False, size: int = 64) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(size, 3 * size), nn.Linear(size, size), nn.Linear(size, 5)
        self.dropout, self.masked, self.causal = dropout, masked, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = None
        if self.masked:
            mask = (x[..., 0] > -1.0)[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        h = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=self.dropout, is_causal=self.causal)
        return self.head((x + self.out(h.transpose(1, 2).flatten(2))).mean(1))


@pytest.mark.parametrize("kind", ["plain", "causal", "masked"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_kernels_keep_rows_apart(device: torch.device, backend: str, kind: str) -> None:
    """The shared engine is as near to float32's gradient as a plain step with the same kernel is.

    cuDNN's reuses what it planned for other strides (torch 2.11): it is off by 0.2 unless rows lie as in a plain step.
    """
    if device.type != "cuda" and backend in ("efficient", "cudnn"):
        pytest.skip("a GPU's kernel")
    if backend == "flash" and kind == "masked":
        pytest.skip("takes no mask")
    dtype = torch.float32 if backend in ("math", "efficient") else torch.bfloat16

    def make() -> nn.Module:
        return Attending(masked=kind == "masked", causal=kind == "causal")

    x = sequences(12).to(device)
    with sdpa_kernel(BACKENDS[backend]):
        plain, shared = (off_by(make, x, dtype, engine) for engine in ("exact", "shared"))
    assert shared <= max(1.5 * plain, 1e-5 if dtype == torch.float32 else 0.05), (plain, shared)


@pytest.mark.parametrize("backend", ["math", "efficient"])
def test_layers_below_attention_run_on_the_kept_rows(device: torch.device, backend: str) -> None:
    if device.type != "cuda" and backend != "math":
        pytest.skip("a GPU's kernel")
    shares = {}
    for dropout in (0.0, 0.2):
        torch._dynamo.reset()
        step = batchtrim.TrimmedForward(
            Attending(dropout).to(device).train(), each_loss, batchtrim.Trimmer(0.4), "shared"
        )
        with sdpa_kernel(BACKENDS[backend]):
            step(sequences(12).to(device), torch.arange(12, device=device) % 5).backward()
        shares[dropout] = step.engine.trace.cost(False).share  # type: ignore[union-attr]
    assert shares[0.0] == 1.0
    assert shares[0.2] == 1.0 if backend == "math" else 0.3 < shares[0.2] < 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_in_an_attention_kernel_is_never_redrawn(device: torch.device, backend: str) -> None:
    if device.type != "cuda" and backend != "math":
        pytest.skip("a GPU's kernel")
    dtype = torch.float32 if backend in ("math", "efficient") else torch.bfloat16
    with sdpa_kernel(BACKENDS[backend]):
        report = report_of(
            lambda: Cast(Attending(0.2), dtype), sequences, device, "shared",
            tolerance=None if dtype == torch.float32 else 0.1,
        )  # fmt: skip
    assert report.verdict == "right", report
