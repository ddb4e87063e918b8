"""SwiGLU of a fused gate and up as an operator, for graphs in which `parallel.fused_graph` finds it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colrow.ops.execution_record import record
from colrow.ops.kernels.optional_triton import triton
from colrow.ops.kernels.swiglu import (
    swiglu_gradient_reference,
    swiglu_gradient_triton,
    swiglu_reference,
    swiglu_triton,
)
from colrow.ops.products import sum_dtype
from colrow.torch_compat import Operator


def _by_kernel(y: Tensor) -> bool:
    return triton is not None and y.is_cuda and y.dtype != torch.float64


def _swiglu(y_TF: Tensor, gate: int) -> tuple[Tensor, Tensor]:
    """y = [a | b], or [b | a] with `gate` 1 -> silu(a) b, [T, f], and the largest |number| of each of its rows, [T] of
    fp32 (fp64 for fp64), which has no gradient."""
    record("fused", "SwiGLU in Triton" if _by_kernel(y_TF) else "SwiGLU in torch")
    return swiglu_triton(y_TF, gate) if _by_kernel(y_TF) else swiglu_reference(y_TF, gate)


_SWIGLU = Operator("swiglu", "(Tensor y_TF, int gate) -> (Tensor, Tensor)", _swiglu)


@_SWIGLU.register_fake
def _(y_TF: Tensor, gate: int) -> tuple[Tensor, Tensor]:
    T, F = y_TF.shape
    return y_TF.new_empty(T, F // 2), y_TF.new_empty(T, dtype=sum_dtype(y_TF.dtype))


def _swiglu_gradient(dh_Tf: Tensor, y_TF: Tensor, gate: int) -> Tensor:
    gradient = swiglu_gradient_triton if _by_kernel(y_TF) else swiglu_gradient_reference
    return gradient(dh_Tf, y_TF, gate)


_GRADIENT = Operator("swiglu_gradient", "(Tensor dh_Tf, Tensor y_TF, int gate) -> Tensor", _swiglu_gradient)


@_GRADIENT.register_fake
def _(dh_Tf: Tensor, y_TF: Tensor, gate: int) -> Tensor:
    return y_TF.new_empty(y_TF.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    y_TF, ctx.gate = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y_TF)


def _differentiate(ctx: Any, dh_Tf: Tensor | None, _: Any) -> Any:
    if dh_Tf is None:
        return None, None
    (y_TF,) = ctx.saved_tensors
    return torch.ops.colrow.swiglu_gradient(dh_Tf.contiguous(), y_TF, ctx.gate), None


_SWIGLU.register_autograd(_differentiate, _save)
