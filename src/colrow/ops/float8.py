"""Products of 8-bit floats: factors scaled into the type's range and rounded, sums in fp32.

    y = (round(a / s) round(b / r)) s r        s, r = max |.| / the type's largest number, taken anew in each call

tensorwise: one scale for a factor. rowwise: one for each row of a and each column of b.

Weights and activations are e4m3 (three bits of mantissa, up to 448). Gradients are e5m2 (two bits, up to 57344) where
one scale has to do for all of them, and e4m3 where each row has its own. Which scale a rank takes depends on its own
part of a weight alone: nothing is communicated.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.kernels.rounding import UNAVAILABLE, round_reference, round_triton
from colrow.ops.ran import note
from colrow.torch_compat import scaled_product

Float8 = Literal["tensorwise", "rowwise"]
KINDS: tuple[Float8, ...] = ("tensorwise", "rowwise")


@dataclass(frozen=True)
class Factor:
    """A factor of a product in 8 bits, as the product reads it: each line that is summed over lies in a row.

    values [M, K] for the left factor [M, K] or the right one [K, M]; scale [] or [M, 1].
    """

    values: Tensor
    scale: Tensor


def factor(parts: Sequence[Tensor], kind: str, *, gradient: bool = False, dim: int = 0) -> Factor:
    """Round [M, K], given as parts beside each other along `dim`.

    Args:
        gradient: it is a gradient.

    Raises:
        ConfigError: a size that 16 does not divide, or a GPU without 8-bit products.
    """
    for part in parts:
        require_sixteen(*part.shape)
    note("fp8", kind)
    dtype = torch.float8_e5m2 if gradient and kind == "tensorwise" else torch.float8_e4m3fn
    rowwise = kind == "rowwise"
    if not parts[0].is_cuda:
        return Factor(*round_reference(torch.cat(list(parts), dim), dtype, rowwise=rowwise))
    require_gpu(parts[0].device)
    return Factor(*round_triton(parts, dtype, rowwise=rowwise, dim=dim))


def multiply(a: Factor, b: Factor, out: Tensor, *, gradient: bool = False) -> None:
    """out [M, N], contiguous = a b, for a gradient summed in full precision."""
    if not a.values.is_cuda:
        out.copy_(float8_reference(a.values, b.values.t(), a.scale, b.scale.t()))
        return
    given = out if out.dtype == torch.bfloat16 else None
    y = scaled_product(
        a.values,
        b.values.t(),
        scale_a=a.scale,
        scale_b=b.scale.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=not gradient,
        out=given,
    )
    if given is None:
        out.copy_(y)


def float8_reference(a_MK: Tensor, b_KN: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """What the product of 8-bit factors is, in fp32."""
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
