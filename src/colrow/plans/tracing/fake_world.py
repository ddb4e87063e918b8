"""A world of N ranks of which only one exists: collectives return at once, with tensors of the right shape.

Works beside a process group that is already there: the fake one is then a second group, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

_serial = count()


@contextmanager
def fake_tp_mesh(tp: int) -> Iterator[DeviceMesh]:
    """A 1-D mesh named `tp` as its first rank sees it. Everything made here is gone afterwards."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
        try:
            yield init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
        finally:
            dist.destroy_process_group()
        return

    from torch.distributed import distributed_c10d as c10d

    first = dist.get_rank()  # the mesh holds this process as its first rank, and labels that need not exist
    ranks = [first + i for i in range(tp)]
    group, _ = c10d._new_process_group_helper(
        tp, 0, ranks, "fake", FakeStore(), f"colrow_dry_run_{next(_serial)}", group_desc="dry run"
    )
    c10d._world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    try:
        yield DeviceMesh.from_group(group, "cpu", mesh=torch.tensor(ranks), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group(group)
