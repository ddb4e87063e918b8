"""What a GPU's kernels allocate, on tensors without memory: for walks over fake tensors, which stand on the CPU.

The reference forms of the kernels compute in fp32 and chunk by the CPU's cache; a forecast of a GPU's memory must not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from colrow.ops.kernels.cross_entropy import STATISTICS, LossTerms
from colrow.ops.products import sum_dtype

_AS_ON_GPU = ContextVar("colrow_as_on_gpu", default=False)


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Within, operators with another form on GPUs allocate what that form does. Their results have no values."""
    token = _AS_ON_GPU.set(True)
    try:
        yield
    finally:
        _AS_ON_GPU.reset(token)


def is_as_on_gpu() -> bool:
    """Whether `as_on_gpu` is entered."""
    return _AS_ON_GPU.get()


def statistics_shape(z_Cv: Tensor, y_C: Tensor, terms: LossTerms) -> Tensor:
    """As `statistics_triton`: [K, C]."""
    return z_Cv.new_empty(STATISTICS, z_Cv.shape[0], dtype=sum_dtype(z_Cv.dtype))


def loss_shape(
    z_Cv: Tensor, y_C: Tensor, stats_nKC: Tensor, scale: Tensor, terms: LossTerms, write_gradient: bool
) -> Tensor:
    """As `loss_triton`: [C], and the logits' gradient in their place."""
    return z_Cv.new_empty(z_Cv.shape[0], dtype=stats_nKC.dtype)


def add_product_shape(out: Tensor, a: Tensor, b: Tensor) -> None:
    """As `add_product` where the sum happens inside the matmul: no copy of an operand in out's dtype."""
    without_memory = (x.new_empty((), dtype=out.dtype).expand(x.shape) for x in (a, b))
    torch.addmm(out, *without_memory, out=out)
