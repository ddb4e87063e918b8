"""Chunks carried by the copy engines: written straight into a peer's memory, beside products and without their SMs.

[Note: slots and flags]
Each rank holds a ring of slots in symmetric memory. Beside each slot stand two flags for each peer, which are binary
semaphores: `full` (the peer's chunk is here) and `free` (the peer has read what this rank last wrote into its slot).
Streams put a flag (write 1) and take it (wait until it is 1, write 0) by stream memory operations, which need neither
a kernel nor the CPU; a kernel that waits could not even start beside a product that fills the GPU.

    sender, side stream       take my free; copy the chunk into the peer's slot; put the peer's full
    receiver, its own stream  take my full; read the slot ...; put the sender's free

So a slot is written only after its last reader, whatever the ranks' lead on each other. The flags are back where they
were after each use, and nothing counts: what is captured in a CUDA graph may be replayed.

Nothing deadlocks: were all of a rank's streams one queue, in the order of submission, each take would still wait for a
put that the peer submits earlier. A full is put before any rank's first take of that exchange, a free in the exchange
RING before it, which must be closed by then: hence at most RING open at a time. With two slots, and one exchange after
another, no sender waits for a free: it has received in the exchange before, whose sender had read the one before that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from colrow.ops.exchange import Carrier, Exchange

RING = 2  # slots of a rank; an operator may have two exchanges open, a gather and a reduce-scatter
FULL, FREE = 0, 1
_ALIGNMENT = 256  # bytes, of a slot


class Device(Protocol):
    """What a copy engine asks of a device. Everything is put in a stream's order and returns at once."""

    def current(self) -> Any:
        """The stream on which products run. Streams are the device's own handles."""

    def follow(self, stream: Any, leader: Any) -> None:
        """What `stream` is given from now on starts after all that `leader` was given so far."""

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Both contiguous, of one shape and dtype."""

    def put(self, stream: Any, flag: Any) -> None:
        """Write 1, after everything before it."""

    def take(self, stream: Any, flag: Any) -> None:
        """Wait until the flag is 1, and write 0."""


@dataclass(frozen=True)
class Ring:
    """A rank's slots and its view of the others'.

    Attributes:
        slots: [RING, bytes] of each rank, by rank; the peers' are mapped here.
        flag: where rank `holder` keeps the flag of this kind for `slot` and `peer`.
    """

    rank: int
    slots: list[Tensor]
    flag: Callable[[int, int, int, int], Hashable]

    @property
    def bytes(self) -> int:
        return self.slots[self.rank].shape[1]


class CopyEngine(Carrier):
    """Exchanges by peer copies, one side stream for each peer. `grow` makes a ring with slots of so many bytes."""

    def __init__(self, device: Device, streams: list[Any], grow: Callable[[int], Ring]) -> None:
        self.device, self.streams, self.size, self._grow = device, streams, len(streams) + 1, grow
        self.ring = grow(_ALIGNMENT)
        self._turn = 0
        self._views: dict[Hashable, tuple[Tensor, list[Tensor]]] = {}

    def open(self, shape: tuple[int, ...], dtype: torch.dtype) -> Exchange:
        nbytes = self.size * torch.Size(shape).numel() * dtype.itemsize
        if nbytes > self.ring.bytes:
            self.ring, self._views = self._grow(-(-nbytes // _ALIGNMENT) * _ALIGNMENT), {}
        self._turn = (self._turn + 1) % RING
        key = (self._turn, shape, dtype)
        if key not in self._views:
            views = [slots[self._turn, :nbytes].view(dtype).view(self.size, *shape) for slots in self.ring.slots]
            self._views[key] = views[self.ring.rank], self._targets(views)
        own, targets = self._views[key]
        return _CopyEngineExchange(self.device, self.streams, self.ring, self._turn, own, targets)

    def _targets(self, views: list[Tensor]) -> list[Tensor]:
        """Where this rank's chunk goes, by peer; `views` are a slot of each rank, [n, *chunk]."""
        return [view[self.ring.rank] for view in views]


class _CopyEngineExchange(Exchange):
    mark = "colrow::send_copy_engine"

    def __init__(
        self, device: Device, streams: list[Any], ring: Ring, turn: int, slots: Tensor, targets: list[Tensor]
    ) -> None:
        """`targets`: where this rank's chunk goes, by peer."""
        super().__init__(slots, ring.rank)
        self._device, self._streams, self._ring, self._turn, self._targets = device, streams, ring, turn, targets
        self._held: list[Tensor] = []
        self._received = 0

    def _send(self, i: int, chunk: Tensor) -> None:
        peer, side = self.after(i), self._streams[i - 1]
        self._device.follow(side, self._device.current())
        self._device.take(side, self._ring.flag(self.rank, FREE, self._turn, peer))
        self._device.copy(side, self._targets[peer], chunk)
        self._device.put(side, self._ring.flag(peer, FULL, self._turn, self.rank))
        self._held.append(chunk)

    def receive(self, i: int) -> Tensor:
        peer = self.before(i)
        self._device.take(self._device.current(), self._ring.flag(self.rank, FULL, self._turn, peer))
        self._received += 1
        return self.slots[peer]

    def close(self) -> None:
        assert self._received == len(self._streams), "a chunk was not received"
        current = self._device.current()
        for i, side in enumerate(self._streams, start=1):
            self._device.put(current, self._ring.flag(self.before(i), FREE, self._turn, self.rank))
            self._device.follow(current, side)  # the allocator may hand what was sent to this stream again
        self._held.clear()


class AloneEngine(CopyEngine):
    """The engine of a rank whose peers are not there: what goes to one peer comes in as the chunk of another.

    Its ring is its own; a rank's part in every exchange is done as ever, so that the rank can be measured.
    """

    def _targets(self, views: list[Tensor]) -> list[Tensor]:
        own = views[self.ring.rank]
        return [own[mirrored(self.ring.rank, peer, self.size)] for peer in range(self.size)]


def mirrored(rank: int, peer: int, n: int) -> int:
    """The rank that `rank` receives from in the step in which it sends to `peer`."""
    return (2 * rank - peer) % n


def flags_alone(rank: int, n: int) -> Callable[[int, int], int]:
    """Whose flag of its own a rank alone means by (holder, peer): one at a peer is the one that the peer would put."""
    return lambda holder, peer: peer if holder == rank else mirrored(rank, holder, n)
