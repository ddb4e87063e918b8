"""Quantization to 8-bit floats: a kernel for tensors of either memory order, and its reference in plain torch.

    s = max |x| / the dtype's largest number;   y = round(x / s)

x may be given as several tensors, which concatenated make it: they share one scale.

Legend: x is [M, K], and so is each of its parts in one of the dims. y is row-major.
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

SMALLEST = torch.finfo(torch.float32).tiny  # a scale of zero (x is all zeros) would give 0 / 0
_ROWS, _COLUMNS = 64, 128


def round_reference(x_MK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[M, K] -> the same in 8 bits, contiguous, and the scale by which it was divided: fp32, []."""
    x = x_MK.float()
    scale = (x.abs().amax() / torch.finfo(dtype).max).clamp(min=SMALLEST)
    return (x / scale).to(dtype).contiguous(), scale


def round_triton(parts: Sequence[Tensor], dtype: torch.dtype, *, dim: int = 0) -> tuple[Tensor, Tensor]:
    """`round_reference` of the parts concatenated along `dim`, without the copy that concatenation takes.

    Each part is read twice, once for the maximum. A column-major part is transposed on the way.
    """
    sizes = [part.shape[dim] for part in parts]
    M, K = (sum(sizes), parts[0].shape[1]) if dim == 0 else (parts[0].shape[0], sum(sizes))
    device = parts[0].device
    y_MK = torch.empty(M, K, device=device, dtype=dtype)
    scale = torch.empty((), device=device)
    peaks = torch.empty(len(parts), device=device)
    for part, peak in zip(parts, peaks.unbind(), strict=True):
        torch.linalg.vector_norm(part, torch.inf, dtype=torch.float32, out=peak)
    for part, into in zip(parts, y_MK.split(sizes, dim), strict=True):
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
            PARTS=len(parts),
            LARGEST=torch.finfo(dtype).max,
            SMALLEST=SMALLEST,
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            num_warps=8,
        )
    return y_MK, scale


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
        PARTS: tl.constexpr,
        LARGEST: tl.constexpr,
        SMALLEST: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        m = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        k = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        at = m * 0
        peak = tl.load(peaks + at)
        for i in tl.static_range(1, PARTS):
            peak = tl.maximum(peak, tl.load(peaks + i + at))
        s = tl.maximum(peak / LARGEST, SMALLEST)
        inside = (m < M)[:, None] & (k < K)[None, :]
        value = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + m[:, None] * y_row + k[None, :], (value / s[:, None]).to(y.dtype.element_ty), mask=inside)
        if tl.program_id(1) == 0:
            tl.store(scale + at, s, mask=m == 0)
