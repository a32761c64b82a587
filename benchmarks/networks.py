"""The networks whose steps are timed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from batchtrim.lab.task import models


class Vit(nn.Module):
    """Six layers of width 256 over the 16 patches of 8 x 8 pixels of a 32 x 32 image."""

    def __init__(self, attention: str, width: int = 256, layers: int = 6) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 8, stride=8)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.batch_first = attention == "batch_first"
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, activation="gelu", batch_first=self.batch_first, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).flatten(2).transpose(1, 2) + self.position
        h = self.encoder(h) if self.batch_first else self.encoder(h.transpose(0, 1)).transpose(0, 1)
        return self.head(h.mean(1))


def resnet18(norm: str) -> nn.Module:
    return models.build("resnet18", (3, 32, 32), 10, width=32, norm=norm)


def bert(dropout: float = 0.1) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=1024,
        vocab_size=4096,
        num_labels=10,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


class Refused(nn.Module):
    """A network whose forward looks at a value of its batch, which no engine but the exact one runs."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.network(x)
        return outputs if outputs.isfinite().all() else outputs.nan_to_num()


def small(name: str) -> nn.Module:
    """Return a network of the lab, so small that its steps take milliseconds."""
    return models.build(name, (3, 32, 32), 10, norm="group")
