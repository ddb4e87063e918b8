"""The sum of the chunks that a rank got from the others, in one pass.

y = slots[0] + ... + slots[n - 1], in fp32 for low precision, and rounded once
y = s (own + received[0] + ... + received[n - 2]) [+ y], into a wider tensor
"""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.ops.kernels.optional_triton import tl, triton

_BLOCK = 4096


def sum_slots(slots: Tensor) -> Tensor:
    """[n, ...] contiguous -> [...]. Plain torch where the kernel is not for it."""
    if triton is None or not slots.is_cuda or slots.dtype == torch.float64:
        return slots.sum(0)
    return sum_triton(slots)


def sum_triton(slots: Tensor) -> Tensor:
    """Four chunks of 32 MiB in 41 us on an H200; `slots.sum(0)` takes 66 (equal bits up to four chunks)."""
    total = torch.empty_like(slots[0])
    size = total.numel()
    _sum_kernel[(triton.cdiv(size, _BLOCK),)](slots, total, size, RANKS=slots.shape[0], BLOCK=_BLOCK, num_warps=8)
    return total


def add_received(
    own: Tensor, received: Tensor, total: Tensor, scale: float, *, add: bool, squares: Tensor | None = None
) -> None:
    """Write into `total` [t], or add to it, `scale` times the sum of `own` [t] and `received` [n - 1, t], whose rows
    are contiguous, in the dtype of `total`.

    Args:
        squares: [square_terms(t)], of total's dtype: gets terms whose sum is that of the squares of the new `total`.
    """
    if triton is None or not own.is_cuda or total.dtype == torch.float64:
        summed = (received.sum(0, dtype=total.dtype) + own).mul_(scale)
        total.add_(summed) if add else total.copy_(summed)
        if squares is not None and len(squares):
            squares.zero_()  # the kernel writes a term for each of its blocks; here there is one
            squares[0] = total.square().sum()
        return
    assert received.stride(1) == 1, "the kernel reads rows"
    if total.numel():
        add_triton(own, received, total, scale, add=add, squares=squares)


def square_terms(size: int) -> int:
    """Terms of `add_received`'s sum of squares."""
    return -(-size // _BLOCK)


def add_triton(
    own: Tensor, received: Tensor, total: Tensor, scale: float, *, add: bool, squares: Tensor | None = None
) -> None:
    assert total.dtype == torch.float32, "the kernel computes in fp32"
    others, size = received.shape
    _received_kernel[(square_terms(size),)](
        own,
        received,
        total,
        total if squares is None else squares,
        size,
        received.stride(0),
        scale,
        OTHERS=others,
        ADD=add,
        SQUARES=squares is not None,
        BLOCK=_BLOCK,
        num_warps=8,
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _sum_kernel(  # type: ignore[no-untyped-def]
        slots, total, size, RANKS: tl.constexpr, BLOCK: tl.constexpr
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        chunk = slots + at
        value = tl.load(chunk, mask=inside, other=0.0).to(tl.float32)
        # in rank order, and not by atomics: every run adds in the same order, to the same bits
        for _ in tl.static_range(1, RANKS):
            chunk += size
            value += tl.load(chunk, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + at, value.to(total.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _received_kernel(  # type: ignore[no-untyped-def]
        own,
        received,
        total,
        squares,
        size,
        stride,
        scale,
        OTHERS: tl.constexpr,
        ADD: tl.constexpr,
        SQUARES: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        value = tl.load(own + at, mask=inside, other=0.0).to(tl.float32)
        row = received + at
        for _ in tl.static_range(OTHERS):
            value += tl.load(row, mask=inside, other=0.0).to(tl.float32)
            row += stride
        value *= scale
        if ADD:
            value += tl.load(total + at, mask=inside, other=0.0)
        tl.store(total + at, value, mask=inside)
        if SQUARES:
            tl.store(squares + tl.program_id(0), tl.sum(value * value))
