"""The cross-entropy kernels against autograd in float64: random shapes, ragged ones, uneven shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.ops.kernels.cross_entropy import LossTerms, loss_reference, statistics_reference

IGNORE = -100


@dataclass(frozen=True)
class Case:
    tokens: int
    vocab: int
    ranks: int = 1
    smoothing: float = 0.0
    z_loss: float = 0.0
    spread: float = 3.0


CASES = [
    Case(1, 2),
    Case(5, 7, ranks=2, smoothing=0.1),
    Case(33, 128, z_loss=1e-2),
    Case(8, 129, ranks=4, smoothing=0.3, z_loss=1e-2),
    Case(3, 4099, ranks=2),
    Case(4, 9001, ranks=2, smoothing=0.1, z_loss=1e-3),
    Case(6, 64, spread=60.0),  # exponentials that overflow unless the maximum is taken off
]


@contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds nan: what is read before it is written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def draw(case: Case, device: str, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = (torch.randn(case.tokens, case.vocab, generator=generator) * case.spread).to(device, dtype)
    y = torch.randint(0, case.vocab, (case.tokens,), generator=generator)
    y[1::3] = IGNORE
    return z, y.to(device)


def expected(case: Case, z: Tensor, y: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Each token's loss and the gradient of the logits, by autograd in float64."""
    z = z.double().requires_grad_()
    loss = F.cross_entropy(z, y, reduction="none", ignore_index=IGNORE, label_smoothing=case.smoothing)
    loss = (loss + torch.where(y != IGNORE, case.z_loss * z.logsumexp(-1).square(), 0.0)) * scale
    loss.sum().backward()
    assert z.grad is not None
    return loss.detach(), z.grad


def computed(case: Case, z: Tensor, y: Tensor, scale: float, kernels: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same from shards, as the ranks would: every rank's loss must be equal, the gradients are put together."""
    statistics, loss = kernels
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    terms = LossTerms(case.vocab, 0, IGNORE, case.smoothing, case.z_loss)
    shards = [shard.clone() for shard in z.chunk(case.ranks, 1)]
    rows = -(-case.vocab // case.ranks)
    with poisoned():
        own = [replace(terms, first=rank * rows) for rank in range(case.ranks)]
        stats = torch.stack([statistics(shard, y, mine) for shard, mine in zip(shards, own, strict=True)])
        factor = torch.tensor(scale, dtype=wide, device=z.device)
        losses = [loss(shard, y, stats, factor, mine, True) for shard, mine in zip(shards, own, strict=True)]
    return losses[0], torch.cat(shards, 1), losses[1:]


def worst_error(case: Case, device: str, dtype: torch.dtype, kernels: Any, seed: int = 0) -> float:
    """Largest error of loss and gradient, relative to the largest value of each."""
    z, y = draw(case, device, dtype, seed)
    loss, gradient, others = computed(case, z, y, 0.37, kernels)
    for other in others:
        assert torch.equal(loss, other), "ranks disagree about the loss"
    errors = []
    for got, want in zip((loss, gradient), expected(case, z, y, 0.37), strict=True):
        assert got.isfinite().all()
        errors.append(((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)).item())
    return max(errors)


REFERENCE = (statistics_reference, loss_reference)
