"""Rounding to e4m3 with a scale for each row: a kernel for either memory order, and its reference in plain torch.

    s_m = max_k |x_mk| / 448, rounded up to a power of two;   y_mk = round(x_mk / s_m)

Legend: x is [M, K], of any dtype and either order. y [M, K] is row-major, scales [M] are fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.ops.kernels.optional_triton import tl, triton
from colrow.ops.kernels.rounding import scale_constants, scale_of, scales_reference

E4M3 = torch.float8_e4m3fn


def round_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """y and scales."""
    y = torch.empty(x_MK.shape, dtype=E4M3, device=x_MK.device)
    scales = torch.empty(x_MK.shape[0], device=x_MK.device)
    if x_MK.is_cuda:
        round_rows_triton(x_MK, y, scales)
    else:
        scales.copy_(scales_reference(x_MK.float().abs().amax(1), E4M3))
        y.copy_((x_MK.float() / scales[:, None]).to(E4M3))
    return y, scales


def round_rows_triton(x_MK: Tensor, y: Tensor, scales: Tensor) -> None:
    M, K = x_MK.shape
    # Threads read along the dim that is contiguous; a program's rows are read twice, the second time from the cache.
    rows, columns = (64, 64) if x_MK.stride(0) == 1 else (8, 512)
    _round_rows_kernel[(triton.cdiv(M, rows),)](
        x_MK,
        x_MK.stride(0),
        x_MK.stride(1),
        y,
        scales,
        M,
        K=K,
        **scale_constants(E4M3),
        ROWS=rows,
        COLUMNS=columns,
        num_warps=8,
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _round_rows_kernel(  # type: ignore[no-untyped-def]
        x,
        x_row,
        x_column,
        y,
        scales,
        M,
        K: tl.constexpr,
        CARRY: tl.constexpr,
        SHIFT: tl.constexpr,
        SMALLEST: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        largest = tl.zeros((ROWS,), tl.int32)
        for start in range(0, K, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            inside = (m < M)[:, None] & (k < K)[None, :]
            value = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
            # bits of floats that are not negative are ordered as they are, and those of NaN are the largest
            bits = value.to(tl.int32, bitcast=True) & 0x7FFFFFFF
            largest = tl.maximum(largest, tl.max(bits, 1))
        s = scale_of(largest.to(tl.float32, bitcast=True), CARRY, SHIFT, SMALLEST)
        tl.store(scales + m, s, mask=m < M)
        factor = 1.0 / s
        for start in range(0, K, COLUMNS):
            k = start + tl.arange(0, COLUMNS)
            inside = (m < M)[:, None] & (k < K)[None, :]
            value = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
            rounded = (value * factor[:, None]).to(y.dtype.element_ty)
            tl.store(y + m[:, None] * K + k[None, :], rounded, mask=inside)
