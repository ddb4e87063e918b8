"""Quantization to 8-bit floats: a kernel for tensors of either memory order, and its reference in plain torch.

    s = max |x| / the dtype's largest number;   y = round(x / s)

x may be given as several tensors, which concatenated make it: they share one scale.

Legend: x is [M, K], and so is each of its parts in one of the dims. y is row-major.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from colrow.ops.kernels.optional_triton import tl, triton

SMALLEST = torch.finfo(torch.float32).tiny  # a scale of zero (x is all zeros) would give 0 / 0
_ROWS, _COLUMNS = 64, 128
_BLOCK = 4096
_CHUNK = 8 * _BLOCK
"""Elements of which a program finds the largest."""


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
    y_MK = torch.empty(M, K, device=parts[0].device, dtype=dtype)
    scale, peaks = torch.empty((), device=y_MK.device), _peaks(parts)
    for part, into in zip(parts, y_MK.split(sizes, dim), strict=True):
        _round(part, into, peaks, scale)
    return y_MK, scale


def round_both_triton(x_MK: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`round_reference` of x and of its transpose, which share the scale: values [M, K], values [K, M], scale."""
    M, K = x_MK.shape
    y_MK, y_KM = (torch.empty(shape, device=x_MK.device, dtype=dtype) for shape in ((M, K), (K, M)))
    scale, peaks = torch.empty((), device=x_MK.device), _peaks([x_MK])
    _round(x_MK, y_MK, peaks, scale)
    _round(x_MK.t(), y_KM, peaks, scale)
    return y_MK, y_KM, scale


def _peaks(parts: Sequence[Tensor]) -> Tensor:
    """max |x| of each part; NaN where a part holds one."""
    peaks = torch.zeros(len(parts), device=parts[0].device)
    for part, peak in zip(parts, peaks.unbind(), strict=True):
        if part.is_contiguous() or part.t().is_contiguous():  # the order does not matter
            size = part.numel()
            _peak_kernel[(triton.cdiv(size, _CHUNK),)](
                part, peak.view(torch.int32), size, CHUNK=_CHUNK, BLOCK=_BLOCK, num_warps=8
            )
        else:
            torch.linalg.vector_norm(part, torch.inf, dtype=torch.float32, out=peak)
    return peaks


def _round(x_MK: Tensor, into_MK: Tensor, peaks: Tensor, scale: Tensor) -> None:
    """Write `into` and the scale, which follows from the largest of `peaks`."""
    M, K = x_MK.shape
    _round_kernel[(triton.cdiv(M, _ROWS) * triton.cdiv(K, _COLUMNS),)](
        x_MK,
        x_MK.stride(0),
        x_MK.stride(1),
        into_MK,
        into_MK.stride(0),
        peaks,
        scale,
        M,
        K,
        PARTS=len(peaks),
        LARGEST=torch.finfo(into_MK.dtype).max,
        SMALLEST=SMALLEST,
        TURNED=x_MK.stride(0) == 1,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=8,
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _peak_kernel(  # type: ignore[no-untyped-def]
        x, peak, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr
    ):
        start = tl.program_id(0).to(tl.int64) * CHUNK
        largest = tl.zeros((BLOCK,), tl.int32)
        for offset in range(0, CHUNK, BLOCK):
            at = start + offset + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
            # bits of floats that are not negative are ordered as they are, and those of NaN are the largest
            largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        tl.atomic_max(peak, tl.max(largest, 0))

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
        TURNED: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        place = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end of x in memory, which the cache still has
        if TURNED:
            tile_m, tile_k = place % tl.cdiv(M, ROWS), place // tl.cdiv(M, ROWS)
        else:
            tile_m, tile_k = place // tl.cdiv(K, COLUMNS), place % tl.cdiv(K, COLUMNS)
        m = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        k = tile_k.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        at = m * 0
        peak = tl.load(peaks + at)
        for i in tl.static_range(1, PARTS):
            peak = tl.maximum(peak, tl.load(peaks + i + at))
        s = tl.maximum(peak / LARGEST, SMALLEST)
        inside = (m < M)[:, None] & (k < K)[None, :]
        value = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + m[:, None] * y_row + k[None, :], (value / s[:, None]).to(y.dtype.element_ty), mask=inside)
        tl.store(scale + at, s, mask=(m == 0) & (tile_k == 0))
