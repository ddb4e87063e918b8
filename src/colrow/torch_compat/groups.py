"""Private interfaces of process groups and of the collectives that torch.compile can trace."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colrow.torch_compat.names import TorchMovedError, private


def group_named(name: str) -> dist.ProcessGroup:
    """The group behind `group.group_name`: operators that torch.compile sees take names."""
    resolve = private("torch.distributed.distributed_c10d:_resolve_process_group", "to find a group by its name")
    group: dist.ProcessGroup = resolve(name)
    return group


def fake_store() -> Any:
    """The store of a process group in which nothing is sent."""
    return private("torch.testing._internal.distributed.fake_pg:FakeStore", "for ranks that do not exist")()


def fake_group_beside(name: str, ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """A fake group of `ranks` beside the default group; this process is the first of them."""
    make = private("torch.distributed.distributed_c10d:_new_process_group_helper", "for a fake group beside a real one")
    world = private("torch.distributed.distributed_c10d:_world", "for a fake group beside a real one")
    group: dist.ProcessGroup
    group, _ = make(len(ranks), 0, list(ranks), "fake", fake_store(), name, timeout=timeout, group_desc="dry run")
    # new_group fills this in too, but waits for all ranks of the default group
    world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    return group


def gather_into(outputs: list[Tensor], inputs: list[Tensor], group: dist.ProcessGroup) -> Any:
    """All-gather each input into its output, [n t, ...] of [t, ...], in one collective; returns its handle. Public
    functions gather one tensor, or concatenate several first."""
    return group.allgather_into_tensor_coalesced(outputs, inputs)


def finished_work() -> Any:
    """The handle of a collective that is done."""
    purpose = "for collectives of a rank that is measured alone"
    work, fake = (private(f"torch._C._distributed_c10d:{name}", purpose) for name in ("Work", "FakeWork"))
    return work.boxed(fake())


AsyncCollectiveTensor: Any = private(
    "torch.distributed._functional_collectives:AsyncCollectiveTensor", "to wait for DTensor's collectives"
)
"""What DTensor hands on while a collective runs."""


def is_async(tensor: Any) -> bool:
    """Whether the tensor is the result of a collective that may still run."""
    return isinstance(tensor, AsyncCollectiveTensor)


def _functional(*names: str) -> Any:
    """The functional collective with the first name that this torch knows: 2.13 renamed some."""
    module = importlib.import_module("torch.distributed._functional_collectives")
    found = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if found is None:
        raise TorchMovedError(f"torch {torch.__version__} has no functional collective {' or '.join(names)}")
    return found


# Found at import: torch.compile traces what calls them, and cannot trace a search.
_wait, _all_reduce = _functional("wait_tensor"), _functional("all_reduce")
_all_gather = _functional("all_gather_single", "all_gather_tensor")
_reduce_scatter = _functional("reduce_scatter_single", "reduce_scatter_tensor")


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of `x` over a 1-D mesh. Without a gradient: autograd Functions call it."""
    y: Tensor = _wait(_all_reduce(x.contiguous(), "sum", mesh))
    return y


def all_gather(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """The shards of all ranks, one after the other along `dim`."""
    y: Tensor = _wait(_all_gather(x.contiguous(), 0, mesh))
    dim, ranks = dim % x.dim(), mesh.size()
    # placed along `dim` here: torch 2.11 does that in a function that it keeps out of graphs
    if all(size == 1 for size in x.shape[:dim]):
        return y.view(*x.shape[:dim], ranks * x.shape[dim], *x.shape[dim + 1 :])
    return torch.cat(y.chunk(ranks), dim)


def reduce_scatter(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """This rank's shard along `dim` of the sum over ranks."""
    y: Tensor = _wait(_reduce_scatter(x.contiguous(), "sum", dim, mesh))
    return y
