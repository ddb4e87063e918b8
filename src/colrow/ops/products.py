"""The matmuls of linears, of several siblings at once, and a matmul that accumulates into a wider dtype.

    forward  Y = X W^T        column_product
    dgrad    dX = dY W        input_gradient
    wgrad    dW = dY^T X      weight_gradient, or add_product by chunks of T

Every matmul of `parallel_linear` is one of these, but for those in 8-bit floats (`ops.float8`). `out` may be a slice of
the rows of a larger tensor.

Legend: T tokens, D input features, F output features of all siblings together. Weights are [out, in] as in nn.Linear.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor, nn

NARROW = 2048  # with fewer rows, one weight's matmul does not fill a GPU: siblings are concatenated then


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of many terms of a floating dtype are kept: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def joined_weights(weights: list[Tensor]) -> list[Tensor]:
    """The siblings' weights as matmuls take them: as one where they lie one after the other in memory (the flat engine
    gathers them so); else concatenated if some are narrow, and as they are if each is large: the copy would cost more
    than it saves."""
    if len(weights) > 1 and min(w.shape[0] for w in weights) >= NARROW and not _adjacent(weights):
        return weights
    return [concatenated(weights)]


def concatenated(weights: list[Tensor]) -> Tensor:
    """[sum of rows, D], without a copy where they lie one after the other in memory."""
    if len(weights) == 1:
        return weights[0]
    if _adjacent(weights):
        first = weights[0]
        return first.as_strided((sum(w.shape[0] for w in weights), first.shape[1]), first.stride())
    return torch.cat(weights)


def _adjacent(weights: list[Tensor]) -> bool:
    """Whether each weight begins where the one before it ends, in the same memory."""
    if any(type(w) is not Tensor and type(w) is not nn.Parameter for w in weights):  # simulated ranks have no memory
        return False
    if any(a.data_ptr() + a.nbytes != b.data_ptr() for a, b in pairwise(weights)):  # mostly, and cheap to see
        return False
    memory = weights[0].untyped_storage().data_ptr()
    return all(w.untyped_storage().data_ptr() == memory and w.is_contiguous() for w in weights)


def column_product(x_TD: Tensor, weights: list[Tensor], out: Tensor) -> None:
    """out [T, F] = x W^T, the siblings' outputs beside each other."""
    for w, columns in zip(weights, out.split([w.shape[0] for w in weights], 1), strict=True):
        # `columns` has gaps between its rows; a BLAS takes the distance of rows as an argument, so nothing is copied
        torch.mm(x_TD, w.t(), out=columns)


def input_gradient(dy_TF: Tensor, weights: list[Tensor], out: Tensor) -> None:
    """out [T, D] = dY W."""
    first, *others = zip(dy_TF.split([w.shape[0] for w in weights], 1), weights, strict=True)
    torch.mm(*first, out=out)
    for dy, w in others:
        out.addmm_(dy, w)


def weight_gradient(dy_TF: Tensor, x_TD: Tensor) -> Tensor:
    """dW [F, D] = dY^T X."""
    return dy_TF.t() @ x_TD


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, summed in out's dtype, in place.

    For bf16 or fp16 operands on a GPU the sum into an fp32 `out` happens inside the matmul, where this torch can.
    """
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif not a.is_cuda:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))
    elif _adds_inside_matmul(a.device, a.dtype):
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))  # the same bits, with two more passes over `out`


@functools.cache
def _adds_inside_matmul(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether addmm takes an fp32 addend with low-precision operands: some versions require equal dtypes."""
    a = torch.ones(16, 16, device=device, dtype=dtype)
    out = torch.full((16, 16), 0.5, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(out, a, a, torch.float32, out=out)
    except RuntimeError:
        return False
    return bool((out == 16.5).all())
