"""Matmuls of 8-bit floats: operands scaled into the type's range and rounded, sums in fp32.

    y = (round(a / s) round(b / r)) s r        s, r = max |.| / the dtype's largest number, computed in each call

The recipe `tensorwise`: one scale for each operand. Weights and activations are e4m3 (three bits of mantissa, up to
448). Gradients are e5m2 (two bits, up to 57344): with one scale for all of them they need range more than precision. A
rank's scale of a weight depends on its local shard only, so nothing is communicated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.execution_record import record
from colrow.ops.kernels.optional_triton import UNAVAILABLE
from colrow.ops.kernels.rounding import round_both_triton, round_reference, round_triton
from colrow.torch_compat import scaled_product

Float8 = Literal["tensorwise"]
RECIPES: tuple[Float8, ...] = ("tensorwise",)


@dataclass(frozen=True)
class Float8Operand:
    """A quantized operand of a matmul, in the layout that the hardware reads: the summed dim is contiguous.

    values [M, K] for the left operand [M, K] or the right one [K, M]; scale [].
    """

    values: Tensor
    scale: Tensor

    def __getitem__(self, rows: slice) -> Float8Operand:
        return Float8Operand(self.values[rows], self.scale)


def quantize(parts: Sequence[Tensor], recipe: str, *, gradient: bool = False, dim: int = 0) -> Float8Operand:
    """Quantize [M, K], given as the tensors that concatenated along `dim` make it.

    Args:
        gradient: whether it is a gradient, which takes another dtype (see above).

    Raises:
        ConfigError: a size that 16 does not divide, or a GPU without 8-bit matmuls.
    """
    for part in parts:
        require_sixteen(*part.shape)
    record("fp8", recipe)
    dtype = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
    if not parts[0].is_cuda:
        return Float8Operand(*round_reference(torch.cat(list(parts), dim), dtype))
    require_gpu(parts[0].device)
    return Float8Operand(*round_triton(parts, dtype, dim=dim))


def quantize_both(x_MK: Tensor, recipe: str, *, gradient: bool = False) -> tuple[Float8Operand, Float8Operand]:
    """`quantize` of [M, K] and of its transpose, with one scale. An output's gradient is an operand of both dgrad and
    wgrad, which sum over its columns and over its rows."""
    require_sixteen(*x_MK.shape)
    record("fp8", recipe)
    dtype = torch.float8_e5m2 if gradient else torch.float8_e4m3fn
    if not x_MK.is_cuda:
        values, scale = round_reference(x_MK, dtype)
        return Float8Operand(values, scale), Float8Operand(values.t().contiguous(), scale)
    require_gpu(x_MK.device)
    values, turned, scale = round_both_triton(x_MK, dtype)
    return Float8Operand(values, scale), Float8Operand(turned, scale)


def scaled_mm(a: Float8Operand, b: Float8Operand, out: Tensor, *, gradient: bool = False) -> None:
    """out [M, N], contiguous = a b."""
    if not a.values.is_cuda:
        out.copy_(float8_reference(a.values, b.values.t(), a.scale, b.scale))
        return
    in_place = out if out.dtype == torch.bfloat16 else None  # _scaled_mm writes bf16; others are copied
    y = scaled_product(
        a.values,
        b.values.t(),
        scale_a=a.scale,
        scale_b=b.scale,
        out_dtype=torch.bfloat16,
        use_fast_accum=not gradient,  # fewer bits in partial sums: fine for activations, not for gradients
        out=in_place,
    )
    if in_place is None:
        out.copy_(y)


def float8_reference(a_MK: Tensor, b_KN: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """The matmul of quantized operands, in fp32."""
    return (a_MK.float() * s) @ (b_KN.float() * r)


def require_sixteen(*sizes: int) -> None:
    """Raise a ConfigError unless 16, the granularity of 8-bit matmuls, divides all sizes."""
    for size in sizes:
        if size % 16:
            raise ConfigError(
                f"an fp8 matmul has a side of {size}, which 16 does not divide (tokens of a micro-batch, or features "
                "on a rank): choose micro_batch × seq_len and tp so that it does, or leave fp8 out"
            )


@functools.cache
def require_gpu(device: torch.device) -> None:
    """Raise a ConfigError for a GPU that cannot multiply 8-bit floats, and where there is no Triton to round them."""
    if UNAVAILABLE:
        raise ConfigError(f"fp8 on GPUs needs Triton, which cannot be imported ({UNAVAILABLE}): install it")
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), and this is a {name}")
