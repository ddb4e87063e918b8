"""Matmuls of 8-bit floats: operands scaled into the type's range and rounded, sums in fp32.

    y = (round(a / s) round(b / r)) s r        s, r: max |.| / the dtype's largest number, up to a power of two

The recipe `tensorwise`: one scale for each operand, found in each call; with `delayed` that of an activation or a
gradient follows from its largest number in the last step. For the other recipes see `ops.weights`. Weights and
activations are e4m3 (three bits of mantissa, up to 448). Gradients are e5m2 (two bits, up to 57344): with one scale for
all of them they need range more than precision. A rank rounds what it holds by its own scale, so nothing is
communicated for it: the scale travels with the numbers, and chunks of several ranks are joined under the largest of
their scales.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.kernels.block_rounding import BLOCK, expanded
from colrow.ops.kernels.optional_triton import UNAVAILABLE
from colrow.ops.kernels.rounding import (
    delayed_scale_reference,
    peak_of,
    round_reference,
    round_triton,
    scale_reference,
)
from colrow.ops.products import concatenated
from colrow.torch_compat import block_scaled_product, scaled_product

Float8 = Literal["tensorwise", "delayed", "rowwise", "blockwise"]
RECIPES: tuple[Float8, ...] = get_args(Float8)
PER_TENSOR: frozenset[str] = frozenset(("tensorwise", "delayed"))
"""Those whose operands have one scale: operators of `ops.float8_linear`, which send 8 bits and round all matmuls."""
ACTIVATION, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2


@dataclass(frozen=True)
class Float8Operand:
    """A quantized operand of a matmul, in the layout that the hardware reads: the summed dim is contiguous.

    values [M, K] for the left operand [M, K] or the right one [K, M]; scale fp32: [], [M] for each row of values, or a
    matrix as in `kernels.block_rounding`.
    """

    values: Tensor
    scale: Tensor

    def __getitem__(self, rows: slice) -> Float8Operand:
        return Float8Operand(self.values[rows], self.scale)


# [Note: packed operands]
# An operand in one piece of memory, which one message sends and one tensor keeps: bytes [M + 1, K]. The last row
# begins with the scale; what is kept for backward has the scale of its linear's weight behind it, so that nobody looks
# for the weight's largest value again.


def packed_shape(M: int, K: int) -> tuple[int, int]:
    return M + 1, K


def packed(M: int, K: int, device: torch.device) -> Tensor:
    """Memory of an operand [M, K], see the note."""
    return torch.empty(packed_shape(M, K), dtype=torch.uint8, device=device)


def unpacked(memory: Tensor, dtype: torch.dtype) -> Float8Operand:
    return Float8Operand(memory[:-1].view(dtype), memory[-1, :4].view(torch.float32)[0])


def weight_scale(memory: Tensor) -> Tensor:
    """[]: the place of a second scale."""
    return memory[-1, 4:8].view(torch.float32)[0]


# [Note: peak history]
# What `delayed` knows of a linear, fp32 [2, 4]; row 0 of its input, row 1 of its output's gradient: the peak (largest
# |number|) of the last step, 0 where none is known, and the peak of this step so far; two unused numbers keep rows
# aligned to 16 bytes. Within a step the first stays and the second only grows, so micro-batches, recomputation and
# replayed steps may read and write in any order and number, and round alike. `styles.fast.peak_history` turns steps.
# Operators write into it although their schemas do not say so: declared, torch.compile would copy it around each call.
# Where no peak is known yet, this call's own is taken, without headroom: the numbers of `tensorwise`.
HISTORY_SHAPE = (2, 4)


def _history_row(history: Tensor | None, gradient: bool) -> Tensor | None:
    return None if history is None else history[int(gradient)]


def quantize(
    parts: Sequence[Tensor], *, gradient: bool = False, dim: int = 0, scale: Tensor | None = None
) -> Float8Operand:
    """Quantize [M, K], given as the tensors that concatenated along `dim` make it; column-major ones are transposed on
    the way.

    Args:
        gradient: whether it is a gradient, which takes another dtype (see above).
        scale: that of an earlier call with the same numbers, which is not looked for then.

    Raises:
        ConfigError: a size that 16 does not divide, or a GPU without 8-bit matmuls.
    """
    sizes = [part.shape[dim] for part in parts]
    M, K = (sum(sizes), parts[0].shape[1]) if dim == 0 else (parts[0].shape[0], sum(sizes))
    require(parts[0].device, M, K)
    out = unpacked(packed(M, K, parts[0].device), GRADIENT if gradient else ACTIVATION)
    peaks = peak_of(list(parts)) if scale is None else scale.view(1)
    for part, into in zip(parts, out.values.split(sizes, dim), strict=True):
        _round(part, peaks, out.scale, rows=into, given=scale is not None)
    return out


def quantized_weight(quantized: Sequence[Tensor], *, transposed: bool = False) -> Float8Operand:
    """The operand [F, D] of what [Note: quantized weights] in `ops.parallel_linear` says, or its transpose [D, F], the
    layout that dgrad's sum needs: bytes change places, and no number is rounded."""
    *parts, scale = quantized
    if not transposed:
        return Float8Operand(concatenated(parts).view(ACTIVATION), scale)
    D, sizes = parts[0].shape[1], [part.shape[0] for part in parts]
    out = unpacked(packed(D, sum(sizes), scale.device), ACTIVATION)
    for part, into in zip(parts, out.values.split(sizes, 1), strict=True):
        # scales are powers of two, so that x_scale / scale is exactly 1
        _round(part.view(ACTIVATION).t(), scale.view(1), out.scale, x_scale=scale, rows=into, given=True)
    return out


def quantize_weight_into(rows_MK: Tensor, w_MK: Tensor, peaks: Tensor, scale: Tensor) -> None:
    """Write w, rounded as `quantize` rounds a weight of which `peaks` has the largest number, and the scale."""
    if w_MK.numel():
        _round(w_MK, peaks, scale, rows=rows_MK)
    else:  # of a rank without rows: there is no kernel to launch, which would write the scale
        scale.copy_(scale_reference(peaks, rows_MK.dtype))


def quantize_packed(
    x_MK: Tensor, *, gradient: bool = False, peaks: Tensor | None = None, history: Tensor | None = None
) -> Tensor:
    """`quantize`, as the memory that is sent: a chunk, whose rows 16 need not divide as long as it does all of them.

    Args:
        peaks: numbers of which the largest is max |x|, where somebody has found it.
        history: see [Note: peak history].
    """
    M, K = x_MK.shape
    require(x_MK.device, K)
    memory, history = packed(M, K, x_MK.device), _history_row(history, gradient)
    out = unpacked(memory, GRADIENT if gradient else ACTIVATION)
    _round(x_MK, _peak(x_MK, peaks, history), out.scale, rows=out.values, history=history)
    return memory


def quantize_both(
    x_MK: Tensor, *, gradient: bool = False, peaks: Tensor | None = None, history: Tensor | None = None
) -> tuple[Float8Operand, Tensor]:
    """`quantize` of [M, K], and of its transpose as packed memory [K, M], with one scale: an operand of two matmuls,
    of which one sums over its columns and the other over its rows. `peaks`, `history` as for `quantize_packed`."""
    (M, K), dtype = x_MK.shape, GRADIENT if gradient else ACTIVATION
    require(x_MK.device, M, K)
    memory, history = packed(K, M, x_MK.device), _history_row(history, gradient)
    transposed = unpacked(memory, dtype)
    rows = torch.empty(M, K, dtype=dtype, device=x_MK.device)
    peaks = _peak(x_MK, peaks, history)
    _round(x_MK, peaks, transposed.scale, rows=rows, transposed=transposed.values, history=history)
    return Float8Operand(rows, transposed.scale), memory


def _peak(x: Tensor, peaks: Tensor | None, history: Tensor | None) -> Tensor:
    if history is not None:
        return peak_of([x], unless=history)
    return peak_of([x if peaks is None else peaks])


def joined(chunks: Sequence[Tensor], *, gradient: bool = False) -> tuple[Float8Operand, Tensor]:
    """Packed chunks [t, K] of [M, K], one after the other, under the largest of their scales: [M, K], and its transpose
    as packed memory [K, M]."""
    rows, memory = _joined(chunks, gradient, rows=True)
    assert rows is not None
    return rows, memory


def joined_transpose(chunks: Sequence[Tensor], *, gradient: bool = False) -> Tensor:
    """The transpose that `joined` returns, alone."""
    return _joined(chunks, gradient, rows=False)[1]


def _joined(chunks: Sequence[Tensor], gradient: bool, rows: bool) -> tuple[Float8Operand | None, Tensor]:
    dtype = GRADIENT if gradient else ACTIVATION
    parts = [unpacked(chunk, dtype) for chunk in chunks]
    (t, K), device = parts[0].values.shape, chunks[0].device
    require(device, M := t * len(parts), K)
    memory, out = packed(K, M, device), torch.empty(M, K, dtype=dtype, device=device) if rows else None
    transposed, scales = unpacked(memory, dtype), torch.stack([part.scale for part in parts])
    for q, part in enumerate(parts):
        mine = slice(q * t, (q + 1) * t)
        into = None if out is None else out[mine]
        _round(
            part.values,
            scales,
            transposed.scale,
            x_scale=part.scale,
            rows=into,
            transposed=transposed.values[:, mine],
            given=True,
        )
    return None if out is None else Float8Operand(out, transposed.scale), memory


def _round(
    x_MK: Tensor,
    peaks: Tensor,
    scale: Tensor,
    *,
    x_scale: Tensor | None = None,
    rows: Tensor | None = None,
    transposed: Tensor | None = None,
    given: bool = False,
    history: Tensor | None = None,
) -> None:
    if x_MK.is_cuda:
        round_triton(x_MK, peaks, scale, x_scale, rows, transposed, given=given, history=history)
        return
    dtype = (rows if rows is not None else transposed).dtype  # type: ignore[union-attr]
    if history is not None:
        scale.copy_(delayed_scale_reference(history, peaks, dtype))
    else:
        scale.copy_(peaks.amax() if given else scale_reference(peaks, dtype))
    round_reference(x_MK, scale, x_scale, rows, transposed, history)


def scaled_mm(a: Float8Operand, b: Float8Operand, out: Tensor, *, gradient: bool = False) -> None:
    """out [M, N], contiguous = a b."""
    if not a.values.is_cuda:
        out.copy_(float8_reference(a.values, b.values.t(), _of_each_number(a), _of_each_number(b).t()))
        return
    y = out if out.dtype == torch.bfloat16 else torch.empty_like(out, dtype=torch.bfloat16)  # what _scaled_mm writes
    if a.scale.dim() == 2:
        block_scaled_product(a.values, b.values.t(), a.scale, b.scale.t(), out=y)
    else:
        by_row, by_column = (a.scale[:, None], b.scale[None, :]) if a.scale.dim() else (a.scale, b.scale)
        scaled_product(
            a.values,
            b.values.t(),
            scale_a=by_row,
            scale_b=by_column,
            out_dtype=torch.bfloat16,
            use_fast_accum=not gradient,  # fewer bits in partial sums: fine for activations, not for gradients
            out=y,
        )
    if y is not out:
        out.copy_(y)


def _of_each_number(operand: Float8Operand) -> Tensor:
    """Its scales, as a tensor that multiplies its values."""
    match operand.scale.dim():
        case 1:
            return operand.scale[:, None]
        case 2:
            return expanded(operand.scale, *operand.values.shape)
    return operand.scale


def float8_reference(a_MK: Tensor, b_KN: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """The matmul of quantized operands, in fp32."""
    return (a_MK.float() * s) @ (b_KN.float() * r)


def require(device: torch.device, *sizes: int) -> None:
    """Raise a ConfigError unless 16 divides all sizes and the device has 8-bit matmuls."""
    require_sixteen(*sizes)
    if device.type == "cuda":
        require_gpu(device)


def require_sizes(recipe: str, tokens: int, *features: int) -> None:
    """Raise a ConfigError where the recipe cannot multiply a rank's matrices of these sizes."""
    require_sixteen(tokens, *features)
    if recipe == "blockwise":
        require_features(*features)


def require_sixteen(*sizes: int) -> None:
    """Raise a ConfigError unless 16, the granularity of 8-bit matmuls, divides all sizes."""
    for size in sizes:
        if size % 16:
            raise ConfigError(
                f"an fp8 matmul has a side of {size}, which 16 does not divide (tokens of a micro-batch, or features "
                "on a rank): choose micro_batch × seq_len and tp so that it does, or leave fp8 out"
            )


def require_blocks(device: torch.device, *features: int) -> None:
    """Raise a ConfigError unless blocks divide the features, and the device multiplies by blocks."""
    require_features(*features)
    if device.type == "cuda":
        require_hopper(device)


def require_features(*features: int) -> None:
    """Raise a ConfigError unless 128, the side of a block of `blockwise`, divides them."""
    for size in features:
        if size % BLOCK:
            raise ConfigError(
                f"fp8: blockwise has blocks of 128 features, and a rank's linear has {size}: choose tp so that 128 "
                "divides them, or another recipe"
            )


@functools.cache
def require_hopper(device: torch.device) -> None:
    """Raise a ConfigError where cuBLAS has no matmuls with scales of blocks."""
    major, cuda = torch.cuda.get_device_capability(device)[0], torch.version.cuda or "none"
    if major != 9 or [int(part) for part in cuda.split(".")[:2]] < [12, 9]:
        raise ConfigError(
            f"fp8: blockwise needs a Hopper GPU and a torch for CUDA 12.9 or more; this is a "
            f"{torch.cuda.get_device_name(device)}, and CUDA {cuda}: take tensorwise, delayed or rowwise"
        )


@functools.cache
def require_gpu(device: torch.device) -> None:
    """Raise a ConfigError for a GPU that cannot multiply 8-bit floats, and where there is no Triton to round them."""
    if UNAVAILABLE:
        raise ConfigError(f"fp8 on GPUs needs Triton, which cannot be imported ({UNAVAILABLE}): install it")
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), and this is a {name}")
