"""Functions of a tensor and one of its dims, as models write them: x is floating-point, of any shape, d a dim.

What they do along d is another thing on a shard of d, with few exceptions; along another dim it is the same. Whether it
is wrong is not said here: `truth` computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Along = Callable[[Tensor, int], Tensor]


def positions(x: Tensor, d: int) -> Tensor:
    """0, 1, 2, ... along d, to be broadcast with x."""
    shape = [1] * x.ndim
    shape[d] = x.shape[d]
    return torch.arange(x.shape[d], dtype=x.dtype, device=x.device).view(shape)


def last(function: Callable[[Tensor], Tensor]) -> Along:
    """A function of the last dim, along d."""
    return lambda x, d: function(x.movedim(d, -1)).movedim(-1, d)


def channels(function: Callable[[Tensor], Tensor]) -> Along:
    """A function of [N, C, L] with d as the channels."""

    def along(x: Tensor, d: int) -> Tensor:
        moved = x.movedim(d, 1)
        return function(moved.flatten(2)).view(moved.shape).movedim(1, d)

    return along


def lengths(function: Callable[[Tensor], Tensor]) -> Along:
    """A function of [N, C, L] with d as the length."""

    def along(x: Tensor, d: int) -> Tensor:
        moved = x.movedim(d, -1)
        return function(moved.flatten(1, -2) if moved.ndim > 3 else moved).reshape(moved.shape).movedim(-1, d)

    return along


def halves(x: Tensor, d: int) -> tuple[Tensor, Tensor]:
    n = x.shape[d] // 2
    return x.narrow(d, 0, n), x.narrow(d, n, n)


def index(x: Tensor, *numbers: int) -> Tensor:
    return torch.tensor(numbers, device=x.device)


REDUCED: dict[str, Along] = {
    "sum": lambda x, d: x.sum(d, keepdim=True),
    "mean": lambda x, d: x.mean(d, keepdim=True),
    "amax": lambda x, d: x.amax(d, keepdim=True),
    "amin": lambda x, d: x.amin(d, keepdim=True),
    "max": lambda x, d: x.max(d, keepdim=True).values,
    "min": lambda x, d: x.min(d, keepdim=True).values,
    "prod": lambda x, d: (1 + 0.1 * x).prod(d, keepdim=True),
    "logsumexp": lambda x, d: x.logsumexp(d, keepdim=True),
    "std": lambda x, d: x.std(d, keepdim=True),
    "var": lambda x, d: x.var(d, keepdim=True, unbiased=False),
    "var_mean": lambda x, d: sum(torch.var_mean(x, d, keepdim=True), torch.zeros(())),
    "norm": lambda x, d: x.norm(dim=d, keepdim=True),
    "norm 1": lambda x, d: x.norm(p=1, dim=d, keepdim=True),
    "vector_norm inf": lambda x, d: torch.linalg.vector_norm(x, math.inf, d, keepdim=True),
    "median": lambda x, d: x.median(d, keepdim=True).values,
    "nanmedian": lambda x, d: x.nanmedian(d, keepdim=True).values,
    "quantile": lambda x, d: x.quantile(0.3, dim=d, keepdim=True),
    "nansum": lambda x, d: x.nansum(d, keepdim=True),
    "nanmean": lambda x, d: x.nanmean(d, keepdim=True),
    "kthvalue": lambda x, d: x.kthvalue(2, dim=d, keepdim=True).values,
    "topk": lambda x, d: x.topk(2, d).values.sum(d, keepdim=True),
    "mode": lambda x, d: x.mode(d, keepdim=True).values,
    "aminmax": lambda x, d: sum(torch.aminmax(x, dim=d, keepdim=True), torch.zeros(())),
    "count_nonzero": lambda x, d: x.relu().count_nonzero(d).unsqueeze(d) * 0.1,
    "argmax": lambda x, d: x.argmax(d, keepdim=True) * 0.1,
    "argmin": lambda x, d: x.argmin(d, keepdim=True) * 0.1,
    "any": lambda x, d: (x > 0.5).any(d, keepdim=True).to(x.dtype),
    "all": lambda x, d: (x < 1.0).all(d, keepdim=True).to(x.dtype),
    "einsum": lambda x, d: torch.einsum("...f,...f->...", x.movedim(d, -1), x.movedim(d, -1)).unsqueeze(d),
    "product with ones": lambda x, d: (x.movedim(d, -1) @ torch.ones(x.shape[d], 1, dtype=x.dtype)).movedim(-1, d),
    "linear with ones": last(lambda x: F.linear(x, torch.ones(1, x.shape[-1], dtype=x.dtype))),
    "first": lambda x, d: x.narrow(d, 0, 1),
    "last": lambda x, d: x.narrow(d, x.shape[d] - 1, 1),
    "selected": lambda x, d: x.select(d, 1).unsqueeze(d),
    "last selected": lambda x, d: x.select(d, -1).unsqueeze(d),
    "index_select": lambda x, d: x.index_select(d, index(x, 1)),
    "gathered": lambda x, d: x.gather(d, x.narrow(d, 0, 1).long() * 0 + 1),
    "take_along_dim": lambda x, d: x.take_along_dim(x.argmax(d, keepdim=True), d),
    "getitem": last(lambda x: x[..., 1:2]),
    "getitem from the end": last(lambda x: x[..., -2:-1]),
    "unbind": lambda x, d: x.unbind(d)[1].unsqueeze(d),
    "adaptive_avg_pool1d": lambda x, d: F.adaptive_avg_pool1d(x.movedim(d, -1).flatten(0, -3), 1).view(
        *x.movedim(d, -1).shape[:-1], 1).movedim(-1, d),
    "trapezoid": lambda x, d: torch.trapezoid(x, dim=d).unsqueeze(d),
    "cosine_similarity": lambda x, d: F.cosine_similarity(x, x.abs() + 1, dim=d).unsqueeze(d),
    "pairwise_distance": last(lambda x: F.pairwise_distance(x, torch.tanh(x), keepdim=True)),
    "mean of squares": lambda x, d: x.square().mean(d, keepdim=True),
    "sum by a written size": lambda x, d: x.sum(d, keepdim=True) / x.shape[d],
    "mean of the first half": lambda x, d: halves(x, d)[0].mean(d, keepdim=True),
    "masked mean": lambda x, d: (x * (positions(x, d) < 3)).sum(d, keepdim=True),
    "weighted by position": lambda x, d: (x * positions(x, d)).mean(d, keepdim=True),
    "entropy": lambda x, d: -(x.softmax(d) * x.log_softmax(d)).sum(d, keepdim=True),
}  # fmt: skip
"""Functions that leave one element along d."""

KEPT: dict[str, Along] = {
    "softmax": lambda x, d: x.softmax(d) * 4,
    "log_softmax": lambda x, d: x.log_softmax(d),
    "softmin": lambda x, d: F.softmin(x, d) * 4,
    "own softmax": lambda x, d: (x - x.amax(d, keepdim=True)).exp() / (x - x.amax(d, keepdim=True)).exp().sum(d, True),
    "cumsum": lambda x, d: x.cumsum(d) / 4,
    "cumprod": lambda x, d: (x.sigmoid() + 0.4).cumprod(d),
    "logcumsumexp": lambda x, d: x.logcumsumexp(d),
    "cummax": lambda x, d: x.cummax(d).values,
    "cummin": lambda x, d: x.cummin(d).values,
    "cumulative mean": lambda x, d: x.cumsum(d) / (1 + positions(x, d)),
    "sort": lambda x, d: x.sort(d).values,
    "descending sort": lambda x, d: x.sort(d, descending=True).values,
    "rank": lambda x, d: x + 0.1 * x.argsort(d).argsort(d),
    "flip": lambda x, d: x.flip(d),
    "roll": lambda x, d: x.roll(1, d),
    "roll back": lambda x, d: x.roll(-2, d),
    "layer_norm": last(lambda x: F.layer_norm(x, x.shape[-1:])),
    "rms_norm": last(lambda x: F.rms_norm(x, x.shape[-1:])),
    "own rms norm": lambda x, d: x * torch.rsqrt(x.square().mean(d, keepdim=True) + 1e-5),
    "normalize": lambda x, d: F.normalize(x, dim=d),
    "normalize 1": lambda x, d: F.normalize(x, p=1.0, dim=d) * 4,
    "group_norm": channels(lambda x: F.group_norm(x, 2)),
    "instance_norm": lengths(lambda x: F.instance_norm(x)),
    "batch_norm": channels(lambda x: F.batch_norm(x, None, None, training=True)),
    "local_response_norm": channels(lambda x: F.local_response_norm(x, 3)),
    "fft": lambda x, d: torch.fft.fft(x, dim=d).real / 2,
    "rfft": lambda x, d: torch.fft.irfft(torch.fft.rfft(x, dim=d) * 0.5, n=x.shape[d], dim=d) + x.roll(1, d) * 0.1,
    "convolution": lengths(
        lambda x: F.conv1d(x, torch.tensor([[[0.2, 0.5, 0.3]]], dtype=x.dtype).expand(x.shape[1], 1, 3), padding=1,
                           groups=x.shape[1])),
    "causal convolution": lengths(
        lambda x: F.conv1d(F.pad(x, (2, 0)), torch.tensor([[[0.2, 0.5, 0.3]]], dtype=x.dtype).expand(x.shape[1], 1, 3),
                           groups=x.shape[1])),
    "avg_pool1d": lengths(lambda x: F.avg_pool1d(x, 3, 1, 1)),
    "max_pool1d": lengths(lambda x: F.max_pool1d(x, 3, 1, 1)),
    "pooled by pairs": lengths(lambda x: F.avg_pool1d(x, 2).repeat_interleave(2, -1)),
    "interpolate": lengths(lambda x: F.interpolate(F.avg_pool1d(x, 2), size=x.shape[-1], mode="linear")),
    "unfold": last(lambda x: F.pad(x, (1, 1)).unfold(-1, 3, 1).mean(-1)),
    "shift": last(lambda x: F.pad(x, (1, -1)) + x),
    "shift by cat": lambda x, d: torch.cat([x.narrow(d, 0, 1) * 0, x.narrow(d, 0, x.shape[d] - 1)], d) + x,
    "circular pad": lengths(lambda x: F.pad(x, (1, 0), mode="circular")[..., :-1]),
    "replicate pad": lengths(lambda x: F.pad(x, (1, 0), mode="replicate")[..., :-1]),
    "diff": lambda x, d: x.diff(dim=d, prepend=x.narrow(d, 0, 1) * 0),
    "first half": lambda x, d: torch.cat([halves(x, d)[0], halves(x, d)[1] * 0], d),
    "halves swapped": lambda x, d: torch.cat(halves(x, d)[::-1], d),
    "chunks swapped": lambda x, d: torch.cat(x.chunk(2, d)[::-1], d),
    "tensor_split": lambda x, d: torch.cat(x.tensor_split(2, d)[::-1], d),
    "split by half": lambda x, d: torch.cat(x.split(x.shape[d] // 2, d)[::-1], d),
    "gated by halves": lambda x, d: torch.cat([halves(x, d)[0] * halves(x, d)[1].sigmoid()] * 2, d),
    "glu": lambda x, d: torch.cat([F.glu(x, d)] * 2, d),
    "rotate_half": lambda x, d: x + torch.cat([-halves(x, d)[1], halves(x, d)[0]], d),
    "shuffle": lambda x, d: x.unflatten(d, (2, -1)).transpose(d, d + 1).flatten(d, d + 1),
    "unshuffle": lambda x, d: x.unflatten(d, (-1, 2)).transpose(d, d + 1).flatten(d, d + 1),
    "pairs swapped": lambda x, d: x.unflatten(d, (-1, 2)).flip(d + 1).flatten(d, d + 1),
    "norm of pairs": last(lambda x: F.layer_norm(x.unflatten(-1, (-1, 2)), (2,)).flatten(-2)),
    "largest of pairs": last(lambda x: x.unflatten(-1, (-1, 2)).amax(-1).repeat_interleave(2, -1)),
    "rotated pairs": last(lambda x: torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)),
    "complex pairs": last(
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2)),
    "even and odd gated": last(lambda x: (x[..., ::2].sigmoid() * x[..., 1::2]).repeat_interleave(2, -1)),
    "reversed by an index": lambda x, d: x.index_select(d, torch.arange(x.shape[d] - 1, -1, -1)),
    "reversed by fancy index": last(lambda x: x[..., torch.arange(x.shape[-1] - 1, -1, -1)]),
    "gathered by order": lambda x, d: x.gather(d, x.argsort(d)),
    "table of positions": lambda x, d: x + torch.sin(positions(x, d)),
    "weights by position": lambda x, d: x * positions(x, d) / 4,
    "slopes by position": lambda x, d: x * 2.0 ** (-8 / x.shape[d] * (1 + positions(x, d))),
    "linspace": last(lambda x: x * torch.linspace(0.5, 1.5, x.shape[-1], dtype=x.dtype)),
    "lower positions": lambda x, d: x.masked_fill(positions(x, d) < x.shape[d] // 2, 0.0),
    "positions below 3": lambda x, d: torch.where(positions(x, d) < 3, x, torch.zeros_like(x)),
    "even positions": lambda x, d: x * (positions(x, d) % 2),
    "matrix": last(lambda x: x @ (torch.eye(x.shape[-1], dtype=x.dtype) + 0.1)),
    "upper triangle": last(lambda x: x @ torch.ones(x.shape[-1], x.shape[-1], dtype=x.dtype).triu() / 4),
    "gram matrix": last(lambda x: x + x @ (x.transpose(-1, -2) @ x).tanh() / 8),
    "gram matrix over": last(lambda x: x + (x @ x.transpose(-1, -2)).softmax(-1) @ x),
    "cdist": last(lambda x: x * (-torch.cdist(x, x + 0.3).mean(-1, keepdim=True)).exp()),
    "scatter": lambda x, d: torch.zeros_like(x).scatter(d, x.argsort(d), x),
    "scatter_add": lambda x, d: torch.zeros_like(x).scatter_add(d, x.argsort(d) // 2, x),
    "index_add": lambda x, d: x.index_add(d, index(x, 0), x.narrow(d, 1, 1)),
    "index_copy": lambda x, d: x.index_copy(d, index(x, 1), x.narrow(d, 0, 1)),
    "index_fill": lambda x, d: x.index_fill(d, index(x, 0), 0.5),
    "slice_scatter": lambda x, d: x.slice_scatter(x.narrow(d, 1, 1) * 2, d, 0, 1),
    "select_scatter": lambda x, d: x.select_scatter(x.select(d, 1) * 2, d, 0),
    "first written": last(lambda x: _written(x, slice(0, 1), 0.0)),
    "last written": last(lambda x: _written(x, slice(-1, None), 0.5)),
    "every second written": last(lambda x: _written(x, slice(None, None, 2), 0.0)),
    "half scaled in place": lambda x, d: _scaled(x.clone(), d),
    "renorm": lambda x, d: x.renorm(2, d, 1.0),
    "repeated": lambda x, d: torch.cat([x, x], d).narrow(d, 1, x.shape[d]),
    "repeat and first": lambda x, d: x.narrow(d, 0, 1).expand_as(x) * 0.3 + x,
    "interleaved": lambda x, d: x.repeat_interleave(2, d).narrow(d, 0, x.shape[d]),
    "largest alone": lambda x, d: x * (x >= x.amax(d, keepdim=True)),
    "two largest": lambda x, d: x * (x >= x.topk(2, d).values.amin(d, keepdim=True)),
    "one_hot": last(lambda x: x * F.one_hot(x.argmax(-1), x.shape[-1])),
    "straight through": lambda x, d: (F.one_hot(x.argmax(d), x.shape[d]).movedim(-1, d) - x.softmax(d)).detach()
    + x.softmax(d),
    "divided by the size": lambda x, d: x / x.shape[d] * 8,
    "divided by a root": lambda x, d: x / math.sqrt(x.shape[d]) * 2,
    "bias by length": lambda x, d: x + 0.01 * x.size(d),
    "searchsorted": last(lambda x: x + 0.1 * torch.searchsorted(x.sort(-1).values, x.detach().contiguous())),
    "cumulative trapezoid": lambda x, d: x + F.pad(torch.cumulative_trapezoid(x.movedim(d, -1)), (1, 0)).movedim(-1, d),
    "outer": last(lambda x: x + torch.einsum("...f,...g->...f", x, x.tanh()) / 8),
    "stacked and summed": lambda x, d: torch.stack([x, x.roll(1, d)]).sum(0),
    "scan": lambda x, d: _scan(x, d),
    "vmap": lambda x, d: torch.vmap(lambda y: y / (1 + y.norm()), in_dims=0)(x.movedim(d, -1).flatten(0, -2)).view(
        x.movedim(d, -1).shape).movedim(-1, d),
}  # fmt: skip
"""Functions that keep the shape."""


def _written(x: Tensor, where: slice, value: float) -> Tensor:
    x = x.clone()
    x[..., where] = value
    return x


def _scaled(x: Tensor, d: int) -> Tensor:
    x.narrow(d, 0, x.shape[d] // 2).mul_(2)
    return x


def _scan(x: Tensor, d: int) -> Tensor:
    """A recurrence written as a loop."""
    state, out = torch.zeros_like(x.select(d, 0)), []
    for step in x.unbind(d):
        state = 0.5 * state + step
        out.append(state)
    return torch.stack(out, d)


def _as_factor(reduced: Along) -> Along:
    return lambda x, d: x * (1 + 0.5 * torch.tanh(reduced(x, d)))


ALONG: dict[str, Along] = {name: _as_factor(function) for name, function in REDUCED.items()} | KEPT
