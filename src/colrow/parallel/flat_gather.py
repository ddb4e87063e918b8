"""Who carries the gathers of the flat data engine: process groups, or copy engines that read the peers' shards.

[Note: gathers by copy engines]
All shards of a rank lie in memory that the peers see. A gather is copies on a side stream, without a kernel: each rank
reads the others' rows itself, and no handshake is needed, since shards change once a step:

    the update writes the shards; barrier; gathers; barrier; the update ...

A barrier is an all-reduce of one number on the compute stream, which waits for every gather before it reads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.ops.copy_engine_cuda import PeerMemory, Wanted, peer_memory
from colrow.ops.execution_record import record
from colrow.torch_compat import gather_into

GatherCarrier = Literal["collectives", "copy_engine"]
_WANTED = Wanted("fsdp.gather: copy_engine", "set fsdp.gather: collectives")


class Gathers(ABC):
    """Who gathers the shards of all units."""

    @abstractmethod
    def shard(self, nbytes: int) -> Tensor | None:
        """Memory for a unit's shard; None where it may lie anywhere."""

    @abstractmethod
    def prepare(self, outputs: list[Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
        """A function that starts a gather of each input, bytes made by `shard`, into its output, [n t] of [t]. It
        returns a handle: its `wait()` makes the current stream wait, and not the CPU."""

    def barrier(self) -> None:
        """Collective: between a write of any rank's shard and a gather."""


class CollectiveGathers(Gathers):
    """The process group gathers all parameters of a unit in one coalesced collective."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def shard(self, nbytes: int) -> Tensor | None:
        return None

    def prepare(self, outputs: list[Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
        return lambda: gather_into(outputs, inputs, self._group)


class PeerGathers(Gathers):
    """Copy engines read the peers' shards ([Note: gathers by copy engines]).

    Args:
        sizes: bytes of each unit's shard, in the order of the calls of `shard`.

    Raises:
        ConfigError: the ranks are not GPUs of one host that reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, sizes: Sequence[int]) -> None:
        self._group = group
        self._memory: PeerMemory = peer_memory(group, device, sum(sizes), _WANTED)
        self._parts = self._memory.parts
        self._own = self._parts[group.rank()].zero_()  # rows that the last ranks lack are gathered too, and stay zero
        self._used = 0
        self._one = torch.ones((), device=device)

    def shard(self, nbytes: int) -> Tensor | None:
        self._used += nbytes
        return self._own[self._used - nbytes : self._used]

    def prepare(self, outputs: list[Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
        n, rank, copies = self._group.size(), self._group.rank(), []
        for step in range(n):  # in no step do two ranks read from the same one
            peer = (rank + step) % n
            for output, own in zip(outputs, inputs, strict=True):
                at, size = own.storage_offset() - self._own.storage_offset(), own.numel()
                copies.append((output[peer * size : (peer + 1) * size], self._parts[peer][at : at + size]))
        return lambda: self._gather(copies)

    def barrier(self) -> None:
        # a maximum of ones is one: the same number serves every barrier, and is never written again
        dist.all_reduce(self._one, dist.ReduceOp.MAX, self._group)

    def wait(self) -> None:
        """Let the current stream wait for every gather that was started."""
        device = self._memory.device
        device.follow(device.current(), self._memory.side)

    def _gather(self, copies: Sequence[tuple[Tensor, Tensor]]) -> PeerGathers:
        device, side = self._memory.device, self._memory.side
        device.follow(side, device.current())  # the last reader of the outputs is done
        for target, source in copies:
            device.copy(side, target, source)
        record("data", "gathers on copy engines")
        return self
