"""Who carries the exchanges of gradients of the flat data engine: the process group, or the GPUs' copy engines.

[Note: exchanges by copy engines]
A rank's copy engine writes the rows of its gradients that another rank owns into that rank's slot, while the backward
of the next block runs. No kernel takes multiprocessors from its matmuls. Slots, flags and their order are those of
`ops.copy_engine`: at most two exchanges are open at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.ops.copy_engine import FREE, FULL, CopyEngine
from colrow.ops.copy_engine_cuda import Wanted, copy_engine
from colrow.ops.execution_record import record

ExchangeCarrier = Literal["collectives", "copy_engine"]
_WANTED = Wanted("fsdp.exchange: copy_engine", "set fsdp.exchange: collectives")


class Ranges(NamedTuple):
    """What a unit exchanges.

    Attributes:
        size: elements of a row: of the unit's shard.
        parts: rank -> the flat tensors that it owns, with their places in its row; all of one dtype.
        own: the places of this rank's, and their numbers of elements.
    """

    size: int
    parts: Callable[[int], list[tuple[int, Tensor]]]
    own: list[tuple[int, int]]


class GradientExchange(ABC):
    """One exchange that has been started."""

    @abstractmethod
    def received(self) -> Tensor:
        """[n - 1, size]: row i - 1 is from rank - i (mod n); undefined between the ranges. The current stream waits for
        it, and not the CPU."""

    def close(self) -> None:
        """After the last read of `received`, and of what was sent."""


class GradientExchanges(ABC):
    """Carries the exchanges of all units."""

    @abstractmethod
    def start(self, ranges: Ranges, like: Tensor) -> GradientExchange:
        """Send each rank its parts. What is sent must not change before `close`.

        Args:
            like: of the parts' dtype and device.
        """


class CollectiveExchanges(GradientExchanges):
    """The process group sends each parameter's rows as messages between two ranks, all in one batch."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def start(self, ranges: Ranges, like: Tensor) -> GradientExchange:
        group, rank, n = self._group, self._group.rank(), self._group.size()
        rows = like.new_empty(n - 1, ranges.size)
        operations: list[dist.P2POp] = []
        for step in range(1, n):
            to, source = (rank + step) % n, (rank - step) % n
            operations += [dist.P2POp(dist.isend, x, group=group, group_peer=to) for _, x in ranges.parts(to)]
            operations += [
                dist.P2POp(dist.irecv, rows[step - 1, at : at + size], group=group, group_peer=source)
                for at, size in ranges.own
            ]
        return _Collective(dist.batch_isend_irecv(operations) if operations else [], rows)


class _Collective(GradientExchange):
    def __init__(self, works: list[Any], rows: Tensor) -> None:
        self._works, self._rows = works, rows

    def received(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._rows


class PeerExchanges(GradientExchanges):
    """Copy engines send gradients ([Note: exchanges by copy engines]).

    Args:
        nbytes: of the largest unit's row.

    Raises:
        ConfigError: the ranks are not GPUs of one host that reach each other's memory.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, nbytes: int) -> None:
        self._engine = copy_engine(group, device, _WANTED)
        self._engine.reserve((group.size() - 1) * nbytes)

    def start(self, ranges: Ranges, like: Tensor) -> GradientExchange:
        record("data", "exchanges on copy engines")
        return _PeerExchange(self._engine, ranges, like)


class _PeerExchange(GradientExchange):
    def __init__(self, engine: CopyEngine, ranges: Ranges, like: Tensor) -> None:
        device, side, ring = engine.device, engine.side, engine.ring
        self._engine, self._ring, self._n = engine, ring, engine.size
        nbytes = (self._n - 1) * ranges.size * like.element_size()
        self._turn = engine.next_turn(nbytes)
        rows = [slots[self._turn, :nbytes].view(like.dtype).view(self._n - 1, -1) for slots in ring.slots]
        self._rows = rows[ring.rank]
        device.follow(side, device.current())  # the gradients are complete
        for step in range(1, self._n):
            peer = (ring.rank + step) % self._n
            # see [Note: slots and flags]: the peer has read what this rank wrote there last
            device.take(side, ring.flag(ring.rank, FREE, self._turn, peer))
            for at, part in ranges.parts(peer):
                device.copy(side, rows[peer][step - 1, at : at + part.numel()], part)
            device.put(side, ring.flag(peer, FULL, self._turn, ring.rank))

    def received(self) -> Tensor:
        device = self._engine.device
        device.take(device.current(), *self._flags(ring_owner=True))
        return self._rows

    def close(self) -> None:
        device = self._engine.device
        device.put(device.current(), *self._flags(ring_owner=False))
        device.follow(device.current(), self._engine.side)  # the allocator knows nothing of the stream that has read

    def _flags(self, *, ring_owner: bool) -> list[Any]:
        """`full` of this rank's slot for each sender, or the senders' `free`."""
        ring = self._ring
        peers = [(ring.rank - step) % self._n for step in range(1, self._n)]
        if ring_owner:
            return [ring.flag(ring.rank, FULL, self._turn, peer) for peer in peers]
        return [ring.flag(peer, FREE, self._turn, ring.rank) for peer in peers]
