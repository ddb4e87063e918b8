"""A world of N ranks of which only one exists: collectives return at once, with tensors of the right shape.

Works beside a process group that is already there: the fake one is then a second group, and nothing is sent.

DTensor keeps what it has worked out in caches whose keys hold meshes, and takes two meshes for one when their ranks and
the names of their axes agree; the groups behind them do not count. So the meshes made here have names that no real one
has: a run that follows must not be handed a fake group.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import placement_types


@contextmanager
def fake_tp_mesh(tp: int) -> Iterator[DeviceMesh]:
    """A 1-D mesh as its first rank sees it. Everything made here is gone afterwards."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
        try:
            yield init_device_mesh("cpu", (tp,), mesh_dim_names=("dry_run",))
        finally:
            dist.destroy_process_group()
        return

    from torch.distributed import distributed_c10d as c10d

    first = dist.get_rank()  # the mesh holds this process as its first rank, and labels that need not exist
    ranks = [first + i for i in range(tp)]
    # always the same name: the caches remember groups by it
    name: Any = f"colrow_dry_run_{tp}"
    group, _ = c10d._new_process_group_helper(
        tp, 0, ranks, "fake", FakeStore(), name, timeout=timedelta(seconds=30), group_desc="dry run"
    )
    c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    try:
        yield DeviceMesh.from_group(group, "cpu", mesh=torch.tensor(ranks), mesh_dim_names=("dry_run_beside",))
    finally:
        dist.destroy_process_group(group)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """A FakeTensorMode in which DTensor works: it computes some offsets with tensors, and needs their values.

    An operation that fails here is a result, so what torch would log about it is kept back.
    """
    cls: Any = getattr(placement_types, "_StridedShard", None)
    offsets: Any = cls.__dict__.get("local_shard_size_and_offset") if cls is not None else None
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level

    def with_values(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return offsets(*args, **kwargs)

    if callable(offsets):
        cls.local_shard_size_and_offset = with_values
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if callable(offsets):
            cls.local_shard_size_and_offset = offsets


def materialize_fake(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace the model's meta tensors by fake CPU tensors, in `dtype` where they are floating-point. Ties stay."""

    def fake(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device="cpu")
        return made.to(dtype) if dtype is not None and made.is_floating_point() else made

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(fake(param.detach()), param.requires_grad)
                module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
