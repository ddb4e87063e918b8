"""Chunks sent by the GPUs' copy engines: into a peer's memory, while matmuls run, without taking their SMs.

[Note: slots and flags]
Each rank holds a ring of slots in symmetric memory. Beside each slot stand two flags for each peer, which are binary
semaphores: `full` (the peer's chunk is here) and `free` (the peer has read what this rank last wrote into its slot).
Streams put a flag (write 1) and take it (wait until it is 1, write 0) by stream memory operations, which need neither
a kernel nor the CPU; a kernel that waits could not start while a matmul fills the GPU.

    sender, side stream        take its `free`; copy the chunk into the peer's slot; put the peer's `full`
    receiver, compute stream   take its `full`; read the slot ...; put the sender's `free`

So a slot is written only after its last reader, however far one rank is ahead of another. A use leaves the flags as it
found them, and nothing is counted: what a CUDA graph captures may be replayed.

No deadlock: put all streams of a rank into one queue, in order of submission; each take still waits for a put that the
peer submits earlier. A `full` is put before any rank's first take of that exchange; a `free` is put in the exchange
RING before it, which must be closed by then: hence at most RING open at a time. With two slots, and one exchange after
another, no sender waits for a `free`: it has received in the exchange before, whose sender had read the one before.
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


class StreamDevice(Protocol):
    """The operations that a copy engine needs of a device. Each is enqueued on a stream and returns at once."""

    def current(self) -> Any:
        """The stream on which matmuls run. Streams are the device's handles."""

    def follow(self, stream: Any, leader: Any) -> None:
        """Work enqueued on `stream` from now on starts after all that was enqueued on `leader` so far."""

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None:
        """Both contiguous, of one shape and dtype."""

    def put(self, stream: Any, *flags: Any) -> None:
        """Write 1 into each, after everything before it."""

    def take(self, stream: Any, *flags: Any) -> None:
        """Wait until each is 1, and write 0."""


@dataclass(frozen=True)
class Ring:
    """A rank's slots and its view of the others'.

    Attributes:
        slots: [RING, bytes] of each rank, by rank; the peers' are mapped here.
        flag: (owner, FULL or FREE, slot, peer) -> where rank `owner` keeps that flag.
    """

    rank: int
    slots: list[Tensor]
    flag: Callable[[int, int, int, int], Hashable]

    @property
    def bytes(self) -> int:
        return self.slots[self.rank].shape[1]


class CopyEngine(Carrier):
    """Exchanges by peer copies, one after another on the stream `side`.

    One copy fills a GPU's links. Copies to all peers at once would all arrive with the last one. In turn, the first
    arrives in 1/(n - 1) of that time, and is multiplied while the others are under way.

    Args:
        size: ranks.
        grow: `grow(nbytes)` allocates a ring of slots of that size.
    """

    def __init__(self, device: StreamDevice, side: Any, size: int, grow: Callable[[int], Ring]) -> None:
        self.device, self.side, self.size, self._grow = device, side, size, grow
        self.ring = grow(_ALIGNMENT)
        self._turn = 0
        self._views: dict[Hashable, tuple[Tensor, list[Tensor]]] = {}

    def open(self, shape: tuple[int, ...], dtype: torch.dtype) -> Exchange:
        nbytes = self.size * torch.Size(shape).numel() * dtype.itemsize
        turn = self.next_turn(nbytes)
        key = (turn, shape, dtype)  # making the views takes more CPU time than a send
        if key not in self._views:
            views = [slots[turn, :nbytes].view(dtype).view(self.size, *shape) for slots in self.ring.slots]
            self._views[key] = views[self.ring.rank], self._targets(views)
        own, targets = self._views[key]
        return _CopyEngineExchange(self.device, self.side, self.ring, turn, own, targets)

    def next_turn(self, nbytes: int) -> int:
        """The slot of the exchange that begins, of at least `nbytes`."""
        self.reserve(nbytes)
        self._turn = (self._turn + 1) % RING
        return self._turn

    def reserve(self, nbytes: int) -> None:
        """Make slots of at least this size. Collective where they are smaller: all ranks open equal exchanges."""
        if nbytes > self.ring.bytes:
            self.ring, self._views = self._grow(-(-nbytes // _ALIGNMENT) * _ALIGNMENT), {}

    def _targets(self, views: list[Tensor]) -> list[Tensor]:
        """The memory that this rank's chunk goes to, by peer; `views` are a slot of each rank, [n, *chunk]."""
        return [view[self.ring.rank] for view in views]


class _CopyEngineExchange(Exchange):
    mark = "colrow::send_copy_engine"

    def __init__(
        self, device: StreamDevice, side: Any, ring: Ring, turn: int, slots: Tensor, targets: list[Tensor]
    ) -> None:
        """`targets`: where this rank's chunk goes, by peer."""
        super().__init__(slots, ring.rank)
        self._device, self._side, self._ring, self._turn, self._targets = device, side, ring, turn, targets
        self._held: list[Tensor] = []
        self._received = 0

    def _send(self, i: int, chunk: Tensor) -> None:
        peer, side = self.after(i), self._side
        if not (self._held and self._held[-1] is chunk):  # else it waits for the chunk already
            self._device.follow(side, self._device.current())
        self._device.take(side, self._ring.flag(self.rank, FREE, self._turn, peer))
        self._device.copy(side, self._targets[peer], chunk)
        self._device.put(side, self._ring.flag(peer, FULL, self._turn, self.rank))
        self._held.append(chunk)  # the allocator knows nothing of the side stream that reads it

    def receive(self, i: int) -> Tensor:
        peer = self.before(i)
        self._device.take(self._device.current(), self._ring.flag(self.rank, FULL, self._turn, peer))
        self._received += 1
        return self.slots[peer]

    def receive_all(self) -> None:
        steps = range(1, self.size)
        flags = [self._ring.flag(self.rank, FULL, self._turn, self.before(i)) for i in steps]
        self._device.take(self._device.current(), *flags)
        self._received += len(flags)

    def close(self) -> None:
        assert self._received == self.size - 1, "a chunk was not received"
        current = self._device.current()
        steps = range(1, self.size)
        # before the wait below: so a peer may write this rank's slots again while this rank's own sends still run
        self._device.put(current, *(self._ring.flag(self.before(i), FREE, self._turn, self.rank) for i in steps))
        self._device.follow(current, self._side)  # the allocator may give a sent chunk's memory to this stream again
        self._held.clear()


class OneRankEngine(CopyEngine):
    """The engine of one rank without peers, for measurements: what it sends to one peer it receives from another.

    The ring is local. Every copy, put and take of the rank happens as in a group, so its time is that of a real rank.
    """

    def _targets(self, views: list[Tensor]) -> list[Tensor]:
        own = views[self.ring.rank]
        return [own[mirrored(self.ring.rank, peer, self.size)] for peer in range(self.size)]


def mirrored(rank: int, peer: int, n: int) -> int:
    """The rank that `rank` receives from in the step in which it sends to `peer`."""
    return (2 * rank - peer) % n


def one_rank_flags(rank: int, n: int) -> Callable[[int, int], int]:
    """(owner, peer) -> the peer whose local flag stands for it: for a peer's flag, the one that the peer would put."""
    return lambda owner, peer: peer if owner == rank else mirrored(rank, owner, n)
