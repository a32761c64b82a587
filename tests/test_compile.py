"""The loss side under torch.compile: one graph, whatever keep is."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import batchtrim


@pytest.mark.slow
@pytest.mark.parametrize("rule", [batchtrim.hardest(), batchtrim.between(0.1)])
@pytest.mark.parametrize("scale", ["kept", "batch"])
def test_twenty_keeps_compile_at_most_twice(rule: object, scale: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = batchtrim.Trimmer(total=20, select=rule, scale=scale)  # type: ignore[arg-type]
    eager = batchtrim.Trimmer(total=20, select=rule, scale=scale)  # type: ignore[arg-type]
    step = torch.compile(lambda losses: compiled(losses * 2.0), backend=counter, fullgraph=True)
    for _ in range(20):
        losses = torch.rand(64)
        ours, theirs = losses.clone().requires_grad_(), losses.clone().requires_grad_()
        loss, expected = step(ours), eager(theirs * 2.0)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        torch.testing.assert_close(ours.grad, theirs.grad)
        compiled.step()
        eager.step()
    assert counter.frame_count <= 2


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0.0, 0.3])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
def test_loss_mass_compiles_once_whatever_the_batch_size(offset: float) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    trim = batchtrim.Trimmer(
        0.8, select=batchtrim.loss_mass(skip=0.05, at_least=0.1, at_most=0.9, offset=offset), scale="batch"
    )
    step = torch.compile(lambda losses: trim(losses), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for size in (64, 33, 200, 5):
        losses = torch.rand(size) + offset
        torch.testing.assert_close(step(losses), trim(losses))
        frames.append(counter.frame_count)
    assert len(set(frames)) == 1, "compiled in the first step, and never again"
    with pytest.raises(RuntimeError, match="expected losses of at least 0 for loss_mass, or of at least its `offset`"):
        step(torch.full((64,), offset - 0.1))


@pytest.mark.skipif(torch.__version__ < "2.8", reason="torch 2.4 breaks the graph where a Losses is made")
def test_masked_losses_compile() -> None:
    torch._dynamo.reset()
    trim = batchtrim.Trimmer(0.5)
    step = torch.compile(lambda losses, mask: trim(losses, mask=mask), backend="eager", fullgraph=True)
    losses, mask = torch.rand(12), torch.rand(12) > 0.3
    torch.testing.assert_close(step(losses, mask), trim(losses, mask=mask))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, inside its compiler
def test_inductor_gives_the_same() -> None:
    torch._dynamo.reset()
    trim = batchtrim.Trimmer(0.3)
    losses = torch.rand(50)
    torch.testing.assert_close(torch.compile(lambda x: trim(x * 1.0), fullgraph=True)(losses), trim(losses))


def test_a_step_beside_a_thread_that_compiles_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's flag is of the process; the step got no statistics, and ``last`` was None."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    trim = batchtrim.Trimmer(0.5)
    assert trim(torch.tensor([1.0, 3.0])) == 3.0
    assert trim.last is not None
    assert trim.stats.compute()["batches"] == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own: an export leaves out what it sets
@pytest.mark.parametrize("strict", [True, False])
def test_a_trimmed_loss_can_be_exported(strict: bool) -> None:
    if strict and torch.__version__ < "2.9":
        pytest.skip("a strict export refuses tensors that are no buffers, as the trimmer's keep is")
    trim = batchtrim.Trimmer(0.5)

    class Loss(torch.nn.Module):
        def forward(self, losses: torch.Tensor) -> torch.Tensor:
            return trim(losses)

    losses = torch.tensor([1.0, 3.0, 2.0, 0.5])
    exported = torch.export.export(Loss(), (losses.flip(0),), strict=strict)
    assert exported.module()(losses) == 2.5
