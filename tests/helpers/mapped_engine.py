"""A copy engine of ranks on one host without GPUs: its slots and flags are files that all ranks map."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from colrow.ops.copy_engine import FREE, RING, CopyEngine, Ring


class Host:
    """Stands for a GPU: copies and flags take effect at once, and a taken flag is waited for."""

    def __init__(self, left_out: str = "") -> None:
        self.left_out = left_out

    def current(self) -> int:
        return 0

    def follow(self, stream: int, leader: int) -> None:
        pass

    def copy(self, stream: int, target: torch.Tensor, source: torch.Tensor) -> None:
        if self.left_out != "copy":
            target.copy_(source)

    def put(self, stream: int, *flags: torch.Tensor) -> None:
        for flag in flags:
            flag.fill_(1)

    def take(self, stream: int, *flags: torch.Tensor) -> None:
        end = time.monotonic() + 60
        for flag in flags:
            while not flag.item() and self.left_out != "waits":
                assert time.monotonic() < end, "a flag is never put"
                time.sleep(0)
            flag.zero_()


def mapped_engine(folder: Path, left_out: str, group: dist.ProcessGroup, *_: Any) -> CopyEngine:
    """A copy engine whose slots and flags are files that all ranks of a host map."""
    rings = 0

    def grow(nbytes: int) -> Ring:
        nonlocal rings
        rings += 1
        n, rank = group.size(), group.rank()
        dist.barrier(group)
        slots = [shared(folder / f"{rings}-slots-{q}", RING * nbytes, torch.uint8).view(RING, -1) for q in range(n)]
        flags = [shared(folder / f"{rings}-flags-{q}", 2 * RING * n, torch.int32).view(2, RING, n) for q in range(n)]
        flags[rank][FREE] = 1
        dist.barrier(group)
        return Ring(rank, slots, lambda owner, which, slot, peer: flags[owner][which, slot, peer])  # type: ignore[arg-type, return-value]

    return CopyEngine(Host(left_out), 1, group.size(), grow)  # type: ignore[arg-type]


def shared(path: Path, size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype)
