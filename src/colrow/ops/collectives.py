"""All-gather and reduce-scatter of dim 0 on plain tensors: the two collectives of tensor parallelism.

They take and return local tensors, on gloo and NCCL alike. The `start_` forms return at once, with a function that
waits: on NCCL it makes the current stream wait and not the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colrow.errors import ConfigError

Finish = Callable[[], Tensor]

# torch 2.13 renamed both and warns at the old names; 2.11 has only those.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def start_all_gather(x: Tensor, group: dist.ProcessGroup) -> Finish:
    """[t, ...] on each of n ranks -> [n t, ...], rank 0's shard first; `x` itself where n is 1."""
    if group.size() == 1:
        return lambda: x
    x = x.contiguous()  # NCCL and gloo read one block of memory
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    work = _all_gather_single(out, x, group=group, async_op=True)
    return _finish(work, out, x)


def start_reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Finish:
    """[n t, ...] on each of n ranks -> the sum over ranks of this rank's [t, ...]; `x` itself where n is 1. `x` must
    not change meanwhile."""
    if group.size() == 1:
        return lambda: x
    x = x.contiguous()
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    work = _reduce_scatter_single(out, x, group=group, async_op=True)
    return _finish(work, out, x)


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`start_all_gather`, awaited."""
    return start_all_gather(x, group)()


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """`start_reduce_scatter`, awaited."""
    return start_reduce_scatter(x, group)()


def group_of(mesh_or_group: DeviceMesh | dist.ProcessGroup) -> dist.ProcessGroup:
    """The process group of a mesh's tp axis, or of its only one.

    Raises:
        ConfigError: the mesh has several axes and none is called tp.
    """
    if not isinstance(mesh_or_group, DeviceMesh):
        return mesh_or_group
    names = mesh_or_group.mesh_dim_names or ()
    if "tp" in names:
        return mesh_or_group.get_group("tp")
    if mesh_or_group.ndim == 1:
        return mesh_or_group.get_group()
    raise ConfigError(f"the mesh has axes {names or mesh_or_group.ndim}: pass the tensor-parallel one, mesh['tp']")


def _finish(work: dist.Work | None, out: Tensor, held: Tensor) -> Finish:
    def finish() -> Tensor:
        nonlocal work, held
        if work is not None:
            work.wait()
        work, held = None, out  # releases the input, which the collective may have read until here
        return out

    return finish
