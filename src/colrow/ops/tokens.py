"""Flattened tokens, replicated or one shard on each rank, where all ranks use the replicated tokens alike.

So the gradients of replicated tokens are equal on every rank too, and are not summed:

    local_tokens  x_tD = this rank's rows of x_TD      backward  dx_TD = all_gather(dx_tD)
    all_tokens    x_TD = all_gather(x_tD)              backward  dx_tD = this rank's rows of dx_TD

If each rank uses the gathered tokens in its own way, their gradients are terms of a sum: see `gather` and
`scatter_sum` in `ops.parallel_linear`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from colrow.ops.collectives import all_gather
from colrow.ops.parallel_linear import define_operator
from colrow.torch_compat import group_named


def local_tokens(x_TD: Tensor, rank: Tensor, group: str) -> Tensor:
    """[T, D], the same on each rank -> this rank's [t, D]. `rank` is the rank in the group: int64 [1]."""
    y: Tensor = torch.ops.colrow.local_tokens(x_TD, rank, group)
    return y


def all_tokens(x_tD: Tensor, rank: Tensor, group: str) -> Tensor:
    """[t, D] on each rank -> [T, D] on every one, for use that is the same on all ranks."""
    y: Tensor = torch.ops.colrow.all_tokens(x_tD, rank, group)
    return y


@define_operator("local_tokens", "(Tensor x_TD, Tensor rank, str group) -> Tensor")
def _local_tokens(x_TD: Tensor, rank: Tensor, group: str) -> Tensor:
    shards_ntD = x_TD.view(group_named(group).size(), -1, *x_TD.shape[1:])
    # `rank` is a tensor, not an int: a dry run marks it as rank-dependent, and simulated ranks share one Python program
    return shards_ntD.index_select(0, rank)[0]


@_local_tokens.register_fake
def _(x_TD: Tensor, rank: Tensor, group: str) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0] // group_named(group).size(), *x_TD.shape[1:])


@define_operator("all_tokens", "(Tensor x_tD, Tensor rank, str group) -> Tensor")
def _all_tokens(x_tD: Tensor, rank: Tensor, group: str) -> Tensor:
    return all_gather(x_tD, group_named(group))


@_all_tokens.register_fake
def _(x_tD: Tensor, rank: Tensor, group: str) -> Tensor:
    return x_tD.new_empty(x_tD.shape[0] * group_named(group).size(), *x_tD.shape[1:])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, rank, ctx.group = inputs
    ctx.save_for_backward(rank)


def _differentiate_local_tokens(ctx: Any, dy: Tensor) -> Any:
    (rank,) = ctx.saved_tensors
    return torch.ops.colrow.all_tokens(dy.contiguous(), rank, ctx.group), None, None


def _differentiate_all_tokens(ctx: Any, dy: Tensor) -> Any:
    (rank,) = ctx.saved_tensors
    return torch.ops.colrow.local_tokens(dy.contiguous(), rank, ctx.group), None, None


_local_tokens.register_autograd(_differentiate_local_tokens, _save)
_all_tokens.register_autograd(_differentiate_all_tokens, _save)
