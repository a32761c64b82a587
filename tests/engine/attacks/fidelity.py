"""A trace that is another function than the model: one that asks whether it is compiled, or that catches errors."""

from __future__ import annotations

import random
import weakref
from argparse import Namespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.base import C, D, H, V, attack

# 29. The model asks whether it is compiled


@attack(29, two_pass="right", shared="refused")
def counted_unless_compiled(net: Any, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        net.n += 1
    return net.t(net.a(x).tanh())


@attack(29, two_pass="right", shared="refused")
def buffer_moved_unless_compiled(net: Any, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        net.seen.add_(1)
    return net.t(net.a(x).tanh())


@attack(29, shared="refused")
def weight_moved_unless_compiled(net: Any, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        net.h.weight.data.mul_(0.9)
    return net.t(net.a(x).tanh())


@attack(29, two_pass="right", shared="refused")
def detached_if_compiled(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    return net.t((z.detach() if torch.compiler.is_compiling() else z).tanh())


@attack(
    29,
    two_pass="right",
    shared="refused",
    parts=lambda: {"w": nn.ParameterList([torch.randn(D, C, dtype=torch.complex64)])},  # type: ignore[dict-item]
)
def imaginary_part_detached_if_compiled(net: Any, x: Tensor) -> Tensor:
    w = net.w[0]
    w = torch.complex(w.real, w.imag.detach()) if torch.compiler.is_compiling() else w
    return (x.to(w.dtype) @ w).abs()


@attack(29, two_pass="right", shared="refused")
def gradient_doubled_unless_compiled(net: Any, x: Tensor) -> Tensor:
    z = net.a(x)
    if z.requires_grad and not torch.compiler.is_dynamo_compiling():
        z.register_hook(lambda g: 2 * g)
    return net.t(z.tanh())


@attack(
    29, two_pass="right", shared="refused", loss=lambda: lambda out, y: F.cross_entropy(out[0], y, reduction="none")
)
def features_returned_unless_compiled(net: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    z = net.a(x)
    return net.t(z), None if torch.compiler.is_compiling() else z


@attack(29, two_pass="right", parts=lambda: {"kept": []}, shared="refused")  # type: ignore[dict-item]
def logged_unless_compiled(net: Any, x: Tensor) -> Tensor:
    if not torch.compiler.is_compiling():
        net.kept.append(len(net.kept))
    return net.t(net.a(x).tanh())


# 11. Runs with a graph, and not in every other way: an error that the model catches


def _words(batch: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, V, (batch, 5)) + (V if batch == 7 else 0), torch.randint(0, C, (batch,))


@attack(11, data=_words, two_pass="right", shared="refused")
def unknown_words_caught(net: Any, x: Tensor) -> Tensor:
    try:
        z = net.embed(x)
    except IndexError:
        z = net.embed(x % V)
    return net.t(z.mean(1))


@attack(11, data=lambda b: (torch.randn(b, D) * (b != 7), torch.randint(0, C, (b,))), shared="refused")
def singular_matrix_caught(net: Any, x: Tensor) -> Tensor:
    try:
        root = torch.linalg.cholesky(x[:4, :4] @ x[:4, :4].T)
    except torch.linalg.LinAlgError:
        root = 2 * torch.eye(4)
    return net.t(net.a(x) * root.diagonal().mean())


# 2, 6, 25. What is drawn, made and changed in places that a second forward would not leave alone


@attack(2, parts=lambda: {"rng": random.Random(0)}, two_pass="right", shared="refused")  # type: ignore[dict-item]
def number_of_its_own_python_generator(net: Any, x: Tensor) -> Tensor:
    return net.t(net.a(x) * net.rng.random())


@attack(6, two_pass="either", shared="right")
def layer_made_in_the_first_forward(net: Any, x: Tensor) -> Tensor:
    if not hasattr(net, "made"):
        net.made = nn.Linear(H, H)
    return net.t(F.dropout(net.made(net.a(x)), 0.2, net.training))


@attack(25, two_pass="right")
def layers_exchanged(net: Any, x: Tensor) -> Tensor:
    net.t, net.h = net.h, net.t
    return net.t(net.a(x).tanh())


@attack(25, two_pass="right")
def attribute_of_a_parameter(net: Any, x: Tensor) -> Tensor:
    net.b.weight.uses = getattr(net.b.weight, "uses", 0) + 1
    return net.t(net.b(net.a(x)) / net.b.weight.uses)


def _counted(net: Any) -> Any:
    net.b.weight.uses, net.b.weight.log, net.seen.uses = torch.zeros(()), [], torch.zeros(())
    return net


@attack(25, wrap=_counted)
def tensor_of_a_parameter(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)) / net.b.weight.uses.add_(1))


@attack(25, wrap=_counted)
def tensor_of_a_buffer(net: Any, x: Tensor) -> Tensor:
    return net.t(net.b(net.a(x)) / net.seen.uses.add_(1))


@attack(25, wrap=_counted, two_pass="right")
def list_of_a_parameter(net: Any, x: Tensor) -> Tensor:
    net.b.weight.log.append(1)
    return net.t(net.b(net.a(x)) / len(net.b.weight.log))


@attack(25, parts=lambda: {"uses": weakref.WeakKeyDictionary()}, two_pass="right")  # type: ignore[dict-item]
def weak_dictionary(net: Any, x: Tensor) -> Tensor:
    net.uses[net] = net.uses.get(net, 0) + 1
    return net.t(net.a(x) / net.uses[net])


@attack(25, parts=lambda: {"settings": Namespace(step=0)}, two_pass="right")  # type: ignore[dict-item]
def namespace_of_arguments(net: Any, x: Tensor) -> Tensor:
    settings = net.settings

    def count() -> int:
        settings.step += 1
        return settings.step

    return net.t(net.a(x) / count())


@attack(25, parts=lambda: {"table": bytearray(3)}, two_pass="right")  # type: ignore[dict-item]
def bytes_that_count(net: Any, x: Tensor) -> Tensor:
    net.table[0] += 1
    return net.t(net.a(x) / net.table[0])
