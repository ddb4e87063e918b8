"""Models that draw random numbers in training, for `model.python`."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.models.llama import Block, Llama
from colrow.models.shapes import shape

WIDTH, HEADS, VOCAB = 32, 4, 300
SEEN: list[Tensor] = []
"""The residual masks of `Gpt`'s embedding in this process, in training, in order."""


class Attention(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).view(*x.shape[:2], -1, WIDTH // HEADS).transpose(1, 2) for proj in (self.q, self.k, self.v))
        p = self.p if self.training else 0.0
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.inner, self.p = nn.Dropout(p), p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(self.inner(F.gelu(self.up(x)))), self.p, self.training)


class GptBlock(nn.Module):
    def __init__(self, p: float, skip: float) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(WIDTH), Attention(p)
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), Mlp(p)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        kept = self.training and random.random() < self.skip
        return x + self.mlp(self.norm2(x)) * (0.5 if kept else 1.0)


class Gpt(nn.Module):
    """Dropout of embeddings, activations, residuals and attention; noise of a generator of its own, one of Python's; a
    buffer that every forward writes; in training mode its logits are scaled."""

    usage: Tensor

    def __init__(self, p: float = 0.2, layers: int = 2, skip: float = 0.5) -> None:
        super().__init__()
        self.embed, self.p = nn.Embedding(VOCAB, WIDTH), p
        self.blocks = nn.ModuleList(GptBlock(p, skip) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.noise = torch.Generator()
        self.register_buffer("usage", torch.zeros(()))
        self.config = SimpleNamespace(vocab_size=VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        if self.training:
            mask = F.dropout(torch.ones_like(x), self.p)
            if type(mask) is Tensor:  # not a dry run's
                SEEN.append(mask.detach())
            x = x * mask + 0.01 * torch.randn(WIDTH, generator=self.noise).to(x)
        with torch.no_grad():
            self.usage += 1
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return logits if self.training else logits * 0


def gpt() -> Gpt:
    return Gpt()


class DroppingBlock(Block):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return F.dropout(super().forward(x, **options), 0.1, self.training)


def llama() -> Llama:
    """One that a pipeline can split."""
    model = Llama(replace(shape("laptop"), num_hidden_layers=2, vocab_size=VOCAB))
    for layer in model.layers:
        layer.__class__ = DroppingBlock
    return model
