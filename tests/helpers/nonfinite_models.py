"""A small model whose loss, or gradient alone, is not finite in some training steps of one rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

BAD_CALLS: set[int] = set()
"""Forwards in training, counted from 1, that go wrong on the last rank."""
WRONG = "loss"
"""What is not finite in them: `loss` and gradient, or `gradient` alone."""


class Spoiled(torch.autograd.Function):
    """Identity whose gradient is infinite."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.inf


class Model(nn.Module):
    """Keeps a running mean of its activations, which a bad forward spoils too."""

    mean: Tensor

    def __init__(self, vocab: int = 300, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)
        self.register_buffer("mean", torch.zeros(width))
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        if self.training:
            self.calls += 1
            if self.calls in BAD_CALLS and dist.get_rank() == dist.get_world_size() - 1:
                x = x * torch.nan if WRONG == "loss" else Spoiled.apply(x)
            self.mean.mul_(0.9).add_(x.detach().mean((0, 1)), alpha=0.1)
        return self.head(x)


def build() -> Model:
    torch.manual_seed(0)
    return Model()
