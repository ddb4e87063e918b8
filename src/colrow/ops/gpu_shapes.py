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
    """The output of `statistics_triton`, without values: [K, C]."""
    return z_Cv.new_empty(STATISTICS, z_Cv.shape[0], dtype=sum_dtype(z_Cv.dtype))


def loss_shape(
    z_Cv: Tensor, y_C: Tensor, stats_nKC: Tensor, scale: Tensor, terms: LossTerms, write_gradient: bool
) -> Tensor:
    """The output of `loss_triton`, without values: [C]; the logits' gradient takes their memory."""
    return z_Cv.new_empty(z_Cv.shape[0], dtype=stats_nKC.dtype)


def add_product_shape(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`add_product` where the sum happens inside the matmul: no operand is copied to out's dtype."""
    # addmm wants equal dtypes; an expanded scalar has the shape and takes no memory
    without_memory = (x.new_empty((), dtype=out.dtype).expand(x.shape) for x in (a, b))
    torch.addmm(out, *without_memory, out=out)
