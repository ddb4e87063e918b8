"""Rounding to e4m3 with a scale for each block: a kernel for either memory order, and its reference in plain torch.

    s_b = max over block b of |x| / 448, rounded up to a power of two;   y = round(x / s_b)

Blocks are 128 columns of one row, or squares of 128 rows and columns.

Legend: x is [M, K], of any dtype and either order; 128 divides K, and M where blocks are squares. y [M, K] is
row-major. Scales are fp32, laid out as cuBLAS reads them on Hopper: [M, K / 128] column-major, or of squares
[M / 128, L] row-major with L = K / 128 rounded up to 4, zeros behind.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.ops.kernels.optional_triton import tl, triton
from colrow.ops.kernels.rounding import scale_constants, scale_of, scales_reference

E4M3 = torch.float8_e4m3fn
BLOCK = 128
_ROWS = 32
"""Rows of a program's tile, whose blocks are one row high."""


def round_blocks(x_MK: Tensor, *, square: bool = False) -> tuple[Tensor, Tensor]:
    """y and scales."""
    M, K = x_MK.shape
    blocks = K // BLOCK
    y = torch.empty(M, K, dtype=E4M3, device=x_MK.device)
    if square:
        scales = torch.zeros(M // BLOCK, -(-blocks // 4) * 4, device=x_MK.device)
    else:
        scales = torch.empty(blocks, M, device=x_MK.device).t()
    if x_MK.is_cuda:
        round_blocks_triton(x_MK, y, scales, square=square)
    else:
        peaks = x_MK.float().abs().unflatten(1, (blocks, BLOCK)).amax(2)
        if square:
            peaks = peaks.unflatten(0, (M // BLOCK, BLOCK)).amax(1)
        scales[:, :blocks].copy_(scales_reference(peaks, E4M3))
        y.copy_(x_MK.float() / expanded(scales, M, K))
    return y, scales


def expanded(scales: Tensor, M: int, K: int) -> Tensor:
    """[M, K]: the scale of each number."""
    of_columns = scales[:, : K // BLOCK].repeat_interleave(BLOCK, 1)
    return of_columns.repeat_interleave(M // len(scales), 0)


def round_blocks_triton(x_MK: Tensor, y: Tensor, scales: Tensor, *, square: bool) -> None:
    M, K = x_MK.shape
    rows = BLOCK if square else _ROWS
    _round_blocks_kernel[(triton.cdiv(M, rows) * (K // BLOCK),)](
        x_MK,
        x_MK.stride(0),
        x_MK.stride(1),
        y,
        scales,
        scales.stride(0),
        scales.stride(1),
        M,
        K,
        **scale_constants(E4M3),
        SQUARE=square,
        ROWS=rows,
        COLUMNS=BLOCK,
        num_warps=8,
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _round_blocks_kernel(  # type: ignore[no-untyped-def]
        x,
        x_row,
        x_column,
        y,
        scales,
        scale_row,
        scale_column,
        M,
        K,
        CARRY: tl.constexpr,
        SHIFT: tl.constexpr,
        SMALLEST: tl.constexpr,
        SQUARE: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        block = tl.program_id(0) % (K // COLUMNS)
        tile_m = tl.program_id(0) // (K // COLUMNS)
        m = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        k = block.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (m < M)[:, None]
        value = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
        # bits of floats that are not negative are ordered as they are, and those of NaN are the largest
        bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
        if SQUARE:
            s = scale_of(tl.max(bits, None).to(tl.float32, bitcast=True), CARRY, SHIFT, SMALLEST)
            tl.store(scales + tile_m * scale_row + block * scale_column, s)
            scaled = value * (1.0 / s)
        else:
            s = scale_of(tl.max(bits, 1).to(tl.float32, bitcast=True), CARRY, SHIFT, SMALLEST)
            tl.store(scales + m * scale_row + block * scale_column, s, mask=m < M)
            scaled = value * (1.0 / s)[:, None]
        tl.store(y + m[:, None] * K + k[None, :], scaled.to(y.dtype.element_ty), mask=inside)
