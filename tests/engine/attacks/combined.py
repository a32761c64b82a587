"""Parts of training programs: recurrent state, custom autograd functions, several batches in one, graphs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import C, D, H, attack, backward_of

# 26. What training programs are made of; more in users.py


def long(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 5, D), torch.randint(0, C, (batch,))


@attack(26, data=long, parts=lambda: {"rnn": nn.GRU(D, H, batch_first=True)})
def hidden_state_carried_over(net: Any, x: Tensor) -> Tensor:
    """From batch to batch, detached."""
    state = getattr(net, "state", None)
    if state is not None and state.shape[1] != len(x):
        state = None
    out, state = net.rnn(x, state)
    net.state = state.detach()
    return net.t(out[:, -1])


@attack(26, data=long, parts=lambda: {"cell": nn.LSTMCell(D, H)})
def cell_state_carried_over(net: Any, x: Tensor) -> Tensor:
    h, c = getattr(net, "state", (None, None))
    if h is None or len(h) != len(x):
        h = c = x.new_zeros(len(x), H)
    for step in x.unbind(1):
        h, c = net.cell(step, (h, c))
    net.state = h.detach(), c.detach()
    return net.t(h)


def _both(out: Any, y: Any) -> Tensor:
    kinds, domains = out
    return F.cross_entropy(kinds, y[0], reduction="none") + F.cross_entropy(domains, y[1], reduction="none")


def _with_domains(batch: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    return torch.randn(batch, D), (torch.randint(0, C, (batch,)), torch.randint(0, 2, (batch,)))


_reversed = backward_of(lambda g: -0.3 * g)


@attack(26, data=_with_domains, loss=lambda: _both, two_pass="right")
def gradient_reversal(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net.a(x).tanh()
    return net.t(z), net.h(_reversed(z))


class Asking(torch.autograd.Function):
    """A linear layer that computes the gradients that are asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        asked = ctx.needs_input_grad
        return g @ weight if asked[0] else None, g.T @ x if asked[1] else None, g.sum(0) if asked[2] else None


@attack(26, two_pass="right")
def function_that_asks_what_is_needed(net: Any, x: Tensor) -> Tensor:
    return net.t(Asking.apply(x, net.a.weight, net.a.bias).tanh())


class Remembering(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        ctx.save_for_backward(x.mean(0))
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * (1 + ctx.saved_tensors[0]) / ctx.rows


@attack(26)
def function_that_remembers_the_batch(net: Any, x: Tensor) -> Tensor:
    return net.t(Remembering.apply(net.a(x)))


class Again(torch.autograd.Function):
    """A residual layer that is run again in backward, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module, *_: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(x)
        return x + layer(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = x + ctx.layer(x)
        found = torch.autograd.grad(y, [x, *ctx.layer.parameters()], g)
        return found[0], None, *found[1:]


@attack(26, two_pass="right")
def function_that_runs_a_layer_again(net: Any, x: Tensor) -> Tensor:
    return net.t(Again.apply(net.a(x), net.b, *net.b.parameters()))


@attack(26, two_pass="approximate")
def two_dropouts_of_one_sample(net: Any, x: Tensor) -> Tensor:
    """R-Drop: the batch twice in one."""
    left, right = net.t(F.dropout(net.a(torch.cat([x, x])), 0.3, net.training)).chunk(2)
    return left + 0.1 * (left - right).square()


@attack(26, data=lambda b: ((torch.randn(b, D), torch.randn(b, D)), torch.randint(0, C, (b,))), two_pass="right")
def pairs_in_one_batch(net: Any, left: Tensor, right: Tensor) -> Tensor:
    a, b = net.a(torch.cat([left, right])).split(len(left))
    return net.t((a - b).abs())


def _views_with_crops(out: Any, y: Tensor) -> Tensor:
    views, crops = out[0].softmax(1).detach().chunk(2), out[1].log_softmax(1).chunk(4)
    return sum((-view * crop).sum(1) for view in views for crop in crops)  # type: ignore[return-value]


@attack(26, loss=lambda: _views_with_crops, two_pass="right", shared="right")
def every_view_with_every_crop(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    z = net.a(x)
    return net.t(torch.cat([z, 2 * z])), net.t(torch.cat([z, -z, z.sin(), 3 * z]))


@attack(26, two_pass="right")
def repeated_row_by_row(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x).repeat_interleave(3, 0)).view(-1, 3, H).mean(1))


def _both_kinds(out: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(out[0], y, reduction="none") + out[1].view(-1, 3, C).square().mean((1, 2))


@attack(
    26, data=lambda b: ((torch.randn(b, D), torch.randn(3 * b, D)), torch.randint(0, C, (b,))), loss=lambda: _both_kinds
)
def labelled_and_unlabelled(net: Any, x: Tensor, unlabelled: Tensor) -> tuple[Tensor, Tensor]:
    out = net.t(net.a(torch.cat([x, unlabelled])).tanh())
    return out[: len(x)], out[len(x) :]


def clips(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 4, 2, 6, 6), torch.randint(0, C, (batch,))


@attack(26, data=clips, parts=lambda: {"conv": nn.Conv2d(2, H, 3)}, two_pass="right")
def channels_shifted_over_frames(net: Any, x: Tensor) -> Tensor:
    z = net.conv(x.flatten(0, 1)).view(*x.shape[:2], H, 4, 4)
    shifted = torch.zeros_like(z)
    shifted[:, :-1, :2] = z[:, 1:, :2]
    shifted[:, 1:, 2:4] = z[:, :-1, 2:4]
    shifted[:, :, 4:] = z[:, :, 4:]
    return net.t(shifted.mean((1, 3, 4)))


@attack(26, data=clips, parts=lambda: {"conv": nn.Conv2d(2, H, 3)})
def channels_shifted_over_samples(net: Any, x: Tensor) -> Tensor:
    z = net.conv(x.flatten(0, 1))
    shifted = torch.zeros_like(z)
    shifted[:-1, :2] = z[1:, :2]
    shifted[:, 2:] = z[:, 2:]
    return net.t(shifted.view(*x.shape[:2], H, 4, 4).mean((1, 3, 4)))


def graphs(batch: int) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    nodes = torch.arange(3 * batch)
    edges = torch.stack([nodes, nodes // 3 * 3 + (nodes + 1) % 3])
    return (torch.randn(len(nodes), D), edges, nodes // 3), torch.randint(0, C, (batch,))


@attack(26, data=graphs)
def graphs_in_one_batch(net: Any, x: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
    z = net.a(x)
    z = torch.zeros_like(z).index_add(0, edges[1], net.b(z)[edges[0]])
    return net.t(z.new_zeros(len(x) // 3, H).index_add(0, graph, z))


def ring(batch: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    nodes = torch.arange(batch)
    return (torch.randn(batch, D), torch.stack([nodes, nodes.roll(1)])), torch.randint(0, C, (batch,))


@attack(26, data=ring)
def nodes_of_a_graph(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    z = net.a(x)
    return net.t(torch.zeros_like(z).index_add(0, edges[1], net.b(z)[edges[0]]))


@attack(26, data=ring)
def nodes_of_a_graph_by_a_sparse_matrix(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    links = torch.sparse_coo_tensor(edges, torch.ones(edges.shape[1]), (len(x), len(x)))
    return net.t(torch.sparse.mm(links, net.a(x)))
