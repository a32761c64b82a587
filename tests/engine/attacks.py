"""Networks, losses and batches made to be got wrong: each kind of ``KINDS``, several members each.

An attack is a forward of few lines over a :class:`Net`, a way to draw batches and a loss. An engine computes it right,
or says that it is approximate, or refuses it; nothing else will do. ``two_pass`` and ``shared`` say which is expected:
"right", "approximate", "refused", or "either".

Sizes: batches of 12 or 7 rows, 6 features in, 8 inside, 5 classes; tokens below 11.
"""

from __future__ import annotations

import dataclasses
import random
from collections import deque, namedtuple
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

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


# 1. An interaction that the loss does not show -------------------------------------------------------------------


@attack(1, parts=lambda: {"h": zero(nn.Linear(H, C))})
def zero_head(net: Any, x: Tensor) -> Tensor:
    return net.h((net.a(x) - net.a(x).mean(0)).tanh())


@attack(1)
def rezero_gate(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) + net.gate * net.a(x).mean(0))


@attack(1)
def rezero_maximum(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + net.gate * (z / z.abs().amax()))


@attack(1, parts=lambda: {"h": zero(nn.Linear(H, C))})
def zero_head_attention(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z) + net.h((z @ z.T).softmax(1) @ z)


@attack(1, data=tokens)
def rezero_on_tokens(net: Any, x: Tensor) -> Tensor:
    z = net.embed(x).mean(1)
    return net.t(z + net.gate * z.mean(0))


@attack(1, loss=lambda: lambda out, y: F.cross_entropy(out[0], y, reduction="none") + 1e4)
def large_loss_hides_it(net: Any, x: Tensor) -> tuple[Tensor]:
    z = net.a(x)
    return (net.t(z + 1e-3 * z.mean(0)),)


@attack(1)
def small_gate(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + 1e-5 * net.b(z.mean(0)))


@attack(1)
def layer_scale(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + (net.gate + 1e-6) * (z.cumsum(0)).tanh())


# 2. Numbers drawn outside torch ----------------------------------------------------------------------------------


@attack(2)
def numpy_mask(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * torch.from_numpy(np.random.rand(len(x), 1) > 0.3))


@attack(2)
def python_mask(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * torch.tensor([[float(random.random() > 0.3)] for _ in x]))


@attack(2)
def numpy_permutation(net: Any, x: Tensor) -> Tensor:
    order = torch.from_numpy(np.random.permutation(len(x)))
    return net.t(net.a(x)[order])


@attack(2, two_pass="right")
def python_layer_drop(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z if random.random() < 0.5 else net.b(z))


@attack(2, two_pass="right")
def numpy_noise_for_all(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) + float(np.random.randn()))


@attack(2, two_pass="approximate")
def numpy_time_mask(net: Any, x: Tensor) -> Tensor:
    """SpecAugment: a span of each sample, drawn by NumPy, in training only."""
    z = net.a(x)
    if net.training:
        mask = np.zeros(z.shape, dtype=bool)
        for row, start in enumerate(np.random.randint(0, H - 2, len(x))):
            mask[row, start : start + 2] = True
        z = z.masked_fill(torch.from_numpy(mask), 0.0)
    return net.t(z)


@attack(2, parts=lambda: {"rng": np.random.default_rng(0)})  # type: ignore[dict-item]
def own_numpy_generator(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * torch.from_numpy(net.rng.random((len(x), 1)) > 0.3))


# 3. An interaction that begins later -----------------------------------------------------------------------------


@attack(3)
def divided_by_the_maximum(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x / x.abs().amax()))


@attack(3)
def from_step_three_on(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    z = net.a(x)
    return net.t(z - z.mean(0) if net.n > 3 else z)


@attack(3)
def by_a_buffer(net: Any, x: Tensor) -> Tensor:
    net.seen += 1
    z = net.a(x)
    return net.t(z - (net.seen > 2).float() * z.mean(0))


@attack(3)
def every_fourth(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    z = net.a(x)
    return net.t(z.flip(0) if net.n % 4 == 3 else z)


@attack(3)
def where_a_weight_is_large(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + F.relu(net.gate.abs() - 0.01) * z.mean(0) + net.gate)


@attack(3)
def clipped_by_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * (1.5 / z.norm()).clamp(max=1.0))


@attack(3, two_pass="right")
def warm_up_counter(net: Any, x: Tensor) -> Tensor:
    net.n += 1
    return net.t(net.a(x) * min(1.0, net.n / 10))


# 4. Only backward looks at the batch -----------------------------------------------------------------------------


@attack(4, data=tokens, parts=lambda: {"embed": nn.Embedding(V, H, scale_grad_by_freq=True)})
def scaled_by_frequency(net: Any, x: Tensor) -> Tensor:
    return net.t(net.embed(x).mean(1))


@attack(4, data=tokens)
def scaled_by_frequency_as_a_function(net: Any, x: Tensor) -> Tensor:
    return net.t(F.embedding(x, net.embed.weight, scale_grad_by_freq=True).mean(1))


@attack(4)
def hook_that_counts(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    z.register_hook(lambda g: g * len(g))
    return net.t(z)


@attack(4)
def hook_that_centres(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g - g.mean(0))
    return net.t(z)


class _Counts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g / len(g)


@attack(4)
def function_that_counts(net: Any, x: Tensor) -> Tensor:
    return net.t(_Counts.apply(net.a(x)))


class _Normalises(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g / (g.norm() + 1e-6)


@attack(4, two_pass="right")
def function_that_normalises(net: Any, x: Tensor) -> Tensor:
    return net.t(_Normalises.apply(net.a(x)))


def _hooked(net: nn.Module) -> nn.Module:
    net.a.register_full_backward_hook(
        lambda _, __, out: (out[0].sum(0, keepdim=True).expand_as(out[0]).mean(1, True) * torch.ones(D),)
    )
    return net


@attack(4, wrap=_hooked, data=lambda b: (torch.randn(b, D).requires_grad_(), torch.randint(0, C, (b,))))
def full_backward_hook_on_inputs(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(net.b(F.pad(x, (0, H - D)))[:, :D]))


@attack(4)
def tensor_hook_by_rank_of_gradients(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.requires_grad:
        z.register_hook(lambda g: g * (g.norm(dim=1, keepdim=True) >= g.norm(dim=1).median()))
    return net.t(z)


# 5. A random operator of its own form ----------------------------------------------------------------------------


@attack(5, parts=lambda: {"act": nn.RReLU()}, two_pass="approximate")
def rrelu(net: Any, x: Tensor) -> Tensor:
    return net.t(net.act(net.a(x)))


@attack(5, two_pass="approximate")
def bernoulli_in_place(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * torch.empty_like(z).bernoulli_(0.7) if net.training else z)


@attack(5, two_pass="approximate")
def noise_in_place(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.zeros_like(z).normal_() if net.training else z)


@attack(5)
def gumbel(net: Any, x: Tensor) -> Tensor:
    return net.t(F.gumbel_softmax(net.a(x), hard=True))


@attack(5)
def multinomial(net: Any, x: Tensor) -> Tensor:
    picked = torch.multinomial(net.a(x).softmax(1), 2)
    return net.t(F.one_hot(picked, H).sum(1) * net.a(x))


@attack(5, data=lambda b: (torch.randn(b, 4, D), torch.randint(0, C, (b,))))
def fractional_pool(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).unsqueeze(1)
    return net.t(F.fractional_max_pool2d(z, 2, output_size=(2, 5)).flatten(1)[:, :H])


@attack(5)
def variational(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.randn_like(z) * net.b(z).sigmoid())


# 6. State that moves before a refusal ----------------------------------------------------------------------------


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


# 7. The batch changes in place -----------------------------------------------------------------------------------


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


# 8. Compiled models ----------------------------------------------------------------------------------------------


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net, backend="eager")  # type: ignore[return-value]


@attack(8, wrap=compiled)
def compiled_mean(net: Any, x: Tensor) -> Tensor:
    return net.t(x.new_zeros(1) + net.a(x - x.mean(0)))


@attack(8, wrap=compiled, parts=lambda: {"h": zero(nn.Linear(H, C))})
def compiled_zero_head(net: Any, x: Tensor) -> Tensor:
    return net.h((net.a(x) - net.a(x).mean(0)).tanh())


@attack(8, wrap=compiled, two_pass="right", shared="right")
def compiled_plain(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


@attack(8, wrap=compiled, two_pass="right")
def compiled_in_place(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x.mul_(2)))


def compiled_inside(net: nn.Module) -> nn.Module:
    net.b = torch.compile(net.b, backend="eager")  # type: ignore[assignment]
    return net


@attack(8, wrap=compiled_inside)
def compiled_part(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + net.b(z.mean(0, keepdim=True)))


# 9. Batch statistics that are no nn.BatchNorm --------------------------------------------------------------------


@attack(9)
def functional_batch_norm(net: Any, x: Tensor) -> Tensor:
    return net.t(F.batch_norm(net.a(x), None, None, training=True))


@attack(9)
def standardised_by_hand(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t((z - z.mean(0)) / (z.std(0) + 1e-3))


@attack(9)
def detached_mean(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z - z.mean(0).detach())


@attack(9)
def instance_norm_along_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(F.instance_norm(net.a(x).T.unsqueeze(0)).squeeze(0).T)


@attack(9)
def layer_norm_along_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x).T
    return net.t(F.layer_norm(z, (z.shape[1],)).T)


@attack(9)
def normalised_along_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(F.normalize(net.a(x), dim=0))


@attack(9)
def weight_standardised_with_the_batch(net: Any, x: Tensor) -> Tensor:
    w = net.b.weight / (1 + net.a(x).var())
    return net.t(F.linear(net.a(x), w))


@attack(9, two_pass="right", shared="right", parts=lambda: {"norm": nn.BatchNorm1d(H).eval()})
def frozen_batch_norm(net: Any, x: Tensor) -> Tensor:
    net.norm.training = False
    return net.t(net.norm(net.a(x)))


# 10. State that is easily overlooked -----------------------------------------------------------------------------


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


# 11. Runs with a graph, and not in every other way ---------------------------------------------------------------


@attack(11, two_pass="either")
def gradient_inside(net: Any, x: Tensor) -> Tensor:
    g = torch.func.vmap(torch.func.grad(lambda v: net.a(v).tanh().sum()))(x)
    return net.t(net.a(x + g))


@attack(11, two_pass="either")
def autograd_inside(net: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        v = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net.a(v).tanh().sum(), v, create_graph=True)
    return net.t(net.a(x + g))


@attack(11, two_pass="refused")
def needs_a_graph(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    (g,) = torch.autograd.grad(z.tanh().sum(), z, create_graph=True)
    return net.t(z + g)


@attack(11, two_pass="right", parts=lambda: {"a": nn.LazyLinear(H)})
def lazy_linear(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).tanh())


@attack(11, two_pass="either")
def conditional(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.cond(x.sum() > 0, lambda v: net.a(v).tanh(), lambda v: net.a(v).sin(), (x,)))


@attack(11, data=tokens, parts=lambda: {"embed": nn.Embedding(V, H, sparse=True)}, two_pass="right")
def sparse_gradient(net: Any, x: Tensor) -> Tensor:
    return net.t(net.embed(x).mean(1))


@attack(11, two_pass="right")
def checkpointed(net: Any, x: Tensor) -> Tensor:
    return net.t(torch.utils.checkpoint.checkpoint(lambda v: net.a(v).tanh(), x, use_reentrant=False))


@attack(11, two_pass="right")
def double_precision(net: Any, x: Tensor) -> Tensor:
    net.double()
    return net.t(net.a(x.double()))


@attack(11, two_pass="right", parts=lambda: {"embed": nn.Embedding(V, H, max_norm=0.5)}, data=tokens)
def renormalised_embedding(net: Any, x: Tensor) -> Tensor:
    return net.t(net.embed(x).mean(1))


@attack(11, two_pass="refused")
def branches_by_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z.tanh() if int(x.abs().sum() * 10) % 2 else z.sin())


# 12. The rows of a sample are not where they were ----------------------------------------------------------------


class Experts(nn.Module):
    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()
        self.route, self.capacity = nn.Linear(H, 3), capacity
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.route(x).softmax(1).max(1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (index == number).nonzero().flatten()[: self.capacity]
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return out


@attack(12, parts=lambda: {"moe": Experts()}, two_pass="right")
def mixture_by_gather(net: Any, x: Tensor) -> Tensor:
    return net.t(net.moe(net.a(x)))


@attack(12, parts=lambda: {"moe": Experts(capacity=2)})
def mixture_with_capacity(net: Any, x: Tensor) -> Tensor:
    return net.t(net.moe(net.a(x)))


@attack(12, two_pass="right")
def sorted_and_back(net: Any, x: Tensor) -> Tensor:
    order = x[:, 0].argsort()
    return net.t(net.a(x[order])[order.argsort()])


@attack(12)
def sorted_values(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).sort(0).values)


@attack(12)
def rolled(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.roll(z, 1, 0))


@attack(12)
def flipped(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).flip(0))


@attack(12)
def nearest_neighbour(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    near = (torch.cdist(x, x) + 1e6 * torch.eye(len(x))).argmin(1)
    return net.t(z + z[near])


@attack(12)
def gathered_by_computed_rows(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.gather(z, 0, z.argsort(0)))


@attack(12, data=lambda b: (torch.randn(b, 3, D), torch.randint(0, C, (b,))), two_pass="right")
def merged_batch_minor(net: Any, x: Tensor) -> Tensor:
    z = net.a(x.transpose(0, 1).reshape(-1, D))
    return net.t(z.view(3, -1, H).mean(0))


@attack(12, data=lambda b: (torch.randn(b, 3, D), torch.randint(0, C, (b,))))
def merged_and_mistaken(net: Any, x: Tensor) -> Tensor:
    """Takes time-major rows for batch-major ones: samples mix."""
    z = net.a(x.transpose(0, 1).reshape(-1, D))
    return net.t(z.view(-1, 3, H).mean(1))


@attack(12, data=lambda b: (torch.randn(4, b, D), torch.randint(0, C, (b,))), two_pass="right", batch_dim=1)
def time_major(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).cumsum(0)[-1].tanh())


@attack(12, data=tokens)
def of_unique_words(net: Any, x: Tensor) -> Tensor:
    words, back = torch.unique(x, return_inverse=True)
    return net.t((net.embed(words) / len(words))[back].mean(1))


@attack(12, two_pass="right")
def of_selected_rows(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    rows = (x[:, 0] > 0).nonzero().flatten()
    return net.t(z.index_add(0, rows, net.b(z[rows])))


# 13. What is cut, and how ----------------------------------------------------------------------------------------


def _with_class_weights(batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(batch, D), (torch.randint(0, C, (batch,)), torch.linspace(0.5, 2.0, 12))


@attack(
    13, data=_with_class_weights, loss=lambda: lambda out, y: F.cross_entropy(out, y[0], reduction="none") * y[1][C]
)
def constant_as_long_as_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), (torch.randint(0, 12, (b,)), torch.linspace(0.5, 2.0, 12))),
    loss=lambda: lambda out, y: F.cross_entropy(out, y[0], y[1], reduction="none"),
    parts=lambda: {"t": nn.Linear(H, 12)},
)
def class_weights_as_long_as_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), [i % C for i in range(b)]),
    loss=lambda: lambda out, y: F.cross_entropy(out, torch.tensor((list(y) * 2)[: len(out)]), reduction="none"),
)
def list_of_labels(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), np.arange(b) % C),
    loss=lambda: lambda out, y: F.cross_entropy(out, torch.from_numpy(y)[: len(out)], reduction="none"),
)
def numpy_labels(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


def _bags(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    return (torch.randint(0, V, (batch * 2,)), torch.arange(0, batch * 2, 2)), torch.randint(0, C, (batch,))


@attack(13, data=_bags, parts=lambda: {"bag": nn.EmbeddingBag(V, H)})
def embedding_bag_with_offsets(net: Any, x: Tensor, offsets: Tensor) -> Tensor:
    return net.t(net.bag(x, offsets))


@attack(
    13,
    data=lambda b: ((torch.randint(0, V, (b,)), torch.arange(b)), torch.randint(0, C, (b,))),
    parts=lambda: {"bag": nn.EmbeddingBag(V, H)},
)
def bags_of_one_word(net: Any, x: Tensor, offsets: Tensor) -> Tensor:
    return net.t(net.bag(x, offsets))


def _packed(batch: int) -> tuple[Any, Tensor]:
    lengths = torch.arange(batch) % 3 + 2
    packed = pack_padded_sequence(torch.randn(batch, 4, D), lengths, batch_first=True, enforce_sorted=False)
    return packed, torch.randint(0, C, (batch,))


@attack(13, data=_packed, parts=lambda: {"rnn": nn.GRU(D, H, batch_first=True)})
def packed_sequence(net: Any, x: Any) -> Tensor:
    return net.t(pad_packed_sequence(net.rnn(x)[0], batch_first=True)[0].mean(1))


Pair = namedtuple("Pair", ["left", "right"])


@attack(13, data=lambda b: (Pair(torch.randn(b, D), torch.randn(b, D)), torch.randint(0, C, (b,))), two_pass="right")
def named_tuple(net: Any, x: Pair) -> Tensor:
    return net.t(net.a(x.left) + net.a(x.right))


@dataclasses.dataclass
class Sample:
    left: Tensor
    note: str = ""


@attack(
    13,
    data=lambda b: (Sample(torch.randn(b, D), "a"), torch.randint(0, C, (b,))),
    two_pass="right",
    loss=lambda: lambda out, y: F.cross_entropy(out.left, y, reduction="none"),
)
def data_class(net: Any, x: Sample) -> Sample:
    return Sample(net.t(net.a(x.left)))


class Opaque:
    def __init__(self, inner: Tensor) -> None:
        self.inner = inner


@attack(13, data=lambda b: (Opaque(torch.randn(b, D)), torch.randint(0, C, (b,))))
def object_of_its_own(net: Any, x: Opaque) -> Tensor:
    return net.t(net.a(x.inner))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), torch.randn(b * C)),
    loss=lambda: lambda out, y: (out - y.view(-1, C)[: len(out)]).square().mean(1),
)
def targets_in_one_row(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(13, data=lambda b: ((torch.randn(b, D), torch.randn(12, D)), torch.randint(0, C, (b,))))
def prototypes_as_many_as_samples(net: Any, x: Tensor, prototypes: Tensor) -> Tensor:
    return net.t(net.a(x) - net.a(prototypes).mean(0))


@attack(
    13,
    data=lambda b: ({"x": torch.randn(b, D), "scale": torch.full((D,), 0.5), "mode": "a"}, torch.randint(0, C, (b,))),
    two_pass="right",
)
def mapping_with_constants(net: Any, x: Tensor, scale: Tensor, mode: str) -> Tensor:
    return net.t(net.a(x * scale))


@attack(
    13,
    data=lambda b: (torch.randn(b, D), {"label": torch.randint(0, C, (b,)), "names": [str(i) for i in range(b)]}),
    loss=lambda: lambda out, y: F.cross_entropy(out, y["label"], reduction="none") * len(y["names"]) / 12,
)
def names_of_samples(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


# 14. Samples interact, plainly -----------------------------------------------------------------------------------


@attack(14)
def cumulative(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).cumsum(0))


@attack(14)
def softmax_along_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x).softmax(0))


@attack(14)
def einsum_over_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + torch.einsum("bh,bk->hk", z, z)[0])


@attack(14)
def gram(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + (z @ z.T) @ z / len(z))


@attack(14)
def distances(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * torch.cdist(z, z).mean(1, keepdim=True))


@attack(14)
def convolved_along_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    kernel = net.b.weight[:, :, None].expand(-1, -1, 3)
    return net.t(F.conv1d(z.T[None], kernel, padding=1)[0].T)


@attack(14)
def recurrent_along_the_batch(net: Any, x: Tensor) -> Tensor:
    z, out = net.a(x), []
    state = torch.zeros(H)
    for row in z:
        state = torch.tanh(row + 0.5 * state)
        out.append(state)
    return net.t(torch.stack(out))


@attack(14)
def counts_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) / len(x))


@attack(14)
def stop_gradient_gate(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * (z > z.mean(0)).detach())


@attack(14)
def rank_in_the_batch(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z * (z.argsort(0).argsort(0) > len(z) // 2))


@attack(14)
def mixed_up(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(0.7 * z + 0.3 * z[torch.randperm(len(z))])


@attack(14)
def mixed_in_training_only(net: Any, x: Tensor) -> Tensor:
    z = F.dropout(net.a(x), 0.2, net.training)
    return net.t(z - z.mean(0) if net.training else z)


@attack(14, loss=lambda: lambda out, y: F.cross_entropy(out, y, reduction="none") + 0.1 * out.mean(0).square().sum())
def regularised_by_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x))


@attack(14, two_pass="right", loss=lambda: lambda out, y: F.cross_entropy(out, y, reduction="none"))
def weight_penalty(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x)) + net.a.weight.square().sum() * 0.01


@attack(14)
def first_row_for_all(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(z + z[0])
