"""What differs from rank to rank: index tensors, and parameters as the ranks' own code uses them.

[Note: whose gradient]
A module that runs on local tensors sees a parameter through `to_local`, and has to declare what its gradient is.
`same_on_all_ranks`: every rank uses the parameter on the same values, so every rank has the complete gradient.
`summed`: every rank uses it on its own shard of the activations, so a rank's gradient is one term of a sum over tp.
The wrong one of the two leaves the loss exact, and the gradient partial or tp times too large.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.utils.weak import WeakTensorKeyDictionary

RANK_TABLES = WeakTensorKeyDictionary()
"""Live index tensors made by `rank_table`. The dry run simulates one rank and marks them as rank-dependent."""


HEADS_OF_RANK = WeakTensorKeyDictionary()
"""Live results of `rank_heads`: of which dim they are shards, and of which segments of it."""


def rank_table(mesh: DeviceMesh, rows: list[list[int]]) -> Tensor:
    """Row `rank` of `rows`, on the mesh's device. Rows are equally long."""
    table = torch.tensor(rows, device=mesh.device_type)
    own = distribute_tensor(table, mesh, [Shard(0)], src_data_rank=None).to_local()[0]
    RANK_TABLES[own] = True
    return own


def summed(param: DTensor) -> Tensor:
    """A replicated parameter, for use on this rank's shard of the activations: gradients are summed over tp."""
    return param.to_local(grad_placements=[Partial()])


def same_on_all_ranks(param: DTensor) -> Tensor:
    """A replicated parameter used alike on every rank, or this rank's shard of a sharded one."""
    return param.to_local()


def rank_heads(x: Tensor, mesh: DeviceMesh, dim: int, inner: int) -> Tensor:
    """This rank's shard of the `inner` heads that are the minor factor of dimension `dim`."""
    ranks = mesh.size()
    own = rank_table(mesh, [list(range(r * inner // ranks, (r + 1) * inner // ranks)) for r in range(ranks)])
    heads = x.unflatten(dim, (-1, inner)).index_select(dim + 1, own).flatten(dim, dim + 1)
    HEADS_OF_RANK[heads] = dim, (inner,) * (x.shape[dim] // inner)
    return heads
