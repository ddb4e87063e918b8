"""Matmuls of 8-bit floats: operands scaled into the type's range and rounded, sums in fp32.

    y = (round(a / s) round(b / r)) s r        s, r = max |.| / the type's largest number, computed in each call

tensorwise: one scale for an operand. rowwise: one for each row of a and each column of b.

Weights and activations are e4m3 (three bits of mantissa, up to 448). Gradients are e5m2 (two bits, up to 57344) where
one scale must do for all of them: they need range more than digits. They are e4m3 where each row has its own scale. A
rank's scales depend on its own shard of a weight alone: nothing is communicated.
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
from colrow.ops.kernels.rounding import UNAVAILABLE, round_reference, round_triton
from colrow.torch_compat import scaled_product

Float8 = Literal["tensorwise", "rowwise"]
RECIPES: tuple[Float8, ...] = ("tensorwise", "rowwise")


@dataclass(frozen=True)
class Float8Operand:
    """A quantized operand of a matmul, in the layout that the hardware reads: the summed dim is contiguous.

    values [M, K] for the left operand [M, K] or the right one [K, M]; scale [] or [M, 1].
    """

    values: Tensor
    scale: Tensor


def quantize(parts: Sequence[Tensor], recipe: str, *, gradient: bool = False, dim: int = 0) -> Float8Operand:
    """Quantize [M, K], given as the tensors that concatenated along `dim` make it.

    Args:
        gradient: whether it is a gradient, which takes another type (see above).

    Raises:
        ConfigError: a size that 16 does not divide, or a GPU without 8-bit products.
    """
    for part in parts:
        require_sixteen(*part.shape)
    record("fp8", recipe)
    dtype = torch.float8_e5m2 if gradient and recipe == "tensorwise" else torch.float8_e4m3fn
    rowwise = recipe == "rowwise"
    if not parts[0].is_cuda:
        return Float8Operand(*round_reference(torch.cat(list(parts), dim), dtype, rowwise=rowwise))
    require_gpu(parts[0].device)
    return Float8Operand(*round_triton(parts, dtype, rowwise=rowwise, dim=dim))


def scaled_mm(a: Float8Operand, b: Float8Operand, out: Tensor, *, gradient: bool = False) -> None:
    """out [M, N], contiguous = a b."""
    if not a.values.is_cuda:
        out.copy_(float8_reference(a.values, b.values.t(), a.scale, b.scale.t()))
        return
    in_place = out if out.dtype == torch.bfloat16 else None  # the only type that _scaled_mm writes for both recipes
    y = scaled_product(
        a.values,
        b.values.t(),
        scale_a=a.scale,
        scale_b=b.scale.t(),
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
    """Raise a ConfigError unless 16, the unit of 8-bit products, divides all sizes."""
    for size in sizes:
        if size % 16:
            raise ConfigError(
                f"an fp8 product has a side of {size}, which 16 does not divide (tokens of a micro-batch, or features "
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
