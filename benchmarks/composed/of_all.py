"""Functions of a tensor without a dim: element by element, of all its elements, or with random numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Whole = Callable[[Tensor], Tensor]

ELEMENTWISE: dict[str, Whole] = {
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu squared": lambda x: x.relu().square(),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": F.elu,
    "mish": F.mish,
    "softplus": F.softplus,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "logsigmoid": F.logsigmoid,
    "softshrink": lambda x: F.softshrink(x, 0.1),
    "tanh cap": lambda x: 3 * torch.tanh(x / 3),
    "sin": lambda x: x + x.sin().square(),
    "erf": lambda x: x.erf(),
    "clamp": lambda x: x.clamp(-1, 1),
    "clip below": lambda x: x.clamp_min(-0.5),
    "power": lambda x: (x.abs() + 0.1) ** 1.5,
    "root": lambda x: (x * x + 1).sqrt(),
    "rsqrt": lambda x: x * torch.rsqrt(x * x + 1),
    "log1p": lambda x: x.abs().log1p(),
    "exp": lambda x: (x.clamp(max=1) - 1).exp(),
    "reciprocal": lambda x: 1 / (1 + x.square()),
    "sign": lambda x: x * x.sign().detach(),
    "round straight through": lambda x: x + ((x * 8).round() / 8 - x).detach(),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "masked_fill": lambda x: x.masked_fill(x > 1, 1.0),
    "masked_fill tensor": lambda x: x.masked_fill(x > 1, torch.tensor(1.0, dtype=x.dtype)),
    "maximum": lambda x: torch.maximum(x, -0.5 * x),
    "minimum with zeros": lambda x: torch.minimum(x, torch.zeros_like(x)) + 0.5 * x,
    "lerp": lambda x: torch.lerp(x, x.tanh(), 0.3),
    "addcmul": lambda x: torch.addcmul(x, x, x.tanh(), value=0.2),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 1),
    "fmod": lambda x: x + x.fmod(0.7),
    "remainder": lambda x: x - x.remainder(0.5).detach(),
    "atan2": lambda x: torch.atan2(x, x.abs() + 1),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "copysign": lambda x: torch.copysign(x.abs() + 0.1, x),
    "logaddexp": lambda x: torch.logaddexp(x, -x),
    "nan_to_num": lambda x: x.nan_to_num(),
    "bucketize": lambda x: x * (1 + 0.1 * torch.bucketize(x.detach(), torch.tensor([-0.5, 0.0, 0.5], dtype=x.dtype))),
    "polynomial": lambda x: 0.5 * x + 0.1 * x**2 - 0.05 * x**3,
    "ones_like": lambda x: x + 0.5 * torch.ones_like(x),
    "full_like": lambda x: x * torch.full_like(x, 0.7),
    "zeros_like": lambda x: torch.zeros_like(x) + x,
    "new_ones": lambda x: x * x.new_ones(x.shape) * 0.8,
    "ones of the shape": lambda x: x + torch.ones(x.shape, dtype=x.dtype),
    "full of the shape": lambda x: x - torch.full(x.shape, 0.1, dtype=x.dtype),
    "one of the shape expanded": lambda x: x * torch.tensor(0.9, dtype=x.dtype).expand(x.shape),
    "empty and copy": lambda x: torch.empty_like(x).copy_(x) * 0.9,
    "new_empty filled": lambda x: x + x.new_empty(x.shape).fill_(0.2),
    "in place": lambda x: x.clone().mul_(0.5).add_(0.1),
    "in place relu": lambda x: x.clone().relu_(),
    "in place into a view": lambda x: _scaled_view(x),
    "masked write": lambda x: _masked_write(x),
    "detached gate": lambda x: x * x.detach().sigmoid(),
    "no_grad mask": lambda x: x * _mask(x),
    "single precision": lambda x: x * x.float().sigmoid().to(x.dtype),
    "checkpointed": lambda x: checkpoint(lambda y: F.silu(y) * y.tanh(), x, use_reentrant=False),
    "merged": lambda x: F.gelu(x.flatten(0, 1)).view(x.shape),
    "last dim by reshape": lambda x: (x.reshape(-1, x.shape[-1]) * 0.9).reshape(x.shape),
    "transposed": lambda x: (x.transpose(-1, -2) * 1.1).transpose(-1, -2).contiguous(),
    "permuted": lambda x: x.permute(*reversed(range(x.ndim))).sigmoid().permute(*reversed(range(x.ndim))),
    "unsqueezed": lambda x: (x.unsqueeze(0) * torch.tensor([0.4, 0.6], dtype=x.dtype).view(2, *[1] * x.ndim)).sum(0),
    "stacked": lambda x: torch.stack([x, x.tanh()], -1).mean(-1),
    "stacked, then weighed": lambda x: (torch.stack([x, x.tanh()], -1).softmax(-1) * torch.stack([x, x.sin()], -1)).sum(
        -1),
    "two by cat": lambda x: torch.cat([x.unsqueeze(-1), x.sin().unsqueeze(-1)], -1).prod(-1),
    "scaled by a constant": lambda x: x * (x.ndim / 4),
    "autocast": lambda x: torch.autocast("cpu", enabled=False)(lambda y: y * 1.2)(x),
    "vmap": lambda x: torch.vmap(lambda y: y * y.tanh())(x),
}  # fmt: skip

OF_ALL: dict[str, Whole] = {
    "norm": lambda x: x / x.norm() * 8,
    "mean": lambda x: x - x.mean(),
    "std": lambda x: x / (0.1 + x.std()),
    "largest": lambda x: x / (0.1 + x.abs().max()),
    "amax": lambda x: x / (0.1 + x.abs().amax()),
    "sum": lambda x: x * torch.tanh(x.sum()),
    "sum of squares by vdot": lambda x: x * torch.tanh(torch.dot(x.flatten(), x.flatten()) / 100),
    "quantised by the largest": lambda x: x + ((x / x.abs().max() * 127).round() * x.abs().max() / 127 - x).detach(),
    "median": lambda x: x - x.median(),
    "numel": lambda x: x / x.numel() * 500,
    "flattened roll": lambda x: x.flatten().roll(1).view(x.shape),
    "flattened cumsum": lambda x: x.flatten().cumsum(0).view(x.shape) / 20,
    "flattened positions": lambda x: x * torch.arange(x.numel(), dtype=x.dtype).view(x.shape).cos(),
    "flattened flip": lambda x: x.flatten().flip(0).view(x.shape),
    "sorted": lambda x: x.flatten().sort().values.view(x.shape),
    "renormalised": lambda x: x * (1 + x.square().mean()).rsqrt(),
    "frobenius": lambda x: x / torch.linalg.vector_norm(x) * 8,
    "reshaped to other rows": lambda x: x.reshape(-1, 8).softmax(-1).reshape(x.shape),
    "logsumexp": lambda x: x - x.flatten().logsumexp(0) / 4,
}

RANDOM: dict[str, Whole] = {
    "rand_like mask": lambda x: x * (torch.rand_like(x) > 0.2) / 0.8,
    "rand mask": lambda x: x * (torch.rand(x.shape, dtype=x.dtype) > 0.2) / 0.8,
    "bernoulli": lambda x: x * torch.bernoulli(torch.full_like(x, 0.8)),
    "bernoulli_": lambda x: x * torch.empty_like(x).bernoulli_(0.8),
    "randn_like": lambda x: x + 0.1 * torch.randn_like(x),
    "randn": lambda x: x + 0.1 * torch.randn(x.shape, dtype=x.dtype),
    "normal_": lambda x: x * (1 + 0.1 * torch.empty_like(x).normal_()),
    "normal": lambda x: x + torch.normal(0.0, 0.1, x.shape).to(x.dtype),
    "uniform_": lambda x: x * torch.empty_like(x).uniform_(0.8, 1.2),
    "exponential_": lambda x: x - 0.1 * torch.empty_like(x).exponential_().log(),
    "randint_like": lambda x: x * torch.randint_like(x, 1, 4),
    "randint": lambda x: x * torch.randint(1, 4, x.shape),
    "randperm": lambda x: x.index_select(-1, torch.randperm(x.shape[-1])),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x, dim=-1) * 4,
    "rrelu": lambda x: F.rrelu(x, training=True),
    "poisson": lambda x: x * torch.poisson(torch.ones_like(x)),
    # factors: a layer norm would take an added number away, and of no sample nothing would be left
    "multinomial": lambda x: x * (1 + torch.multinomial(x.softmax(-1).flatten(0, -2), 1).view(*x.shape[:-1], 1).sin()),
    "stochastic depth": lambda x: x * (torch.rand(()) > -1).to(x.dtype) * (0.5 + torch.rand((), dtype=x.dtype)),
    "sample dropped": lambda x: x * (0.1 + (torch.rand(x.shape[0], *[1] * (x.ndim - 1), dtype=x.dtype) > 0.3)),
}

DROPOUT: dict[str, Whole] = {
    "dropout": lambda x: F.dropout(x, 0.2),
    "dropout in place": lambda x: F.dropout(x.clone(), 0.2, inplace=True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.2, True)[0],
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.2, training=True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.2, training=True),
    "dropout1d": lambda x: F.dropout1d(x.flatten(0, -3), 0.3).view(x.shape),
    "dropout2d": lambda x: F.dropout2d(x if x.ndim == 4 else x.unsqueeze(-1), 0.3).view(x.shape),
}


def _scaled_view(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1).mul_(0.5)
    return x


def _masked_write(x: Tensor) -> Tensor:
    x = x.clone()
    x[x > 1] = 1.0
    return x


@torch.no_grad()
def _mask(x: Tensor) -> Tensor:
    return (x > -0.2).to(x.dtype)
