"""Rounding to 8-bit floats: a kernel that reads a tensor either way round and writes rows, and its plain reference.

    s = max |x| / the type's largest number;   y = round(x / s)

The maximum is over all of x, or over each row. x may be given as parts beside each other, which then share scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

triton: Any
try:
    import triton  # type: ignore[no-redef, unused-ignore]
    import triton.language as tl

    UNAVAILABLE = ""
except ImportError as error:
    triton, UNAVAILABLE = None, str(error)

SMALLEST = torch.finfo(torch.float32).tiny
_ROWS, _COLUMNS = 64, 128


def round_reference(x_MK: Tensor, dtype: torch.dtype, *, rowwise: bool) -> tuple[Tensor, Tensor]:
    """[M, K] -> the same in 8 bits, contiguous, and the scale by which it was divided: fp32, [] or [M, 1]."""
    x = x_MK.float()
    peak = x.abs().amax(1, keepdim=True) if rowwise else x.abs().amax()
    scale = (peak / torch.finfo(dtype).max).clamp(min=SMALLEST)
    return (x / scale).to(dtype).contiguous(), scale


def round_triton(parts: Sequence[Tensor], dtype: torch.dtype, *, rowwise: bool, dim: int = 0) -> tuple[Tensor, Tensor]:
    """`round_reference` of the parts put together along `dim`, without putting them together first.

    Each is read twice, once for the maximum; columns that lie in a row in memory become rows on the way.
    """
    sizes = [part.shape[dim] for part in parts]
    M, K = (sum(sizes), parts[0].shape[1]) if dim == 0 else (parts[0].shape[0], sum(sizes))
    device = parts[0].device
    y_MK = torch.empty(M, K, device=device, dtype=dtype)
    scale = torch.empty((M, 1) if rowwise else (), device=device)
    own_rows = rowwise and dim == 0
    peaks = torch.empty(1 if own_rows else len(parts), M if rowwise else 1, device=device)
    places = list(zip(parts, y_MK.split(sizes, dim), range(len(parts)), _starts(sizes), strict=True))
    for part, _, i, start in places:
        peak = peaks[0, start : start + part.shape[0]] if own_rows else peaks[i]
        dims, into = (1, peak) if rowwise else (None, peak[0])
        torch.linalg.vector_norm(part, torch.inf, dims, dtype=torch.float32, out=into)
    for part, into, _, start in places:
        m, k = part.shape
        _round_kernel[(triton.cdiv(m, _ROWS), triton.cdiv(k, _COLUMNS))](
            part,
            part.stride(0),
            part.stride(1),
            into,
            into.stride(0),
            peaks,
            scale,
            m,
            k,
            peaks.shape[1],
            start if own_rows else 0,
            PARTS=peaks.shape[0],
            ROWWISE=rowwise,
            LARGEST=torch.finfo(dtype).max,
            SMALLEST=SMALLEST,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
    return y_MK, scale


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _round_kernel(  # type: ignore[no-untyped-def]
        x,
        x_row,
        x_column,
        y,
        y_row,
        peaks,
        scale,
        M,
        K,
        peak_rows,
        first,
        PARTS: tl.constexpr,
        ROWWISE: tl.constexpr,
        LARGEST: tl.constexpr,
        SMALLEST: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        k = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        at = tl.where(m < M, first + m, 0) if ROWWISE else m * 0
        peak = tl.load(peaks + at)
        for i in tl.static_range(1, PARTS):
            peak = tl.maximum(peak, tl.load(peaks + i * peak_rows + at))
        s = tl.maximum(peak / LARGEST, SMALLEST)
        inside = (m < M)[:, None] & (k < K)[None, :]
        value = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + m[:, None] * y_row + k[None, :], (value / s[:, None]).to(y.dtype.element_ty), mask=inside)
        if tl.program_id(1) == 0:
            tl.store(scale + at, s, mask=(m < M) if ROWWISE else m == 0)
