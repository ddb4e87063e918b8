"""What differs from rank to rank: index tensors, and parameters as the ranks' own code uses them.

[Note: whose gradient]
A module that runs on local tensors sees a parameter through `to_local`, and has to declare what its gradient is.
`same_on_all_ranks`: every rank uses the parameter on the same values, so every rank has the complete gradient.
`summed`: every rank uses it on its own shard of the activations, so a rank's gradient is one term of a sum over tp.
The wrong one of the two leaves the loss exact, and the gradient partial or tp times too large.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement
from torch.utils.weak import WeakTensorKeyDictionary

RANK_TABLES = WeakTensorKeyDictionary()
"""Live index tensors made by `rank_table`, and the segments of a dim of which they are a rank's rows, where they are
shards. The dry run simulates one rank and marks them as rank-dependent."""


HEADS_OF_RANK = WeakTensorKeyDictionary()
"""Live results of `rank_heads`: of which dim they are shards, and of which segments of it."""


def rank_table(mesh: DeviceMesh, rows: list[list[int]], segments: tuple[int, ...] = ()) -> Tensor:
    """Row `rank` of `rows`, on the mesh's device. Rows are equally long. `segments`: they are the ranks' shards of a
    dim that is these segments one after another."""
    table = torch.tensor(rows, device=mesh.device_type)
    # not rows[rank]: simulated ranks share one Python program, and DTensor gives each of them its own row
    own = distribute_tensor(table, mesh, [Shard(0)], src_data_rank=None).to_local()[0]
    RANK_TABLES[own] = segments
    return own


def summed(param: DTensor) -> Tensor:
    """A replicated parameter, for use on this rank's shard of the activations: gradients are summed over tp."""
    return param.to_local(grad_placements=[Partial()])


def same_on_all_ranks(param: DTensor) -> Tensor:
    """A replicated parameter used alike on every rank, or this rank's shard of a sharded one."""
    return param.to_local()


def gathered(x: Tensor, mesh: DeviceMesh, layout: Placement) -> Tensor:
    """The complete `x` as a local tensor that each rank uses in its own way: its gradient is a sum over ranks.

    Args:
        layout: of a plain tensor.
    """
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [layout], run_check=False)
    if not x.placements[0].is_replicate():  # a redistribute that changes nothing would still reduce the gradient
        x = x.redistribute(placements=[Replicate()])
    return x.to_local(grad_placements=[Partial()])


class DividedGradient(torch.autograd.Function):
    """y = x, equal on all ranks;  dx = dy / tp: a rank's term, where dy is complete on each rank and dx will be summed.

    Behind it stands what every rank computes alike outside of a block, from a value inside it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (dy,) = gradients
        return dy / ctx.ranks, None


def divide_gradients(module: nn.Module, outputs: Collection[int], ranks: int) -> None:
    """Let the outputs of these numbers leave the module through `DividedGradient`; 0 is the only one."""

    def after(_: nn.Module, __: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return DividedGradient.apply(out, ranks)
        return type(out)(DividedGradient.apply(o, ranks) if i in outputs else o for i, o in enumerate(out))

    # transformers records router logits by hooks that it adds in a model's first call, which may have been before
    module.register_forward_hook(after, prepend=True)


def rank_heads(x: Tensor, mesh: DeviceMesh, dim: int, inner: int) -> Tensor:
    """This rank's shard of the `inner` heads that are the minor factor of dimension `dim`."""
    ranks = mesh.size()
    # by a table and not by narrow(rank): the dry run marks it as rank-dependent, and simulated ranks have a row each
    own = rank_table(mesh, [list(range(r * inner // ranks, (r + 1) * inner // ranks)) for r in range(ranks)])
    heads = x.unflatten(dim, (-1, inner)).index_select(dim + 1, own).flatten(dim, dim + 1)
    HEADS_OF_RANK[heads] = dim, (inner,) * (x.shape[dim] // inner)
    return heads
