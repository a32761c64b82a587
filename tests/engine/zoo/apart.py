"""Networks in which rows never interact: all of their backward can run on the kept ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Residual(nn.Module):
    """Convolutions, a norm, in-place activations and an in-place residual add on a remembered output."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = F.relu(self.norm1(self.conv1(x)), inplace=True)
        out = self.norm2(self.conv2(out))
        out += x
        out.relu_()
        return self.head(out.mean((2, 3)))


class AddOnConvolution(nn.Module):
    """An in-place add straight onto a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y += self.b(x)
        y.relu_()
        return self.head(y.mean((2, 3)))


class GatedAttention(nn.Module):
    """A mask made of the values themselves: its gradient lies in memory in another order for one kept row."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gate, self.head = nn.Embedding(11, 6), nn.Linear(6, 2), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        value = self.embed(x)
        mask = F.softplus(self.gate(value)).transpose(1, 2)[:, :, None]
        heads = value.unflatten(-1, (2, 3)).transpose(1, 2)
        mixed = (heads @ heads.transpose(-1, -2) + mask).softmax(-1) @ heads
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


class Slopes(nn.Module):
    """Scaled by powers of a constant, as ALiBi, below a batch mean: backward computes them again on all rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        slopes = torch.pow(torch.tensor(2.0**-0.5), torch.arange(1, 5))
        scaled = self.embed(x) * slopes
        return self.head((scaled - scaled.mean(0)).tanh())


class Encoder(nn.Module):
    """A transformer encoder, batch-first or time-major inside."""

    def __init__(self, batch_first: bool, dropout: float = 0.0, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.batch_first = batch_first
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=dropout, batch_first=batch_first)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.encoder(h) if self.batch_first else self.encoder(h.transpose(0, 1)).transpose(0, 1)
        return self.head(h.mean(1))


class Attention(nn.Module):
    """nn.MultiheadAttention with its weights asked for: (B * heads, T, T) products and dropout on them."""

    def __init__(self, dropout: float, batch_first: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.attention = nn.MultiheadAttention(16, 4, dropout=dropout, batch_first=batch_first)
        self.batch_first = batch_first
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h if self.batch_first else h.transpose(0, 1)
        out, _ = self.attention(h, h, h)
        return self.head(out.mean(1 if self.batch_first else 0))


class Mlp(nn.Sequential):
    """A hidden width equal to the batch size, or to a divisor of it."""

    def __init__(self, hidden: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.Linear(8, hidden),
            nn.Tanh(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.Tanh(),
            nn.Linear(hidden, 5),
        )


class StochasticDepth(nn.Module):
    """Drops a branch for single samples, by a mask of shape (B, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        mask = x.new_empty((x.shape[0], 1)).bernoulli_(0.5)
        x = x + torch.tanh(self.b(x)) * mask / 0.5
        return self.head(x)


class Tied(nn.Module):
    """One weight used twice, once transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.mix = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embed(x))).mean(1)
        return h @ self.embed.weight.t()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Dropout(dropout))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head(checkpoint(self.block, h, use_reentrant=self.use_reentrant))


class WindowShift(nn.Module):
    """Windows folded in front of the batch, as neither plain batch-major nor time-major: (w, B, h) in one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        b = x.shape[0]
        h = x.view(b, 2, 3, 4).permute(1, 0, 2, 3).reshape(2 * b * 3, 4)
        h = torch.tanh(self.mix(h)).view(2, b, 3, 4).permute(1, 0, 2, 3)
        return self.head(h.mean((1, 2)))


class ZeroInit(nn.Module):
    """A branch that gives zeros at first: nothing to tell layouts apart by."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.branch, self.head = nn.Linear(16, 16), nn.Linear(16, 5)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(0, 1)
        h = h + self.branch(h)
        return self.head(h.mean(0))


class Counter(nn.Module):
    """A buffer moved in place, one assigned anew, and a power iteration as in spectral normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(8, 8), nn.Linear(8, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("assigned", torch.zeros(()))
        self.register_buffer("u", F.normalize(torch.ones(8), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.assigned = self.assigned + 1
        weight = self.first.weight
        with torch.no_grad():
            v = F.normalize(weight.t() @ self.u, dim=0)
            self.u.copy_(F.normalize(weight @ v, dim=0))
        return self.head(torch.tanh(F.linear(x, weight / (self.u @ weight @ v), self.first.bias)))


class Recurrent(nn.Module):
    def __init__(self, dropout: float = 0.0, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.lstm = nn.LSTM(16, 12, num_layers=layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(x))[0][:, -1])


def spectral() -> nn.Module:
    """torch's own spectral normalisation: power iteration on buffers in every forward."""
    first = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(8, 5))


class Autocast(nn.Module):
    """A network under bf16 autocast."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return self.inner(x).float()


class ZeroInitDropout(ZeroInit):
    """Dropout on time-major activations, batch and time merged, that are all zero at first."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).transpose(0, 1).reshape(-1, 16)
        h = h + F.dropout(self.branch(h), 0.5)
        return self.head(h.view(x.shape[1], x.shape[0], 16).mean(0))


class LanguageModel(nn.Module):
    """A causal transformer with tied weights: next tokens from tokens."""

    def __init__(self, words: int = 30, width: int = 16, layers: int = 2, longest: int = 32) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "mlp": nn.Sequential(
                        nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                    ),
                }
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.position(torch.arange(x.shape[1]))
        for layer in self.layers:
            parts = layer["qkv"](layer["norm"](h)).chunk(3, -1)
            q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in parts)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            h = h + layer["out"](mixed)
            h = h + layer["mlp"](h)
        return self.norm(h) @ self.embed.weight.t()


class Prototypes(nn.Module):
    """A radial basis layer over distances to prototypes, below a head of prototypes of tokens; p = 1 and 2."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.near, self.mix = nn.Linear(8, 6), nn.Parameter(torch.randn(9, 6)), nn.Linear(9, 12)
        self.classes = nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        basis = torch.exp(-torch.cdist(self.lift(x).tanh(), self.near))
        return -torch.cdist(self.mix(basis).unflatten(1, (3, 4)), self.classes, p=1.0).amin(1)


class OwnKernels(nn.Module):
    """Each sample is convolved with kernels made of it: groups of one convolution, then of a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.style, self.weight, self.head = (
            nn.Linear(3, 3),
            nn.Parameter(torch.randn(4, 3, 3, 3) * 0.3),
            nn.Linear(3, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        style = 1 + self.style(x.mean((2, 3)))
        weight = (self.weight * style[:, None, :, None, None]).flatten(0, 1)
        x = F.conv2d(x.reshape(1, -1, height, width), weight, padding=1, groups=batch).relu()
        x = F.conv_transpose2d(x, weight, style.flatten(), stride=2, groups=batch)
        return self.head(x.unflatten(1, (batch, 3)).mean((0, 3, 4)))


class Transformed(nn.Module):
    """A spatial transformer, patches, and sub-pixel convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.where, self.patches, self.finer = nn.Linear(192, 6), nn.Linear(12, 12), nn.Conv2d(3, 12, 3, padding=1)
        self.head = nn.Conv2d(3, 5, 3)
        nn.init.normal_(self.where.weight, std=0.01)
        self.where.bias.data = torch.eye(2, 3).flatten()

    def forward(self, x: Tensor) -> Tensor:
        grid = F.affine_grid(self.where(x.flatten(1)).unflatten(1, (2, 3)), list(x.shape), align_corners=False)
        x = F.grid_sample(x, grid, align_corners=False)
        x = F.fold(self.patches(F.unfold(x, 2, stride=2).mT).tanh().mT, x.shape[-2:], 2, stride=2)
        return self.head(F.pixel_shuffle(self.finer(x), 2)).mean((2, 3))


class Matrices(nn.Module):
    """Each sample has matrices of its own: solved, inverted, decomposed, with the logarithm of a determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.head = nn.Linear(8, 9), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        a = self.lift(x).unflatten(1, (3, 3))
        spd = a @ a.mT + torch.diag(torch.tensor([1.0, 2.0, 4.0]))
        solved = torch.linalg.solve(spd, a[:, 0]) + torch.cholesky_solve(a[..., :1], torch.linalg.cholesky(spd))[..., 0]
        values = torch.linalg.eigh(spd)[1].square().mT @ torch.linalg.inv(spd).diagonal(dim1=1, dim2=2)[..., None]
        return self.head(torch.cat([solved, values[..., 0]], 1)) * torch.linalg.slogdet(spd)[1][:, None]
