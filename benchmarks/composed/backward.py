"""Code that runs in backward alone: autograd Functions of a user's own, and hooks. The loss of a wrong one is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.composed.along_dim import positions

Change = Callable[[Tensor, int], Tensor]

OF_GRADIENT: dict[str, Change] = {
    "halved": lambda g, d: 0.5 * g,
    "reversed": lambda g, d: -0.3 * g,
    "clamped": lambda g, d: g.clamp(-1e-3, 1e-3),
    "smoothed": lambda g, d: g / (1e-3 + g.abs()).sqrt(),
    "in place": lambda g, d: g.clone().mul_(0.7),
    "where": lambda g, d: torch.where(g > 0, g, 0.1 * g),
    "norm of all": lambda g, d: g / (1e-6 + g.norm()),
    "clipped by the norm of all": lambda g, d: g * (1e-2 / (1e-6 + g.norm())).clamp(max=1.0),
    "mean of all": lambda g, d: g - g.mean(),
    "largest of all": lambda g, d: g / (1e-6 + g.abs().max()),
    "norm": lambda g, d: g / (1e-6 + g.norm(dim=d, keepdim=True)),
    "mean": lambda g, d: g - g.mean(d, keepdim=True),
    "largest": lambda g, d: g / (1e-6 + g.abs().amax(d, keepdim=True)),
    "softmax": lambda g, d: g * (100 * g).softmax(d),
    "cumsum": lambda g, d: g.cumsum(d),
    "flip": lambda g, d: g.flip(d),
    "roll": lambda g, d: g.roll(1, d),
    "by position": lambda g, d: g * positions(g, d) / 4,
    "first zero": lambda g, d: torch.cat([g.narrow(d, 0, 1) * 0, g.narrow(d, 1, g.shape[d] - 1)], d),
    "largest alone": lambda g, d: g * (g.abs() >= g.abs().amax(d, keepdim=True)),
    "divided by the size": lambda g, d: g / g.shape[d] * 8,
    "sorted": lambda g, d: g.sort(d).values,
    "noise": lambda g, d: g + 1e-3 * torch.randn_like(g),
}  # fmt: skip
"""Changes of a gradient."""


class ChangedGradient(torch.autograd.Function):
    """The identity; its gradient is changed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, d: int) -> Tensor:
        ctx.name, ctx.d = name, d
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return OF_GRADIENT[ctx.name](gradients[0], ctx.d), None, None


class OwnSoftmax(torch.autograd.Function):
    """Softmax along d with the backward by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: int) -> Tensor:
        y = x.softmax(d)
        ctx.save_for_backward(y)
        ctx.d = d
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (y,) = ctx.saved_tensors
        g = gradients[0] * y
        return g - y * g.sum(ctx.d, keepdim=True), None


class OwnRmsNorm(torch.autograd.Function):
    """x / rms(x) along d with the backward by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: int) -> Tensor:
        r = torch.rsqrt(x.square().mean(d, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, r)
        ctx.d = d
        return x * r

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, r = ctx.saved_tensors
        g = gradients[0]
        return r * (g - x * r * r * (g * x).mean(ctx.d, keepdim=True)), None


class OwnSilu(torch.autograd.Function):
    """SiLU with the backward by hand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: int) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradients[0] * (s + x * s * (1 - s)), None


class Quantised(torch.autograd.Function):
    """Rounded to steps of the largest along d; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: int) -> Tensor:
        scale = x.abs().amax(d, keepdim=True).clamp_min(1e-6)
        return (x / scale * 7).round() * scale / 7

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class OwnMean(torch.autograd.Function):
    """Takes the mean along d away; backward is of the identity (a mistake of its own, on one process too)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: int) -> Tensor:
        return x - x.mean(d, keepdim=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


class PartOfGradient(torch.autograd.Function):
    """The identity, of which the gradient of the first element along d is left out, by writing into a new tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, d: int) -> Tensor:
        ctx.d = d
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        g = gradients[0]
        out = torch.zeros_like(g)
        n = g.shape[ctx.d]
        out.narrow(ctx.d, 1, n - 1).copy_(g.narrow(ctx.d, 1, n - 1))
        return out, None


FUNCTIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "own softmax": lambda x, d: 4 * OwnSoftmax.apply(x, d),
    "own rms norm": lambda x, d: OwnRmsNorm.apply(x, d),
    "own silu": lambda x, d: OwnSilu.apply(x, d),
    "quantised": lambda x, d: Quantised.apply(x, d),
    "own mean": lambda x, d: OwnMean.apply(x, d),
    "part of the gradient": lambda x, d: PartOfGradient.apply(x, d),
}  # fmt: skip
"""autograd Functions along a dim."""


def changed(x: Tensor, name: str, d: int) -> Tensor:
    """By a Function."""
    return ChangedGradient.apply(x, name, d)


def hooked(x: Tensor, name: str, d: int) -> Tensor:
    """By a hook on an activation."""
    if x.requires_grad:
        x.register_hook(lambda g: OF_GRADIENT[name](g, d))
    return x * 1.0
