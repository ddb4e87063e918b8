"""One process of a run joins the others: its device, the default process group, and how its allocator is set up."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from colrow.config import RunConfig
from colrow.run.fresh_store import fresh_store
from colrow.run.requirements import device_type
from colrow.torch_compat import record_collectives

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_MIB = 1 << 20


@dataclass(frozen=True)
class RankInfo:
    """This process among the others, as torchrun numbers them."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def join_store(info: RankInfo) -> Store:
    """A store that the ranks of this start share; no rank of another start uses it. Collective."""
    # The store that torchrun's agents keep is the same one after a restart, with the dead ranks' addresses in it.
    store, _, _ = next(rendezvous("env://", info.rank, info.world_size))
    return fresh_store(store, info.rank, info.world_size)


@contextmanager
def process_group(
    config: RunConfig, info: RankInfo, store: Store | None = None
) -> Iterator[tuple[DeviceMesh, torch.device]]:
    """Within: the default process group, NCCL on GPUs and gloo on CPUs. Yields the mesh and this rank's device.

    Args:
        store: of `join_store`, where the ranks have joined it already.
    """
    if config.train.replay_every:  # read when cuBLAS starts; without it, it has no deterministic kernels
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    record_collectives()
    store = store or join_store(info)
    device = join(device_type(config), info.local_rank, store=store, rank=info.rank, world_size=info.world_size)
    yield config.mesh.build(device.type, info.world_size), device
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def join(device_type: str, local_rank: int, **group: Any) -> torch.device:
    """Join the default process group, NCCL on GPUs and gloo on CPUs. Returns this rank's device, made current.

    Args:
        group: `init_process_group`'s store, rank and world_size; by torchrun's environment unless given.
    """
    device = set_device(device_type, local_rank)
    on_gpu = device.type == "cuda"
    # with its device NCCL connects now, and subgroups reuse the connections
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None, **group)
    return device


def set_device(device_type: str, local_rank: int) -> torch.device:
    """This rank's device, made current; on CPUs the allocator is set up for training."""
    if device_type == "cpu":
        keep_freed_memory()
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> bool:
    """Make glibc reuse freed blocks of up to 32 MiB (its own limit) and return none. Returns whether it took effect.

    By default each large activation is new memory from the kernel, zeroed page by page and returned when freed: a fifth
    of a step of the laptop run on a CPU. Peak memory is the same; memory between peaks is not returned.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # mallopt takes a C int: 2^31 - 1 bytes is the largest threshold that it can be given
    settings = ((_MMAP_THRESHOLD, 32 * _MIB), (_TRIM_THRESHOLD, 2048 * _MIB - 1), (_TOP_PAD, 64 * _MIB))
    accepted = [mallopt(name, value) == 1 for name, value in settings]  # a list: set all, even if one is refused
    return all(accepted)
