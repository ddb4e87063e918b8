"""One pass of AdamW over a parameter: the gradient scaled, both moments, the weight, and its low-precision copy.

Separate passes for clipping, update and copy read and write a billion fp32 parameters' memory half as often again. In a
pass each number travels once: with a bf16 gradient and a bf16 copy that is 28 bytes a parameter.

For gradient g, step t (from 1), rate r, decay w (Loshchilov & Hutter 2019):

    g <- scale g
    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2
    p <- p - r w p - r m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

triton: Any
try:
    import triton  # type: ignore[no-redef, unused-ignore]
    import triton.language as tl
    from triton.language.extra import libdevice

    UNAVAILABLE = ""
except ImportError as error:
    triton, UNAVAILABLE = None, str(error)

_BLOCK = 1024


@dataclass(frozen=True)
class Pass:
    """What a parameter's pass reads and writes, all on one device.

    `param`, `exp_avg` and `exp_avg_sq` are of one dtype, fp32 or fp64; `grad` and `copy`, which may be missing, of any.
    All five lie in memory in the same dense order. `step` is a scalar tensor, and counts this pass already.
    """

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    copy: Tensor | None = None


def adamw(one: Pass, lr: Tensor, scale: Tensor, *, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Run the pass in place: Triton's kernel on GPUs, plain torch elsewhere.

    Args:
        lr, scale: scalar tensors on the parameter's device. `scale` multiplies the gradient.
    """
    run = adamw_triton if one.param.is_cuda and triton is not None else adamw_reference
    run(one, lr, scale, betas, eps, weight_decay)


def adamw_reference(
    one: Pass, lr: Tensor, scale: Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    wide = one.param.dtype
    grad, lr, step = one.grad.to(wide) * scale.to(wide), lr.to(wide), one.step.to(torch.float64)
    one.exp_avg.lerp_(grad, 1 - betas[0])
    one.exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    mean = one.exp_avg / (1 - betas[0] ** step).to(wide)
    root = (one.exp_avg_sq / (1 - betas[1] ** step).to(wide)).sqrt()
    one.param.sub_(lr * weight_decay * one.param + lr * mean / (root + eps))
    if one.copy is not None:
        one.copy.copy_(one.param)


def adamw_triton(
    one: Pass, lr: Tensor, scale: Tensor, betas: tuple[float, float], eps: float, weight_decay: float
) -> None:
    for tensor in (one.grad, one.exp_avg, one.exp_avg_sq, one.copy):
        assert tensor is None or tensor.stride() == one.param.stride(), "the pass reads all tensors in one order"
    n = one.param.numel()
    _adamw_kernel[(triton.cdiv(n, _BLOCK),)](
        one.param,
        one.grad,
        one.exp_avg,
        one.exp_avg_sq,
        one.param if one.copy is None else one.copy,
        one.step,
        lr,
        scale,
        n,
        BETA1=betas[0],
        BETA2=betas[1],
        LOG_BETA1=math.log(betas[0]) if betas[0] else -math.inf,
        LOG_BETA2=math.log(betas[1]) if betas[1] else -math.inf,
        EPS=eps,
        DECAY=weight_decay,
        HAS_COPY=one.copy is not None,
        BLOCK=_BLOCK,
        num_warps=4,
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _adamw_kernel(  # type: ignore[no-untyped-def]
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        copy,
        step,
        lr,
        scale,
        n,
        BETA1: tl.constexpr,
        BETA2: tl.constexpr,
        LOG_BETA1: tl.constexpr,
        LOG_BETA2: tl.constexpr,
        EPS: tl.constexpr,
        DECAY: tl.constexpr,
        HAS_COPY: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = at < n
        p = tl.load(param + at, mask=inside)
        wide = p.dtype
        g = tl.load(grad + at, mask=inside).to(wide) * tl.load(scale).to(wide)
        m = tl.load(exp_avg + at, mask=inside)
        v = tl.load(exp_avg_sq + at, mask=inside)
        t = tl.load(step).to(wide)
        rate = tl.load(lr).to(wide)
        m += (g - m) * (1 - BETA1)
        v = v * BETA2 + g * g * (1 - BETA2)
        mean = m / -libdevice.expm1(t * LOG_BETA1)
        root = tl.sqrt(v / -libdevice.expm1(t * LOG_BETA2))
        p -= rate * DECAY * p + rate * mean / (root + EPS)
        tl.store(param + at, p, mask=inside)
        tl.store(exp_avg + at, m, mask=inside)
        tl.store(exp_avg_sq + at, v, mask=inside)
        if HAS_COPY:
            tl.store(copy + at, p.to(copy.dtype.element_ty), mask=inside)
