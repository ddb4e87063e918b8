"""Softmax statistics of a vocabulary shard, and from all shards' statistics the loss and the logits' gradient.

Two kernels, each with its reference in plain torch. Both read the rank's logits once; the second overwrites them with
their gradient. Between them the statistics of all ranks are all-gathered: four numbers a token.

For a token with logits z over the vocabulary V, target y, smoothing e and z-loss factor c (everything in fp32, or in
fp64 for fp64 logits):

    lse  = log sum_v exp(z_v)
    loss = lse - (1 - e) z_y - e/V sum_v z_v + c lse^2
    dz_v = (1 + 2 c lse) exp(z_v - lse) - (1 - e) [v = y] - e/V

Legend: C tokens of a chunk, v this rank's classes, n ranks, K = 4 statistics: maximum, sum of exp(z - maximum),
the target's logit (0 where another rank has it), sum of logits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from colrow.ops.kernels.optional_triton import tl, triton
from colrow.ops.products import sum_dtype

STATISTICS = 4


@dataclass(frozen=True)
class LossTerms:
    """The constants of the loss; `first` is the class of this rank's first logit."""

    vocab_size: int
    first: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0


def statistics_reference(z_Cv: Tensor, y_C: Tensor, terms: LossTerms) -> Tensor:
    """[K, C] of this rank's logits."""
    z = z_Cv.to(sum_dtype(z_Cv.dtype))
    peak = z.amax(-1)
    column = y_C - terms.first
    mine = (column >= 0) & (column < z.shape[1])
    target = z.gather(1, torch.where(mine, column, 0)[:, None])[:, 0]
    return torch.stack([peak, (z - peak[:, None]).exp().sum(-1), torch.where(mine, target, 0.0), z.sum(-1)])


def loss_reference(
    z_Cv: Tensor, y_C: Tensor, stats_nKC: Tensor, scale: Tensor, terms: LossTerms, write_gradient: bool
) -> Tensor:
    """Loss [C] times `scale` (a scalar), 0 for ignored tokens, nan for targets outside the vocabulary.

    With `write_gradient` the logits become d(scaled loss) / d(logits), in place.
    """
    peaks, sums, targets, totals = stats_nKC.unbind(1)
    peak = peaks.amax(0)
    lse = peak + ((peaks - peak).exp() * sums).sum(0).log()
    smooth = terms.label_smoothing
    loss = lse - (1 - smooth) * targets.sum(0) - smooth / terms.vocab_size * totals.sum(0) + terms.z_loss * lse.square()
    counts = y_C != terms.ignore_index
    outside = counts & ((y_C < 0) | (y_C >= terms.vocab_size))
    loss = torch.where(counts, loss * scale, 0.0)
    loss = torch.where(outside, torch.nan, loss)
    if write_gradient:
        z = z_Cv.to(stats_nKC.dtype)
        column = y_C - terms.first
        mine = (column >= 0) & (column < z.shape[1])
        dz = (z - lse[:, None]).exp() * (1 + 2 * terms.z_loss * lse)[:, None] - smooth / terms.vocab_size
        dz.scatter_add_(1, torch.where(mine, column, 0)[:, None], mine.to(dz.dtype)[:, None] * (smooth - 1))
        z_Cv.copy_(torch.where(counts[:, None], dz * scale, 0.0))
    return loss


def statistics_triton(z_Cv: Tensor, y_C: Tensor, terms: LossTerms) -> Tensor:
    """`statistics_reference` in one pass over the logits."""
    C, v = z_Cv.shape
    stats = torch.empty(STATISTICS, C, dtype=sum_dtype(z_Cv.dtype), device=z_Cv.device)
    _statistics_kernel[(C,)](
        z_Cv, z_Cv.stride(0), y_C, stats, C, terms.first, v, WIDE=_triton_dtype(stats), BLOCK=_block(v), num_warps=8
    )
    return stats


def loss_triton(
    z_Cv: Tensor, y_C: Tensor, stats_nKC: Tensor, scale: Tensor, terms: LossTerms, write_gradient: bool
) -> Tensor:
    """`loss_reference` in one pass over the logits, read and written."""
    C, v = z_Cv.shape
    loss = torch.empty(C, dtype=stats_nKC.dtype, device=z_Cv.device)
    block = _block(v)
    _loss_kernel[(C, triton.cdiv(v, block) if write_gradient else 1)](
        z_Cv,
        z_Cv.stride(0),
        y_C,
        stats_nKC.contiguous(),
        scale,
        loss,
        C,
        v,
        terms.first,
        terms.ignore_index,
        VOCAB=terms.vocab_size,  # constants keep the floats in double precision
        SMOOTHING=terms.label_smoothing,
        Z_LOSS=terms.z_loss,
        RANKS=stats_nKC.shape[0],
        WIDE=_triton_dtype(loss),
        WRITE=write_gradient,
        BLOCK=block,
        num_warps=8,
    )
    return loss


def _block(columns: int) -> int:
    return min(4096, max(128, triton.next_power_of_2(columns)))


def _triton_dtype(x: Tensor) -> Any:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _statistics_kernel(z, z_stride, y, stats, C, first, v: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        row = tl.program_id(0).to(tl.int64)  # a chunk may hold more than 2^31 logits
        z += row * z_stride
        columns = tl.arange(0, BLOCK)
        peak = tl.full([BLOCK], float("-inf"), WIDE)
        sum_exp = tl.zeros([BLOCK], WIDE)
        total = tl.zeros([BLOCK], WIDE)
        for start in range(0, v, BLOCK):
            inside = start + columns < v
            x = tl.load(z + start + columns, mask=inside, other=float("-inf")).to(WIDE)
            new_peak = tl.maximum(peak, x)
            # A lane that has seen nothing has peak -inf: -inf - -inf would be nan.
            seen = new_peak > float("-inf")
            kept = tl.where(peak > float("-inf"), tl.exp(peak - new_peak), 0.0)
            sum_exp = tl.where(seen, sum_exp * kept + tl.exp(x - new_peak), 0.0)
            peak = new_peak
            total += tl.where(inside, x, 0.0)
        row_peak = tl.max(peak, 0)
        row_sum = tl.sum(tl.where(peak > float("-inf"), sum_exp * tl.exp(peak - row_peak), 0.0), 0)
        column = tl.load(y + row) - first
        mine = (column >= 0) & (column < v)
        target = tl.load(z + tl.where(mine, column, 0), mask=mine, other=0.0).to(WIDE)
        tl.store(stats + row, row_peak)
        tl.store(stats + C + row, row_sum)
        tl.store(stats + 2 * C + row, target)
        tl.store(stats + 3 * C + row, tl.sum(total, 0))

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _loss_kernel(  # type: ignore[no-untyped-def]
        z,
        z_stride,
        y,
        stats,
        scale,
        loss,
        C,
        v,
        first,
        ignore_index,
        VOCAB: tl.constexpr,
        SMOOTHING: tl.constexpr,
        Z_LOSS: tl.constexpr,
        RANKS: tl.constexpr,
        WIDE: tl.constexpr,
        WRITE: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        part = tl.program_id(1)
        label = tl.load(y + row)
        factor = tl.load(scale).to(WIDE)
        peak = tl.load(stats + row)
        for rank in tl.static_range(1, RANKS):
            peak = tl.maximum(peak, tl.load(stats + rank * 4 * C + row))
        total_exp = tl.zeros([], WIDE)
        target = tl.zeros([], WIDE)
        total = tl.zeros([], WIDE)
        for rank in tl.static_range(RANKS):
            part_of = stats + rank * 4 * C + row
            total_exp += tl.exp(tl.load(part_of) - peak) * tl.load(part_of + C)
            target += tl.load(part_of + 2 * C)
            total += tl.load(part_of + 3 * C)
        lse = peak + tl.log(total_exp)
        counts = label != ignore_index
        if part == 0:  # of the programs that share a token, one writes its loss
            value = lse - (1 - SMOOTHING) * target - SMOOTHING / VOCAB * total + Z_LOSS * lse * lse
            value = tl.where(counts, value * factor, 0.0)
            outside = counts & ((label < 0) | (label >= VOCAB))
            tl.store(loss + row, tl.where(outside, float("nan"), value))
        if WRITE:
            columns = part * BLOCK + tl.arange(0, BLOCK)
            inside = columns < v
            at = z + row * z_stride + columns
            x = tl.load(at, mask=inside, other=float("-inf")).to(WIDE)
            dz = tl.exp(x - lse) * (1 + 2 * Z_LOSS * lse) - SMOOTHING / VOCAB
            dz -= (columns == label - first).to(WIDE) * (1 - SMOOTHING)
            dz = tl.where(counts, dz * factor, 0.0)
            tl.store(at, dz.to(z.dtype.element_ty), mask=inside)
