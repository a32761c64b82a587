"""State that a forward changes: buffers, attributes, generators, the batch itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import C, D, H, V, attack, regression, tokens

# 6. State that moves before a refusal


@attack(6)
def counted_then_mixed(net: Any, x: Tensor) -> Tensor:
    net.seen += 1
    z = net.a(x)
    return net.t(z - z.mean(0))


def supcon() -> Callable[[Tensor, Tensor], Tensor]:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        z = F.normalize(out, dim=1)
        same = (y[:, None] == y[None]).float()
        return -(same * (z @ z.T).log_softmax(1)).sum(1) / same.sum(1)

    return loss


@attack(6, loss=supcon, parts=lambda: {"norm": nn.BatchNorm1d(H)})
def supcon_over_batch_norm(net: Any, x: Tensor) -> Tensor:
    return net.t(net.norm(net.a(x)))


@attack(6, loss=supcon)
def supcon_alone(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


@attack(6)
def drawn_then_mixed(net: Any, x: Tensor) -> Tensor:
    z = F.dropout(net.a(x), 0.3, net.training)
    return net.t(z - z.mean(0))


@attack(6)
def appended_then_mixed(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    x.add_(0.5)
    return net.t(net.a(x).flip(0).cumsum(0))


# 7. The batch changes in place


@attack(7, two_pass="right")
def doubled_in_place(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x.mul_(2)))


@attack(7, two_pass="right", data=regression, loss=lambda: lambda out, y: (out - y.div_(10)).square().mean(1))
def targets_divided_in_place(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(7, two_pass="right")
def normalised_in_place(net: Any, x: Tensor) -> Tensor:
    x.sub_(x.mean(1, keepdim=True)).div_(x.std(1, keepdim=True))
    return net.t(net.a(x))


@attack(7, two_pass="right", data=tokens)
def tokens_shifted_in_place(net: Any, x: Tensor) -> Tensor:
    x.add_(1).remainder_(V)
    return net.t(net.embed(x).mean(1))


@attack(7)
def centred_in_place(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x.sub_(x.mean(0))))


@attack(7, two_pass="right")
def changed_past_autograd(net: Any, x: Tensor) -> Tensor:
    x.data.mul_(1.5)
    return net.t(net.a(x))


@attack(7, two_pass="right", data=lambda b: ((torch.randn(b, D), torch.ones(D)), torch.randint(0, C, (b,))))
def constant_changed_in_place(net: Any, x: Tensor, scale: Tensor) -> Tensor:
    return net.t(net.a(x * scale.mul_(1.5)))


def _own_input(batch: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(batch, D)
    return x, x


@attack(7, two_pass="right", data=_own_input, loss=lambda: lambda out, y: (out - y[:, :C]).square().mean(1))
def target_is_the_input(net: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return net.t(net.a(x))


# 10. State that is easily overlooked


@attack(10, two_pass="right")
def buffer_registered_as_none(net: Any, x: Tensor) -> Tensor:
    net.late = torch.ones(()) if net.late is None else net.late + 1
    return net.t(net.a(x) * net.late)


class CountingLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(out, y, reduction="none") * (1 + 0.1 * self.calls)


@attack(10, two_pass="right", loss=CountingLoss)
def loss_that_counts(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(10, two_pass="right", parts=lambda: {"b": nn.utils.parametrizations.spectral_norm(nn.Linear(H, H))})
def spectral_norm(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


@attack(10, two_pass="right", parts=lambda: {"b": nn.utils.parametrizations.weight_norm(nn.Linear(H, H))})
def weight_norm(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)).tanh())


@attack(10, two_pass="right")
def read_and_updated(net: Any, x: Tensor) -> Tensor:
    out = net.t(net.a(x) * net.scale)
    net.scale = net.scale * 0.9 + 0.05
    return out


@attack(10)
def running_mean_of_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    net.scale = 0.9 * net.scale + z.detach().abs().mean()
    return net.t(z / net.scale)


@attack(10)
def codebook(net: Any, x: Tensor) -> Tensor:
    """A vector quantiser whose codes follow a moving average of the batch."""
    z = net.a(x)
    codes = net.embed.weight.detach()
    nearest = torch.cdist(z, codes).argmin(1)
    hot = F.one_hot(nearest, V).to(z)
    if net.training:
        net.late = hot.T @ z.detach() * 0.1 + (codes if net.late is None else net.late) * 0.9
    codes = codes if net.late is None else net.late
    return net.t(z + (codes[nearest] - z).detach())


@attack(10, parts=lambda: {"queue": deque(maxlen=3)})  # type: ignore[dict-item]
def memory_bank(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    net.queue.append(z.detach())
    keys = torch.cat(list(net.queue))
    return net.t(z + (z @ keys.T).softmax(1) @ keys)


@attack(10, two_pass="right", parts=lambda: {"queue": deque(maxlen=3)})  # type: ignore[dict-item]
def queue_of_numbers(net: Any, x: Tensor) -> Tensor:
    net.queue.append(len(net.queue) + 1)
    return net.t(net.a(x) * (1 + 0.1 * sum(net.queue)))


@attack(10, two_pass="right")
def generator_of_its_own(net: Any, x: Tensor) -> Tensor:
    if not hasattr(net, "dice"):
        net.dice = torch.Generator().manual_seed(0)
    return net.t(net.a(x) + torch.rand(1, generator=net.dice))


def _with_links(net: nn.Module) -> nn.Module:
    net.register_buffer("links", (torch.randn(H, H) > 0).float().to_sparse())
    return net


@attack(10, wrap=_with_links, two_pass="right")
def channels_linked_by_a_sparse_buffer(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.sparse.mm(net.links, net.a(x).T).T.tanh())
