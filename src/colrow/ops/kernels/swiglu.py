"""SwiGLU of a fused gate and up: a kernel in each direction, and their references in plain torch.

    h = silu(a) b,  silu(a) = a s,  s = 1 / (1 + exp(-a))
    da = dh b s (1 + a (1 - s)),  db = dh silu(a)

Computed in fp32 and rounded once. torch's compiler writes the two halves of a gradient as one tensor with a kernel that
computes both for each element behind masks, and so reads everything twice.

Legend: T tokens, f features; y_TF = [a | b] or [b | a] with F = 2 f, rows contiguous. a is the gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colrow.ops.kernels.optional_triton import tl, triton
from colrow.ops.products import sum_dtype

_BLOCK = 1024


def swiglu_reference(y_TF: Tensor, gate: int) -> tuple[Tensor, Tensor]:
    """h [T, f], and max |h| of each row, fp32 [T] (fp64 for fp64). `gate`: which half of y is a."""
    a, b = (half.to(sum_dtype(y_TF.dtype)) for half in _halves(y_TF, gate))
    h = (a * a.sigmoid() * b).to(y_TF.dtype)
    return h, h.abs().amax(1).to(sum_dtype(y_TF.dtype))


def swiglu_gradient_reference(dh_Tf: Tensor, y_TF: Tensor, gate: int) -> Tensor:
    """The gradient of y."""
    (a, b), dh = (half.to(sum_dtype(y_TF.dtype)) for half in _halves(y_TF, gate)), dh_Tf.to(sum_dtype(y_TF.dtype))
    s = a.sigmoid()
    halves = [dh * b * s * (1 + a * (1 - s)), dh * a * s]
    return torch.cat(halves[:: 1 if gate == 0 else -1], 1).to(y_TF.dtype)


def _halves(y_TF: Tensor, gate: int) -> tuple[Tensor, Tensor]:
    first, second = y_TF.chunk(2, 1)
    return (first, second) if gate == 0 else (second, first)


def swiglu_triton(y_TF: Tensor, gate: int) -> tuple[Tensor, Tensor]:
    T, f = y_TF.shape[0], y_TF.shape[1] // 2
    h, peaks = y_TF.new_empty(T, f), y_TF.new_empty(T, dtype=torch.float32)
    a, b = _halves(y_TF, gate)
    _forward_kernel[(T,)](a, b, y_TF.stride(0), h, peaks, FEATURES=f, BLOCK=_BLOCK, num_warps=4)
    return h, peaks


def swiglu_gradient_triton(dh_Tf: Tensor, y_TF: Tensor, gate: int) -> Tensor:
    dy_TF = torch.empty_like(y_TF, memory_format=torch.contiguous_format)
    (a, b), (da, db) = _halves(y_TF, gate), _halves(dy_TF, gate)
    T, f = dh_Tf.shape
    grid = (T, triton.cdiv(f, _BLOCK))
    _backward_kernel[grid](
        dh_Tf, dh_Tf.stride(0), a, b, y_TF.stride(0), da, db, dy_TF.stride(0), f, BLOCK=_BLOCK, num_warps=4
    )
    return dy_TF


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _forward_kernel(  # type: ignore[no-untyped-def]
        a, b, y_row, h, peaks, FEATURES: tl.constexpr, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        peak = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, FEATURES, BLOCK):
            k = start + tl.arange(0, BLOCK)
            a_k = tl.load(a + row * y_row + k, mask=k < FEATURES, other=0.0).to(tl.float32)
            b_k = tl.load(b + row * y_row + k, mask=k < FEATURES, other=0.0).to(tl.float32)
            h_k = (a_k / (1 + tl.exp(-a_k)) * b_k).to(h.dtype.element_ty)
            tl.store(h + row * FEATURES + k, h_k, mask=k < FEATURES)
            # of what is stored; a NaN stays one
            peak = tl.maximum(peak, tl.abs(h_k.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
        # bits of floats that are not negative are ordered as they are, and those of NaN are the largest
        tl.store(peaks + row, tl.max(peak.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True))

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _backward_kernel(  # type: ignore[no-untyped-def]
        dh, dh_row, a, b, y_row, da, db, dy_row, f, BLOCK: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        dh_k = tl.load(dh + row * dh_row + k, mask=k < f, other=0.0).to(tl.float32)
        a_k = tl.load(a + row * y_row + k, mask=k < f, other=0.0).to(tl.float32)
        b_k = tl.load(b + row * y_row + k, mask=k < f, other=0.0).to(tl.float32)
        s = 1 / (1 + tl.exp(-a_k))
        tl.store(da + row * dy_row + k, (dh_k * b_k * s * (1 + a_k * (1 - s))).to(da.dtype.element_ty), mask=k < f)
        tl.store(db + row * dy_row + k, (dh_k * a_k * s).to(db.dtype.element_ty), mask=k < f)
