"""``check_engine`` sees what is wrong with gradients besides their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from batchtrim.engine import ENGINES
from batchtrim.engine.exact import ExactEngine
from batchtrim.testing import check_engine


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.last, self.unused = nn.Linear(6, 5), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last((self.one(x) + self.two(x)).tanh())


def of_one_memory(model: Any) -> None:
    model.two.bias.grad = model.one.bias.grad


def turned(model: Any) -> None:
    model.one.weight.grad = model.one.weight.grad.t().contiguous().t()


def with_a_graph(model: Any) -> None:
    model.one.weight.grad.requires_grad_()


def zeros(model: Any) -> None:
    model.unused.weight.grad = torch.zeros_like(model.unused.weight)


def removed(model: Any) -> None:
    model.one.bias.grad = None


def overwritten(model: Any) -> None:
    """What a later step computes replaces what was there: wrong only where gradients add up."""
    gradient = model.one.weight.grad
    if hasattr(model, "before") and model.before is gradient:
        gradient.mul_(0.5)
    model.__dict__["before"] = gradient


EXPECTED = {
    of_one_memory: "one.bias.grad in the memory of two.bias.grad",
    turned: "one.weight.grad (strides (1, 6) instead of (6, 1))",
    with_a_graph: "one.weight.grad (requires_grad True instead of False)",
    zeros: "unused.weight.grad",
    removed: "one.bias.grad (missing)",
    overwritten: "",
}


@pytest.mark.parametrize("fault", EXPECTED)
def test_it_finds(fault: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(ExactEngine):
        name = "faulty"

        def __call__(self, x: Any, y: Any, selection: Any = None) -> Any:
            result = super().__call__(x, y, selection)

            class Then(torch.autograd.Function):
                @staticmethod
                def forward(ctx: Any, loss: Tensor) -> Tensor:
                    return loss.clone()

                @staticmethod
                def backward(ctx: Any, gradient: Tensor) -> Tensor:
                    torch.autograd.Variable._execution_engine.queue_callback(lambda: fault(model))
                    return gradient

            model = self.forward.inner
            return result._replace(loss=Then.apply(result.loss), engine=self.name)

    monkeypatch.setitem(ENGINES, "faulty", Faulty)
    batch = torch.randn(12, 6), torch.randint(0, 5, (12,))
    report = check_engine(Network(), batch, nn.CrossEntropyLoss(), engine="faulty", verbose=False)
    assert report.verdict == "wrong", report
    assert not EXPECTED[fault] or EXPECTED[fault] in report.attributes, report


@pytest.mark.filterwarnings("ignore")  # torch's own
def test_tensors_made_of_others_share_no_memory() -> None:
    model = Network()
    model.one.weight = nn.Parameter(TwoTensor(torch.randn(6, 6), torch.randn(6, 6)))
    batch = torch.randn(12, 6), torch.randint(0, 5, (12,))
    assert check_engine(model, batch, nn.CrossEntropyLoss(), engine="exact", verbose=False).verdict == "right"
