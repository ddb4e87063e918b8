"""The matmuls of linears, of several siblings at once, and a matmul that accumulates into a wider dtype.

    forward  Y = X W^T        column_product
    dgrad    dX = dY W        input_gradient
    wgrad    dW = dY^T X      weight_gradient, or add_weight_gradient by chunks of T

Every matmul of `parallel_linear` is one of these; a recipe in `fp8` computes it in 8-bit floats (`ops.float8`). `out`
may be a slice of the rows of a larger tensor.

Legend: T tokens, D input features, F output features of all siblings together. Weights are [out, in] as in nn.Linear.
"""

from __future__ import annotations

import functools
from itertools import pairwise

import torch
from torch import Tensor, nn

from colrow.ops.float8 import Float8Operand, quantize, quantize_both, scaled_mm

NARROW = 2048  # with fewer rows, one weight's matmul does not fill a GPU: siblings are concatenated then

Weights = list[Tensor] | Float8Operand


def forward_weights(weights: list[Tensor], fp8: str = "") -> Weights:
    """The siblings' weights as `column_product` takes them: concatenated or quantized once for all chunks."""
    return quantize(weights, fp8) if fp8 else _joined(weights)


def dgrad_weights(weights: list[Tensor], fp8: str = "") -> Weights:
    """The siblings' weights as `input_gradient` takes them."""
    # 8-bit matmuls read both operands along the summed dim, here F: the weights are quantized as [D, F]
    return quantize([w.t() for w in weights], fp8, dim=1) if fp8 else _joined(weights)


def _joined(weights: list[Tensor]) -> list[Tensor]:
    """As one where they lie one after the other in memory (the flat engine gathers them so); else concatenated if some
    are narrow, and as they are if each is large: the copy would cost more than it saves."""
    if len(weights) == 1:
        return weights
    if _adjacent(weights):
        first = weights[0]
        return [first.as_strided((sum(w.shape[0] for w in weights), first.shape[1]), first.stride())]
    if min(w.shape[0] for w in weights) >= NARROW:
        return weights
    return [torch.cat(weights)]


def _adjacent(weights: list[Tensor]) -> bool:
    """Whether each weight begins where the one before it ends, in the same memory."""
    if any(type(w) is not Tensor and type(w) is not nn.Parameter for w in weights):  # simulated ranks have no memory
        return False
    if any(a.data_ptr() + a.nbytes != b.data_ptr() for a, b in pairwise(weights)):  # mostly, and cheap to see
        return False
    memory = weights[0].untyped_storage().data_ptr()
    return all(w.untyped_storage().data_ptr() == memory and w.is_contiguous() for w in weights)


def column_product(x_TD: Tensor, weights: Weights, out: Tensor, fp8: str = "") -> None:
    """out [T, F] = x W^T, the siblings' outputs beside each other."""
    if isinstance(weights, Float8Operand):
        scaled_mm(quantize([x_TD], fp8), weights, out)
        return
    for w, columns in zip(weights, out.split([w.shape[0] for w in weights], 1), strict=True):
        torch.mm(x_TD, w.t(), out=columns)


def gradient_operands(dy_TF: Tensor, fp8: str = "") -> tuple[Tensor | Float8Operand, Float8Operand | None]:
    """dY for `input_gradient`, and dY^T for `weight_gradient`, quantized together; without fp8 dY, and None."""
    return quantize_both(dy_TF, fp8, gradient=True) if fp8 else (dy_TF, None)


def input_gradient(dy_TF: Tensor | Float8Operand, weights: Weights, out: Tensor, fp8: str = "") -> None:
    """out [T, D] = dY W."""
    if isinstance(weights, Float8Operand):
        dy = dy_TF if isinstance(dy_TF, Float8Operand) else quantize([dy_TF], fp8, gradient=True)
        scaled_mm(dy, weights, out, gradient=True)
        return
    assert isinstance(dy_TF, Tensor)
    first, *others = zip(dy_TF.split([w.shape[0] for w in weights], 1), weights, strict=True)
    torch.mm(*first, out=out)
    for dy, w in others:
        out.addmm_(dy, w)


def weight_gradient(dy_TF: Tensor, x_TD: Tensor, fp8: str = "", dy_FT: Float8Operand | None = None) -> Tensor:
    """dW [F, D] = dY^T X. `dy_FT`: the transpose of dY, quantized already."""
    if not fp8:
        return dy_TF.t() @ x_TD
    dw = dy_TF.new_empty(dy_TF.shape[1], x_TD.shape[1])
    scaled_mm(dy_FT or quantize([dy_TF.t()], fp8, gradient=True), quantize([x_TD.t()], fp8), dw, gradient=True)
    return dw


def add_weight_gradient(
    out_FD: Tensor, dy_TF: Tensor, x_TD: Tensor, fp8: str = "", dy_FT: Float8Operand | None = None
) -> None:
    """out += dY^T X, in out's dtype, which may be wider."""
    if fp8:
        out_FD.add_(weight_gradient(dy_TF, x_TD, fp8, dy_FT))
    else:
        add_product(out_FD, dy_TF.t(), x_TD)


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
