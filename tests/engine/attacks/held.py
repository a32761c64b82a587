"""State that is deeper than a module's own attributes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attacks.base import D, H, attack
from attacks.layers import images

# 25. State that lies deeper than a module's own attributes


class Counter:
    def __init__(self) -> None:
        self.calls = 0


class Holder:
    def __init__(self) -> None:
        self.inner = Counter()


class Slotted:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


def _of(**parts: Any) -> Any:
    return lambda: {name: make() for name, make in parts.items()}


@attack(25, parts=_of(log=lambda: {"seen": []}), two_pass="right")
def list_in_a_dictionary(net: Any, x: Tensor) -> Tensor:
    net.log["seen"].append(1)
    return net.t(net.a(x) * (1 + 0.1 * len(net.log["seen"])))


@attack(25, parts=_of(plan=Holder), two_pass="right")
def object_within_an_object(net: Any, x: Tensor) -> Tensor:
    net.plan.inner.calls += 1
    return net.t(net.a(x) * (1 + 0.1 * net.plan.inner.calls))


@attack(25, parts=_of(plans=lambda: [Counter()]), two_pass="right")
def object_within_a_list(net: Any, x: Tensor) -> Tensor:
    net.plans[0].calls += 1
    return net.t(net.a(x) * (1 + 0.1 * net.plans[0].calls))


@attack(25, parts=_of(slotted=Slotted), two_pass="right")
def object_with_slots(net: Any, x: Tensor) -> Tensor:
    net.slotted.calls += 1
    return net.t(net.a(x) * (1 + 0.1 * net.slotted.calls))


@attack(25, parts=_of(table=lambda: np.zeros(3)), two_pass="right")
def numpy_table_that_counts(net: Any, x: Tensor) -> Tensor:
    net.table[0] += 1
    return net.t(net.a(x) * (1 + 0.1 * float(net.table[0])))


@attack(25, parts=_of(count=lambda: iter(range(100))))
def iterator_that_counts(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * (1 + 0.1 * next(net.count)))


@attack(25, parts=_of(teacher=lambda: [nn.Linear(D, H)]))
def teacher_in_a_list(net: Any, x: Tensor) -> Tensor:
    """No submodule, so that no checkpoint holds it."""
    with torch.no_grad():
        for slow, fast in zip(net.teacher[0].parameters(), net.a.parameters(), strict=True):
            slow.lerp_(fast, 0.1)
        key = net.teacher[0](x)
    return net.t(net.a(x) * key.tanh())


@attack(25, parts=_of(teacher=lambda: [nn.BatchNorm1d(D)]), two_pass="approximate")
def norm_in_a_list(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        net.teacher[0](x)
    return net.t(net.a(x) * net.teacher[0].running_mean.mean())


@attack(25, parts=_of(hidden=lambda: [nn.Linear(H, H)]), two_pass="right")
def trained_layer_in_a_list(net: Any, x: Tensor) -> Tensor:
    return net.t(net.hidden[0](net.a(x)).tanh())


@attack(25, parts=_of(cache=dict), two_pass="right")
def tensors_in_a_dictionary(net: Any, x: Tensor) -> Tensor:
    mean = net.cache.setdefault("mean", torch.zeros(H))
    z = net.a(x)
    out = net.t(z - mean.clone())
    with torch.no_grad():
        mean.lerp_(z.mean(0), 0.2)
    return out


@attack(25, parts=_of(cache=lambda: [torch.zeros(H)]), two_pass="right")
def tensor_in_a_list(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    out = net.t(z - net.cache[0].clone())
    with torch.no_grad():
        net.cache[0].lerp_(z.mean(0), 0.2)
    return out


@attack(25, two_pass="right")
def buffer_registered_in_the_forward(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if not hasattr(net, "top"):
        net.register_buffer("top", torch.zeros(()))
    out = net.t(z * (1 + net.top.clone()))
    with torch.no_grad():
        net.top.lerp_(z.abs().amax(), 0.1)
    return out


@attack(25, parts=_of(norm=lambda: nn.BatchNorm1d(H)), two_pass="either")
def set_to_evaluation_after_its_first_use(net: Any, x: Tensor) -> Tensor:
    out = net.t(net.norm(net.a(x)))
    net.norm.eval()
    return out


class MovingCentres(nn.Module):
    """A loss that moves its own parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(5, 5), requires_grad=False)

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            means = torch.zeros(5, 5).index_add(0, y, out) / 3
            self.centres.lerp_(means, 0.1)
        return (out - self.centres[y]).square().sum(1)


@attack(25, loss=MovingCentres)
def centres_moved_by_the_loss(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


class Weighing(nn.Module):
    """A loss with a weight to be learned."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(5, 5)

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(self.head(out), y, reduction="none")
        return losses * (-self.spread).exp() + self.spread


@attack(25, loss=Weighing, two_pass="right")
def weights_of_the_loss(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(25, data=images, parts=_of(conv=lambda: nn.Conv2d(2, H, 3), kept=list), two_pass="right")
def features_kept_without_their_graph(net: Any, x: Tensor) -> Tensor:
    z = net.conv(x)
    net.kept.append(z.detach().mean())
    return net.t(z.mean((2, 3)) * (1 + 0.1 * len(net.kept)))


@attack(25)
def features_kept_with_their_graph(net: Any, x: Tensor) -> Tensor:
    """Whoever adds a term of them to the loss gets its gradient."""
    net.kept = net.a(x).tanh()
    return net.t(net.kept)
