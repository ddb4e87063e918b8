"""What ranks hold of a tensor by its layout, and whether results on ranks are what a layout says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colrow.sharding.local_layout import Kind, Layout, repeating, sharded

RANKS = 2


def parts(whole: Tensor, layout: Layout) -> list[Tensor]:
    """What each rank holds of a tensor."""
    if layout.kind is Kind.REPLICATED:
        return [whole] * RANKS
    if layout.kind is Kind.PARTIAL:
        terms = [torch.randn_like(whole) for _ in range(RANKS - 1)]
        return [*terms, whole - sum(terms)]
    if layout.kind is Kind.POSITIONS:
        return [whole.narrow(layout.dim, 0, whole.shape[layout.dim] // RANKS)] * RANKS
    sizes = layout.sizes(whole.shape[layout.dim])
    chunks: list[Any] = []
    segments = whole.split(list(layout.repeated or sizes), layout.dim)
    for i, (segment, size) in enumerate(zip(segments, sizes, strict=True)):
        times = size // segment.shape[layout.dim]  # each row as often as it is repeated
        complete = [segment] * RANKS
        chunks.append(
            complete if i in layout.complete else segment.repeat_interleave(times, layout.dim).chunk(RANKS, layout.dim)
        )
    return [torch.cat([chunk[rank] for chunk in chunks], layout.dim) for rank in range(RANKS)]


def agrees(results: list[Tensor], whole: Tensor, layout: Layout) -> bool:
    """Whether the ranks' results have this relation to the unsharded one."""
    if layout.kind is Kind.PARTIAL:
        return torch.allclose(sum(results, torch.zeros(())).to(whole.dtype), whole, equal_nan=True)
    pairs = zip(results, parts(whole, layout), strict=True)
    return all(got.shape == want.shape and torch.allclose(got, want, equal_nan=True) for got, want in pairs)


aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default


def x(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def written(value: int) -> Tensor:
    """An index as code writes it down: fake tensors know its value."""
    index = torch.tensor([value])
    index.constant = index  # type: ignore[attr-defined]
    return index


S0, S1, S2 = sharded(0), sharded(1), sharded(2)
POSITIONS = Layout(Kind.POSITIONS, 0)
QUERIES_AND_ALL_KV = repeating(1, (4, 8), (4, 4), (1,))
"""Four query features, of which a rank has two, and four of the one k and v head, of which it has all."""
