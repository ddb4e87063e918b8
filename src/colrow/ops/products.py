"""Matrix products in less than their factors' precision, and such as accumulate into a wider dtype."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from colrow.ops.float8 import float8_product


def product(a: Tensor, b: Tensor, fp8: str = "", *, gradient: bool = False) -> Tensor:
    """a @ b; in 8-bit floats where `fp8` says which (`ops.float8`). `gradient`: a holds a gradient."""
    return float8_product(a, b, fp8, gradient=gradient) if fp8 else a @ b


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in out's dtype, in place.

    For bf16 or fp16 factors on a GPU the sum into an fp32 `out` happens inside the product, where this torch can.
    """
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif not a.is_cuda:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    elif _adds_inside_product(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))  # the same numbers, with two more passes over `out`


@functools.cache
def _adds_inside_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm takes an fp32 addend beside low-precision factors: some versions ask for equal dtypes."""
    a = torch.ones(16, 16, device=device, dtype=dtype)
    out = torch.full((16, 16), 0.5, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, out=out)
    except RuntimeError:
        return False
    return bool((out == 16.5).all())
