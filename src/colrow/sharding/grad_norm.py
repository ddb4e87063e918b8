"""The gradient norm, every parameter counted once, and the factor that clips to it.

Parameters may lie on several meshes (tp alone, dp_shard × tp, stages of a pipeline). A rank counts its local shard of
a gradient; of ranks that hold copies only the first counts. All-reduces over the axes whose ranks hold different
shards give the norm of one process.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Partial

from colrow.mesh import ROLES
from colrow.sharding.layout import local_tensor
from colrow.torch_compat import foreach


@torch.no_grad()
def align_gradients(params: Iterable[nn.Parameter]) -> None:
    """Give each gradient its parameter's placements, in place.

    After backward on a tp mesh, gradients of norms are partial sums, and the embedding's is replicated where the
    parameter is sharded: code that reads a local gradient would see one term, or too much. The partial sums of one mesh
    and dtype are summed by one all-reduce.
    """
    partial_sums: dict[tuple[dist.ProcessGroup, torch.dtype], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
    for param in params:
        grad = param.grad
        if not isinstance(param, DTensor) or not isinstance(grad, DTensor) or grad.placements == param.placements:
            continue
        axes = [axis for axis, p in enumerate(grad.placements) if isinstance(p, Partial)]
        others_match = all(g == p for g, p in zip(grad.placements, param.placements, strict=True) if not g.is_partial())
        if len(axes) == 1 and others_match and param.placements[axes[0]].is_replicate():
            # a partial sum of a replicated parameter: an all-reduce, together with all others of its group
            key = (grad.device_mesh.get_group(axes[0]), grad.dtype)
            partial_sums[key].append((param, grad.to_local()))
        else:  # such as a replicated gradient of a sharded parameter, which is sliced without communication
            param.grad = grad.redistribute(placements=param.placements)
    for (group, _), items in partial_sums.items():
        flat = torch.cat([local.reshape(-1) for _, local in items])
        dist.all_reduce(flat, group=group)
        summed = flat.split([local.numel() for _, local in items])
        for (param, local), total in zip(items, summed, strict=True):
            assert isinstance(param, DTensor)
            param.grad = DTensor.from_local(
                total.view_as(local),
                param.device_mesh,
                param.placements,
                run_check=False,
                shape=param.shape,
                stride=param.stride(),
            )


@torch.no_grad()
def grad_norm(
    params: Iterable[nn.Parameter],
    groups: Iterable[dist.ProcessGroup] = (),
    squares: Mapping[nn.Parameter, Tensor] | None = None,
) -> Tensor:
    """The 2-norm of all gradients, as one process would have it.

    Args:
        params: this rank's parameters, without copies of another pipeline stage's (`counted_parameters`);
            `align_gradients` has been called on them.
        groups: the groups of the axes over which ranks hold different shards (`MeshAxes.norm_groups`).
        squares: of some of `params`: terms whose sum is that of the squares of the local gradient.

    Returns:
        A scalar on the gradients' device, the same on all ranks. fp32, or fp64 for fp64 gradients.
    """
    params = list(params)
    with_grad = [param for param in params if param.grad is not None]
    counted, squares = [param for param in with_grad if _counts_here(param)], squares or {}
    shards = [local_tensor(param.grad) for param in counted if param.grad is not None and param not in squares]
    device, dtype = _norm_device_and_dtype(with_grad or params)
    total = torch.zeros((), device=device, dtype=dtype)
    if shards:
        if device.type == "cpu":
            # CPU vector_norm accumulates fp32 in few partial sums: relative error ~1e-5 at 1M elements, and it depends
            # on the shard size. `sum` is pairwise.
            total = torch.stack([shard.to(dtype).square().sum() for shard in shards]).sum()
        else:
            by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)  # the foreach kernel needs one dtype a call
            for shard in shards:
                by_dtype[shard.dtype].append(shard)
            norms = [norm for same in by_dtype.values() for norm in foreach("norm", same, 2, dtype=dtype)]
            total = torch.stack(norms).square().sum()
    if known := [squares[param] for param in counted if param in squares]:
        total = total + torch.cat(known).sum()
    # squares are added, not norms; axis by axis, since each group has the sums of the one before
    for group in groups:
        dist.all_reduce(total, group=group)
    return total.sqrt()


def clip_scale(norm: Tensor, max_norm: float) -> Tensor:
    """The factor of all gradients, a scalar of at most 1. The norm stays on its device: no wait."""
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _counts_here(param: nn.Parameter) -> bool:
    """Whether this rank counts its shard: of copies along an axis that is summed over, only the first rank's counts."""
    if not isinstance(param, DTensor):
        return True
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    names = param.device_mesh.mesh_dim_names or ("",) * param.device_mesh.ndim
    return not any(
        placement.is_replicate() and index
        for placement, index, name in zip(param.placements, coordinate, names, strict=True)
        if name not in ROLES or ROLES[name].parameters  # else no group sums over the axis: each copy counts
    )


def _norm_device_and_dtype(params: list[nn.Parameter]) -> tuple[torch.device, torch.dtype]:
    if not params:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float32
    first = local_tensor(params[0])
    return first.device, torch.float64 if first.dtype == torch.float64 else torch.float32
