"""Products of 8-bit floats: factors scaled into the type's range and rounded, sums in fp32.

    y = (round(a / s) round(b / r)) s r        s, r = max |.| / the type's largest number, taken anew in each call

tensorwise: one scale for a factor. rowwise: one for each row of a and each column of b.

Weights and activations are e4m3 (three bits of mantissa, up to 448). Gradients are e5m2 (two bits, up to 57344) where
one scale has to do for all of them, and e4m3 where each row has its own. Which scale a rank takes depends on its own
part of a weight alone: nothing is communicated.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.ran import note

Float8 = Literal["tensorwise", "rowwise"]
KINDS: tuple[Float8, ...] = ("tensorwise", "rowwise")
VARIANTS = 64
"""Kinds, types and layouts of factors, of which each is compiled: torch's limit of 8 is for accidents."""


def float8_product(
    a_MK: Tensor, b_KN: Tensor, kind: str, *, gradient: bool = False, out: Tensor | None = None
) -> Tensor:
    """a @ b, [M, N], in a's dtype.

    Args:
        gradient: a holds a gradient.
        out: where the product goes, contiguous.

    Raises:
        ConfigError: a size that 16 does not divide, or a GPU without 8-bit products.
    """
    require_sixteen(*a_MK.shape, b_KN.shape[1])
    note("fp8", kind)
    a_type = torch.float8_e5m2 if gradient and kind == "tensorwise" else torch.float8_e4m3fn
    if a_MK.is_cuda:
        require_gpu(a_MK.device)
    a, s = _quantised(a_MK, a_type, kind)
    b, r = _quantised(b_KN.t(), torch.float8_e4m3fn, kind)  # the product wants the columns of b in a row
    if not a_MK.is_cuda:
        y = float8_reference(a, b.t(), s, r.t())
    else:
        given = out if out is not None and out.dtype == torch.bfloat16 else None
        y = torch._scaled_mm(
            a, b.t(), scale_a=s, scale_b=r.t(), out_dtype=torch.bfloat16, use_fast_accum=not gradient, out=given
        )
        if given is not None:
            return given
    return y.to(a_MK.dtype) if out is None else out.copy_(y)


def float8_reference(a_MK: Tensor, b_KN: Tensor, s: Tensor, r: Tensor) -> Tensor:
    """What the product of 8-bit factors is, in fp32."""
    return (a_MK.float() * s) @ (b_KN.float() * r)


def quantised(x: Tensor, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor]:
    """[M, K] -> the same in 8 bits, contiguous, and the scale by which it was divided: fp32, [] or [M, 1]."""
    x = x.float()
    peak = x.abs().amax(1, keepdim=True) if kind == "rowwise" else x.abs().amax()
    scale = (peak / torch.finfo(dtype).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scale).to(dtype).contiguous(), scale


def _quantised(x: Tensor, dtype: torch.dtype, kind: str) -> tuple[Tensor, Tensor]:
    """`quantised`; on a GPU as one pass for the scale and one for the rest, not one for each operation."""
    if not x.is_cuda:
        return quantised(x, dtype, kind)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=VARIANTS):
        pair: tuple[Tensor, Tensor] = _compiled()(x, dtype, kind)
        return pair


@functools.cache
def _compiled() -> Any:
    return torch.compile(quantised, fullgraph=True, dynamic=True)


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
    """Raise a ConfigError for a GPU that cannot multiply 8-bit floats."""
    if torch.cuda.get_device_capability(device) < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), and this is a {name}")
