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
from colrow.torch_compat import raw_stream, symmetric_memory

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


# ---- CUDA ------------------------------------------------------------------------------------------------------------


class Cuda:
    """`Device` on CUDA, by the driver's own functions: torch's ways to the same cost a send ten times as much CPU."""

    _UNTIL_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ
    _UNTIMED = 2  # CU_EVENT_DISABLE_TIMING

    def __init__(self, device: torch.device) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        pointer, number, flags = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint
        self._wait = _function(driver.cuStreamWaitValue32_v2, pointer, number, ctypes.c_uint32, flags)
        self._write = _function(driver.cuStreamWriteValue32_v2, pointer, number, ctypes.c_uint32, flags)
        self._copy = _function(driver.cuMemcpyDtoDAsync_v2, number, number, ctypes.c_size_t, pointer)
        self._record = _function(driver.cuEventRecord, pointer, pointer)
        self._wait_event = _function(driver.cuStreamWaitEvent, pointer, pointer, flags)
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._event = ctypes.c_void_p()
        with torch.cuda.device(self._index):
            torch.cuda.synchronize()  # the driver's current context is torch's from here on
            create = _function(driver.cuEventCreate, ctypes.POINTER(pointer), flags)
            self._checked(create(ctypes.byref(self._event), self._UNTIMED))

    def current(self) -> int:
        return raw_stream(self._index)

    def follow(self, stream: int, leader: int) -> None:
        self._checked(self._record(self._event, leader))
        self._checked(self._wait_event(stream, self._event, 0))  # for what is recorded now, whatever comes later

    def copy(self, stream: int, target: Tensor, source: Tensor) -> None:
        assert source.is_contiguous(), "a copy engine takes what lies in one piece"
        assert source.nbytes == target.nbytes, "a chunk of another size than its slot"
        self._checked(self._copy(target.data_ptr(), source.data_ptr(), source.nbytes, stream))

    def put(self, stream: int, flag: int) -> None:
        self._checked(self._write(stream, flag, 1, 0))

    def take(self, stream: int, flag: int) -> None:
        self._checked(self._wait(stream, flag, 1, self._UNTIL_EQUAL))
        self._checked(self._write(stream, flag, 0, 0))

    @staticmethod
    def _checked(status: int) -> None:
        if status:
            raise RuntimeError(f"a function of the CUDA driver failed with CUresult {status}")


def _function(function: Any, *arguments: Any) -> Any:
    function.argtypes = list(arguments)
    return function


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
    alone = dist.get_backend(group) == "fake"
    why, cause = _obstacle(group, device, alone), None
    if why is None:
        try:
            # torch's pool keeps them alive
            streams = [torch.cuda.Stream(device, priority=-1).cuda_stream for _ in range(1, group.size())]
            kind, ring = (AloneEngine, _ring_alone) if alone else (CopyEngine, _symmetric_ring)
            engine = kind(Cuda(device), streams, lambda nbytes: ring(group, device, nbytes))
        except (OSError, RuntimeError) as error:  # no driver library; no handles to share, or no way to map them
            why, cause = f"memory cannot be shared ({error})", error
        else:
            _ENGINES[name] = group, engine
            return engine
    raise ConfigError(
        f"overlap: copy_engine needs GPUs of one host that reach each other's memory; here {why}: use overlap: "
        "collectives (preset llama-fast), or point_to_point"
    ) from cause


def _obstacle(group: dist.ProcessGroup, device: torch.device, alone: bool) -> str | None:
    """Why copy engines cannot reach the ranks of the group, the same on each; None when nothing speaks against it."""
    if device.type != "cuda":
        return f"the ranks compute on {device.type}"
    if alone:
        return None
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
    if torch.cuda.is_current_stream_capturing():
        raise ConfigError("a CUDA graph cannot hold the making of symmetric memory: run a step before you capture one")
    n, rank, memory = group.size(), group.rank(), symmetric_memory()

    def shared(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[list[Tensor], list[int]]:
        mine = memory.empty(*shape, dtype=dtype, device=device)
        handle = memory.rendezvous(mine, group)
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


def _ring_alone(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> Ring:
    """A ring of new slots where no peer is."""
    n, rank = group.size(), group.rank()
    torch.cuda.synchronize(device)
    slots = torch.zeros(RING, nbytes, dtype=torch.uint8, device=device)
    flags = torch.zeros(2, RING, n, dtype=torch.int32, device=device)
    flags[FREE] = 1
    torch.cuda.synchronize(device)
    column = flags_alone(rank, n)

    def flag(holder: int, kind: int, slot: int, peer: int) -> int:
        return flags.data_ptr() + flags.element_size() * ((kind * RING + slot) * n + column(holder, peer))

    return Ring(rank, [slots] * n, flag)
