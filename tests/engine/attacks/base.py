"""Networks, losses and batches made to be got wrong: each kind of ``KINDS``, several members each.

An attack is a forward of few lines over a :class:`Net`, a way to draw batches and a loss. An engine computes it right,
or says that it is approximate, or refuses it; nothing else will do. ``two_pass`` and ``shared`` say which is expected:
"right", "approximate", "refused", or "either".

Sizes: batches of 12 or 7 rows, 6 features in, 8 inside, 5 classes; tokens below 11.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

D, H, C, V = 6, 8, 5, 11

KINDS = {
    1: "an interaction that the loss does not show",
    2: "numbers drawn outside torch",
    3: "an interaction that begins later",
    4: "only backward looks at the batch",
    5: "a random operator of its own form",
    6: "state that moves before a refusal",
    7: "the batch changes in place",
    8: "compiled models",
    9: "batch statistics that are no nn.BatchNorm",
    10: "state that is easily overlooked",
    11: "runs with a graph, and not in every other way",
    12: "the rows of a sample are not where they were",
    13: "what is cut, and how",
    14: "samples interact, plainly",
    15: "what a trace may miss, and rows that lie in unusual places",
    16: "a rule that holds for some arguments only",
    17: "layers and losses of many kinds",
    18: "state that a forward keeps, outside of BatchNorm",
    19: "losses that divide by something of the batch",
    20: "indices made of the batch",
    21: "numbers drawn for each sample or for all",
    22: "how forward and backward are run",
    23: "attention of many kinds",
    24: "the batch itself requires a gradient",
    25: "state that lies deeper than a module's own attributes",
    26: "what training programs are made of",
    27: "the forward changes the lists, dictionaries and objects of its batch",
    28: "an activation checkpoint does it again in backward",
    29: "the model asks whether it is compiled",
}


class Net(nn.Module):
    """A few layers, and a forward given as a function: ``run(net, *inputs)``."""

    a: nn.Module
    h: nn.Module

    def __init__(self, run: Callable[..., Any], parts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.a, self.b, self.t, self.h = nn.Linear(D, H), nn.Linear(H, H), nn.Linear(H, C), nn.Linear(H, C)
        self.embed = nn.Embedding(V, H)
        self.gate = nn.Parameter(torch.zeros(()))
        self.register_buffer("late", None)
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("seen", torch.zeros(()))
        self.n = 0
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *given: Any, **named: Any) -> Any:
        return self.run(self, *given, **named)


@dataclasses.dataclass(frozen=True)
class Attack:
    """One attack; see the module."""

    name: str
    kind: int
    run: Callable[..., Any]
    data: Callable[[int], tuple[Any, Any]]
    loss: Callable[[], Any]
    parts: Callable[[], dict[str, nn.Module]]
    wrap: Callable[[nn.Module], nn.Module]
    two_pass: str
    shared: str
    options: dict[str, Any]

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        net = Net(self.run, self.parts())
        nn.init.normal_(net.t.bias, std=0.3)  # so that losses differ
        return self.wrap(net).train()

    def batches(self) -> list[tuple[Any, Any]]:
        torch.manual_seed(1)
        return [self.data(size) for size in (12, 12, 7)]


def vectors(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, D), torch.randint(0, C, (batch,))


def tokens(batch: int, length: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randint(0, V, (batch, length)), torch.randint(0, C, (batch,))


def regression(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, D), torch.randn(batch, C)


ATTACKS: dict[str, Attack] = {}


def attack(
    kind: int,
    *,
    data: Callable[[int], tuple[Any, Any]] = vectors,
    loss: Callable[[], Any] = nn.CrossEntropyLoss,
    parts: Callable[[], dict[str, nn.Module]] = dict,
    wrap: Callable[[nn.Module], nn.Module] = lambda net: net,
    two_pass: str = "refused",
    shared: str = "either",
    **options: Any,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter the decorated forward into :data:`ATTACKS` under its own name."""

    def enter(run: Callable[..., Any]) -> Callable[..., Any]:
        name = run.__name__
        assert name not in ATTACKS
        ATTACKS[name] = Attack(name, kind, run, data, loss, parts, wrap, two_pass, shared, options)
        return run

    return enter


def zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    return layer


def backward_of(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return the identity whose backward is ``change``."""

    class Changed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return change(g)

    return Changed.apply
