"""Rounding to 8-bit floats: a kernel for tensors of either memory order, and its reference in plain torch.

    s = max |x| / the dtype's largest number, rounded up to a power of two;   y = round(x / s)

With the peak of the last step (`ops.float8`, [Note: peak history]) nothing is looked for before x is rounded:

    s = `HEADROOM` times the scale of the last peak;   y = round(clamp(x / s));   the pass finds the new peak as it goes

A power of two divides and multiplies exactly, so y of one scale becomes y of a larger one by a second rounding that
only the smallest numbers of the dtype notice: chunks that ranks rounded apart are joined so.

Legend: x is [M, K], of any dtype. `rows` is y [M, K], `transposed` its transpose [K, M]; each is row-major, or a slice
of the rows or columns of such a tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from colrow.ops.kernels.optional_triton import tl, triton

SMALLEST = torch.finfo(torch.float32).tiny  # a scale of zero (x is all zeros) would give 0 / 0
MANTISSA = 0x7FFFFF
HEADROOM = {torch.float8_e4m3fn: 2.0, torch.float8_e5m2: 16.0}
"""By how much numbers may at least outgrow those of the last step before they are cut off; that scales are rounded up
gives up to twice as much. A power of two keeps the mantissa, and costs as many of the dtype's smallest binades: one of
the 18 of e4m3, whose activations hardly change from step to step; four of the 32 of e5m2, since gradients do."""
_ROWS, _COLUMNS = 64, 128
_BOTH = 128
"""The sides of a tile that is written in both orders: 128 bytes of either."""
_BLOCK = 4096
_CHUNK = 8 * _BLOCK
"""Elements of which a program finds the largest."""


def peak_of(parts: list[Tensor], unless: Tensor | None = None) -> Tensor:
    """max |x| of each part, fp32 [parts]; NaN where a part holds one. Where `unless` begins with a number above 0, the
    values mean nothing: on GPUs x is not read then."""
    if not parts[0].is_cuda:
        return torch.stack([part.float().abs().amax() for part in parts])
    return peak_triton(parts, unless)


def peak_triton(parts: list[Tensor], unless: Tensor | None = None) -> Tensor:
    peaks = torch.zeros(len(parts), device=parts[0].device)
    for part, peak in zip(parts, peaks.unbind(), strict=True):
        if part.is_contiguous() or part.t().is_contiguous():  # the order does not matter
            size = part.numel()
            _peak_kernel[(triton.cdiv(size, _CHUNK),)](
                part,
                peak.view(torch.int32),
                peak if unless is None else unless,
                size,
                MAY_SKIP=unless is not None,
                CHUNK=_CHUNK,
                BLOCK=_BLOCK,
                num_warps=8,
            )
        else:
            torch.linalg.vector_norm(part, torch.inf, dtype=torch.float32, out=peak)
    return peaks


def scale_reference(peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of [parts] largest values: fp32, []. In bits, since a division would round beside a power of two."""
    return scales_reference(peaks.amax(), dtype)


def scales_reference(peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each of `peaks`, fp32."""
    mantissa, exponent = largest_number(dtype)
    up = ((peaks.view(torch.int32) + (MANTISSA - mantissa)) & ~MANTISSA).view(torch.float32)
    scale = (up * 2.0**-exponent).clamp(min=SMALLEST)
    return torch.where(peaks < torch.inf, scale, peaks)


def largest_number(dtype: torch.dtype) -> tuple[int, int]:
    """The dtype's largest number: its mantissa in fp32's bits, and its exponent."""
    half, exponent = math.frexp(torch.finfo(dtype).max)
    return int((2 * half - 1) * (MANTISSA + 1)), exponent - 1


def scale_constants(dtype: torch.dtype) -> dict[str, Any]:
    """What `scale_of` takes besides a peak, for scales of this dtype."""
    mantissa, exponent = largest_number(dtype)
    return {"CARRY": MANTISSA - mantissa, "SHIFT": 2.0**-exponent, "SMALLEST": SMALLEST}


def delayed_scale_reference(history: Tensor, peaks: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale by the last step's peak; by `peaks` where there is none."""
    last = history[0]
    return torch.where(last > 0, HEADROOM[dtype] * scales_reference(last, dtype), scale_reference(peaks, dtype))


def round_reference(
    x_MK: Tensor,
    scale: Tensor,
    x_scale: Tensor | None,
    rows: Tensor | None,
    transposed: Tensor | None,
    history: Tensor | None = None,
) -> None:
    """Write y into `rows` and its transpose into `transposed`.

    Args:
        x_scale: the scale of x, whose numbers stand for `x_scale` times themselves; none for numbers as they are.
        history: gets max |x|, and finite numbers beyond the dtype's range are cut off.
    """
    y = x_MK.float() * ((1.0 if x_scale is None else x_scale) / scale)
    if history is not None:
        dtype = (rows if rows is not None else transposed).dtype  # type: ignore[union-attr]
        limit = torch.finfo(dtype).max
        y = torch.where(x_MK.isfinite(), y.clamp(-limit, limit), torch.nan)
        # past the version counter: autograd keeps the history for backward, and would take the write for an error
        seen = history.data[1]
        seen.copy_(torch.maximum(seen, x_MK.float().abs().amax()))
    for into, value in ((rows, y), (transposed, y.t())):
        if into is not None:
            into.copy_(value.to(into.dtype))


def round_triton(
    x_MK: Tensor,
    peaks: Tensor,
    scale: Tensor,
    x_scale: Tensor | None,
    rows: Tensor | None,
    transposed: Tensor | None,
    *,
    given: bool = False,
    history: Tensor | None = None,
) -> None:
    """`round_reference`, and the scale, which it writes. x is read once for both orders where tiles divide it.

    Args:
        peaks: the largest values that the scale follows from; with `given` the scales, of which it is the largest.
    """
    M, K = x_MK.shape
    orders: list[tuple[Tensor, Tensor, Tensor | None]]
    # Triton 3.6 transposes an 8-bit tile wrongly where its threads hold four numbers in a row, as with fp32 (H200)
    one_pass = M % _BOTH == K % _BOTH == 0 and x_MK.stride(1) == 1 and x_MK.itemsize < 4
    if rows is not None and transposed is not None and one_pass:
        grid, tile, orders = (M // _BOTH) * (K // _BOTH), (_BOTH, _BOTH), [(x_MK, rows, transposed)]
    else:
        grid, tile = 0, (_ROWS if x_MK.itemsize > 1 else _BOTH, _COLUMNS)  # a tile's column is 128 bytes of x
        orders = [(x_MK, rows, None)] if rows is not None else []
        orders += [(x_MK.t(), transposed, None)] if transposed is not None else []
    dtype = (rows if rows is not None else transposed).dtype  # type: ignore[union-attr]
    for x, into, y_transposed in orders:
        m, k = x.shape
        _round_kernel[(grid or triton.cdiv(m, tile[0]) * triton.cdiv(k, tile[1]),)](
            x,
            x.stride(0),
            x.stride(1),
            into,
            into.stride(0),
            into if y_transposed is None else y_transposed,
            0 if y_transposed is None else y_transposed.stride(0),
            peaks,
            scale,
            scale if x_scale is None else x_scale,
            scale if history is None else history,
            m,
            k,
            PARTS=len(peaks),
            **scale_constants(dtype),
            GIVEN=given,
            SCALED=x_scale is not None,
            DELAYED=history is not None,
            HEADROOM=HEADROOM[dtype],
            BOTH=y_transposed is not None,
            COLUMN_MAJOR=x.stride(0) == 1,
            ROWS=tile[0],
            COLUMNS=tile[1],
            num_warps=8,
        )


scale_of: Any = None
"""In kernels: the scale of a peak, as `scales_reference` has it."""

if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _peak_kernel(  # type: ignore[no-untyped-def]
        x, peak, unless, size, MAY_SKIP: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
    ):
        if MAY_SKIP:  # noqa: SIM102 (Triton's `and` would not leave the load out)
            if tl.load(unless) > 0:
                return
        start = tl.program_id(0).to(tl.int64) * CHUNK
        largest = tl.zeros((BLOCK,), tl.int32)
        for offset in range(0, CHUNK, BLOCK):
            at = start + offset + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32)
            # bits of floats that are not negative are ordered as they are, and those of NaN are the largest
            largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        tl.atomic_max(peak, tl.max(largest, 0))

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def scale_of(peak, CARRY: tl.constexpr, SHIFT: tl.constexpr, SMALLEST: tl.constexpr):  # type: ignore[no-untyped-def]
        up = ((peak.to(tl.int32, bitcast=True) + CARRY) & 0x7F800000).to(tl.float32, bitcast=True)
        return tl.where(peak < float("inf"), tl.maximum(up * SHIFT, SMALLEST), peak)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _note_peak(value, history):  # type: ignore[no-untyped-def]
        # Over all elements at once: threads find their own largest before they talk to each other.
        largest = tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, None)
        seen = (history + 1).to(tl.pointer_type(tl.int32), bitcast=True)
        # one address for all programs: those that have nothing larger only read it
        tl.atomic_max(seen, largest, mask=largest > tl.load(seen))

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _round_kernel(  # type: ignore[no-untyped-def]
        x,
        x_row,
        x_column,
        y,
        y_row,
        y_transposed,
        y_transposed_row,
        peaks,
        scale,
        x_scale,
        history,
        M,
        K,
        PARTS: tl.constexpr,
        CARRY: tl.constexpr,
        SHIFT: tl.constexpr,
        SMALLEST: tl.constexpr,
        GIVEN: tl.constexpr,
        SCALED: tl.constexpr,
        DELAYED: tl.constexpr,
        HEADROOM: tl.constexpr,
        BOTH: tl.constexpr,
        COLUMN_MAJOR: tl.constexpr,
        ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):
        place = tl.num_programs(0) - 1 - tl.program_id(0)  # from the end of x in memory, which the cache still has
        if COLUMN_MAJOR:
            tile_m, tile_k = place % tl.cdiv(M, ROWS), place // tl.cdiv(M, ROWS)
        else:
            tile_m, tile_k = place // tl.cdiv(K, COLUMNS), place % tl.cdiv(K, COLUMNS)
        m = tile_m.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        k = tile_k.to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        s = tl.load(peaks)
        for i in tl.static_range(1, PARTS):
            s = tl.maximum(s, tl.load(peaks + i), propagate_nan=tl.PropagateNan.ALL)
        last = tl.load(history) if DELAYED else 0.0
        if DELAYED:
            s = tl.where(last > 0, last, s)
        if not GIVEN:
            s = scale_of(s, CARRY, SHIFT, SMALLEST)
        if DELAYED:
            s = tl.where(last > 0, s * HEADROOM, s)
        factor = 1.0 / s
        if SCALED:
            factor *= tl.load(x_scale)
        if BOTH:
            value = tl.load(x + m[:, None] * x_row + k[None, :] * x_column).to(tl.float32)
            scaled = value * factor
            if DELAYED:
                scaled += value - value  # NaN where value is none or infinite: the conversion cuts off infinity too
                _note_peak(value, history)
            rounded = scaled.to(y.dtype.element_ty)
            tl.store(y + m[:, None] * y_row + k[None, :], rounded)
            tl.store(y_transposed + k[:, None] * y_transposed_row + m[None, :], tl.trans(rounded))
        else:
            inside = (m < M)[:, None] & (k < K)[None, :]
            value = tl.load(x + m[:, None] * x_row + k[None, :] * x_column, mask=inside, other=0.0).to(tl.float32)
            scaled = value * factor
            if DELAYED:
                scaled += value - value  # NaN where value is none or infinite: the conversion cuts off infinity too
                _note_peak(value, history)
            tl.store(y + m[:, None] * y_row + k[None, :], scaled.to(y.dtype.element_ty), mask=inside)
        if place == 0:  # all programs computed the same scale
            tl.store(scale, s)
