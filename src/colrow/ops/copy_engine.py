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

import ctypes
import socket
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.carriers import Carrier, Exchange

RING = 2  # slots of a rank; an operator may have two exchanges open, a gather and a reduce-scatter
FULL, FREE = 0, 1
_ALIGNMENT = 256  # bytes, of a slot


class Device(Protocol):
    """What a copy engine asks of a device. Everything is put in a stream's order and returns at once."""

    def current(self) -> Any:
        """The stream on which products run."""

    def follow(self, stream: Any, leader: Any) -> None:
        """What `stream` is given from now on starts after all that `leader` was given so far."""

    def copy(self, stream: Any, target: Tensor, source: Tensor) -> None: ...

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
        self._views: dict[Hashable, list[Tensor]] = {}

    def open(self, shape: tuple[int, ...], dtype: torch.dtype) -> Exchange:
        nbytes = self.size * torch.Size(shape).numel() * dtype.itemsize
        if nbytes > self.ring.bytes:
            self.ring, self._views = self._grow(-(-nbytes // _ALIGNMENT) * _ALIGNMENT), {}
        self._turn = (self._turn + 1) % RING
        key = (self._turn, shape, dtype)
        if key not in self._views:
            self._views[key] = [
                slots[self._turn, :nbytes].view(dtype).view(self.size, *shape) for slots in self.ring.slots
            ]
        return _CopyEngineExchange(self.device, self.streams, self.ring, self._turn, self._views[key])


class _CopyEngineExchange(Exchange):
    mark = "colrow::send_copy_engine"

    def __init__(self, device: Device, streams: list[Any], ring: Ring, turn: int, views: list[Tensor]) -> None:
        super().__init__(views[ring.rank], ring.rank)
        self._device, self._streams, self._ring, self._turn, self._views = device, streams, ring, turn, views
        self._held: list[Tensor] = []
        self._received = 0

    def _send(self, i: int, chunk: Tensor) -> None:
        peer, side = self.after(i), self._streams[i - 1]
        self._device.follow(side, self._device.current())
        self._device.take(side, self._ring.flag(self.rank, FREE, self._turn, peer))
        self._device.copy(side, self._views[peer][self.rank], chunk)
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


# ---- CUDA ------------------------------------------------------------------------------------------------------------


class Cuda:
    """`Device` on CUDA."""

    _UNTIL_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ

    def __init__(self) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        self._wait, self._write = driver.cuStreamWaitValue32_v2, driver.cuStreamWriteValue32_v2
        for function in (self._wait, self._write):
            function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream()

    def follow(self, stream: torch.cuda.Stream, leader: torch.cuda.Stream) -> None:
        stream.wait_stream(leader)

    def copy(self, stream: torch.cuda.Stream, target: Tensor, source: Tensor) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source)

    def put(self, stream: torch.cuda.Stream, flag: int) -> None:
        self._checked(self._write(stream.cuda_stream, flag, 1, 0))

    def take(self, stream: torch.cuda.Stream, flag: int) -> None:
        self._checked(self._wait(stream.cuda_stream, flag, 1, self._UNTIL_EQUAL))
        self._checked(self._write(stream.cuda_stream, flag, 0, 0))

    @staticmethod
    def _checked(status: int) -> None:
        if status:
            raise RuntimeError(f"a stream memory operation failed with CUresult {status}")


_ENGINES: dict[str, tuple[dist.ProcessGroup, CopyEngine]] = {}


def copy_engine(group: dist.ProcessGroup, device: torch.device) -> CopyEngine:
    """The group's engine. Collective at the first call.

    Raises:
        ConfigError: the ranks are no GPUs of one host that reach each other's memory.
    """
    name = str(group.group_name)
    known = _ENGINES.get(name)
    if known is not None and known[0] is group:
        return known[1]
    why, cause = _obstacle(group, device), None
    if why is None:
        try:
            streams = [torch.cuda.Stream(device, priority=-1) for _ in range(1, group.size())]
            engine = CopyEngine(Cuda(), streams, lambda nbytes: _symmetric_ring(group, device, nbytes))
        except (OSError, RuntimeError) as error:  # no driver library; no handles to share, or no way to map them
            why, cause = f"memory cannot be shared ({error})", error
        else:
            _ENGINES[name] = group, engine
            return engine
    raise ConfigError(
        f"overlap: copy_engine needs GPUs of one host that reach each other's memory; here {why}: use overlap: "
        "collectives (preset llama-fast), or point_to_point"
    ) from cause


def _obstacle(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why copy engines cannot reach the ranks of the group, the same on each; None when nothing speaks against it."""
    if device.type != "cuda":
        return f"the ranks compute on {device.type}"
    boot = Path("/proc/sys/kernel/random/boot_id")  # hosts of one image may have one name
    host = socket.gethostname(), boot.read_text() if boot.exists() else ""
    mine = torch.cuda.get_device_properties(device).uuid
    ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(ranks, (host, str(mine)), group=group)
    if len({host for host, _ in ranks}) > 1:
        return f"the ranks are on {len({host for host, _ in ranks})} hosts"
    if len({uuid for _, uuid in ranks}) < len(ranks):
        return "ranks share a GPU"
    visible = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    seen = [visible[uuid] for _, uuid in ranks if uuid in visible]
    for a in seen:
        for b in seen:
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                return f"GPU {a} has no access to the memory of GPU {b}"
    return None


def _symmetric_ring(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> Ring:
    """A ring of new slots. Collective; the one place where the CPU waits for the GPUs."""
    import torch.distributed._symmetric_memory as symmetric_memory

    if torch.cuda.is_current_stream_capturing():
        raise ConfigError("a CUDA graph cannot hold the making of symmetric memory: run a step before you capture one")
    n, rank = group.size(), group.rank()

    def shared(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
        mine = symmetric_memory.empty(*shape, dtype=dtype, device=device)
        handle = symmetric_memory.rendezvous(mine, group)
        return [mine if q == rank else handle.get_buffer(q, shape, dtype) for q in range(n)], handle.buffer_ptrs

    torch.cuda.synchronize(device)  # a smaller ring before this one is idle, here and, behind the barrier, at the peers
    slots, _ = shared((RING, nbytes), torch.uint8)
    flags, addresses = shared((2, RING, n), torch.int32)
    flags[rank][FULL].zero_()
    flags[rank][FREE].fill_(1)
    torch.cuda.synchronize(device)
    dist.all_reduce(torch.zeros(1, device=device), group=group)  # nobody sends before all flags are set
    torch.cuda.synchronize(device)

    def flag(holder: int, kind: int, slot: int, peer: int) -> int:
        return addresses[holder] + flags[rank].element_size() * ((kind * RING + slot) * n + peer)

    return Ring(rank, slots, flag)
