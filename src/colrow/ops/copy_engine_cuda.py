"""Copy engines on CUDA: the driver's stream operations, and slots and flags in symmetric memory. See `copy_engine`."""

from __future__ import annotations

import ctypes
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.copy_engine import FREE, FULL, RING, CopyEngine, OneRankEngine, Ring, one_rank_flags
from colrow.torch_compat import raw_stream, symmetric_memory


class _MemoryOperation(ctypes.Structure):
    """CUstreamBatchMemOpParams: a wait for a 32-bit value, or a write of one."""

    _fields_: ClassVar = [
        ("operation", ctypes.c_uint),
        ("address", ctypes.c_uint64),
        ("value", ctypes.c_uint64),
        ("flags", ctypes.c_uint),
        ("unused", ctypes.c_uint64 * 2),
    ]


_WAIT, _WRITE = 1, 2  # CU_STREAM_MEM_OP_WAIT_VALUE_32, CU_STREAM_MEM_OP_WRITE_VALUE_32
_UNTIL_EQUAL = 1  # CU_STREAM_WAIT_VALUE_EQ


class Cuda:
    """`StreamDevice` on CUDA, by the driver's functions: through torch's, a send takes ten times as much CPU time."""

    _UNTIMED = 2  # CU_EVENT_DISABLE_TIMING

    def __init__(self, device: torch.device) -> None:
        driver = ctypes.CDLL("libcuda.so.1")
        pointer, number, flags = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint
        self._operate = _function(driver.cuStreamBatchMemOp_v2, pointer, flags, pointer, flags)
        self._batches: dict[tuple[str, tuple[int, ...]], ctypes.Array[_MemoryOperation]] = {}
        self._copy = _function(driver.cuMemcpyDtoDAsync_v2, number, number, ctypes.c_size_t, pointer)
        self._record = _function(driver.cuEventRecord, pointer, pointer)
        self._wait_event = _function(driver.cuStreamWaitEvent, pointer, pointer, flags)
        self._index = torch.cuda.current_device() if device.index is None else device.index
        self._event = ctypes.c_void_p()
        with torch.cuda.device(self._index):
            torch.cuda.synchronize()  # makes torch's CUDA context current: the event is created in it
            create = _function(driver.cuEventCreate, ctypes.POINTER(pointer), flags)
            self._checked(create(ctypes.byref(self._event), self._UNTIMED))

    def current(self) -> int:
        return raw_stream(self._index)

    def follow(self, stream: int, leader: int) -> None:
        self._checked(self._record(self._event, leader))
        # waits for the record above, whatever the event records afterwards
        self._checked(self._wait_event(stream, self._event, 0))

    def copy(self, stream: int, target: Tensor, source: Tensor) -> None:
        assert source.is_contiguous(), "a copy engine copies contiguous memory"
        assert source.nbytes == target.nbytes, "the chunk and its slot differ in size"
        self._checked(self._copy(target.data_ptr(), source.data_ptr(), source.nbytes, stream))

    def put(self, stream: int, *flags: int) -> None:
        self._enqueue(stream, "put", flags)

    def take(self, stream: int, *flags: int) -> None:
        self._enqueue(stream, "take", flags)

    def _enqueue(self, stream: int, what: str, flags: tuple[int, ...]) -> None:
        # the driver copies the batch; made once for the same flags, since that takes more CPU time than the call
        if (batch := self._batches.get((what, flags))) is None:
            put = [_MemoryOperation(_WRITE, flag, 1) for flag in flags]
            take = [_MemoryOperation(_WAIT, flag, 1, _UNTIL_EQUAL) for flag in flags]
            take += [_MemoryOperation(_WRITE, flag, 0) for flag in flags]
            operations = put if what == "put" else take
            batch = self._batches[what, flags] = (_MemoryOperation * len(operations))(*operations)
        self._checked(self._operate(stream, len(batch), batch, 0))

    @staticmethod
    def _checked(status: int) -> None:
        if status:
            raise RuntimeError(f"a function of the CUDA driver failed with CUresult {status}")


def _function(function: Any, *arguments: Any) -> Any:
    function.argtypes = list(arguments)
    return function


class Wanted(NamedTuple):
    """Words of an error: what needs copy engines, and what to do without."""

    what: str
    advice: str


_CHUNKS = Wanted("overlap: copy_engine", "use overlap: collectives (preset llama-fast), or point_to_point")

_ENGINES: dict[str, tuple[dist.ProcessGroup, CopyEngine]] = {}


def copy_engine(group: dist.ProcessGroup, device: torch.device, wanted: Wanted = _CHUNKS) -> CopyEngine:
    """The group's engine. Collective at the first call: all ranks get one, or all raise the same error.

    Raises:
        ConfigError: on some rank, the ranks are not GPUs of one host that reach each other's memory.
    """
    name = str(group.group_name)
    known = _ENGINES.get(name)
    if known is not None and known[0] is group:  # a name is given again after destroy_process_group
        return known[1]
    cuda = _reachable(group, device, wanted)
    engine_class, ring = (OneRankEngine, _local_ring) if _is_isolated(group) else (CopyEngine, _symmetric_ring)
    engine = engine_class(cuda, _side_stream(device), group.size(), lambda nbytes: ring(group, device, nbytes))
    _ENGINES[name] = group, engine
    return engine


def _is_isolated(group: dist.ProcessGroup) -> bool:
    """Whether one rank is measured without peers."""
    return dist.get_backend(group) == "fake"


class _ObstacleError(Exception):
    """Copy engines cannot be used, as far as this rank sees."""


def _reachable(group: dist.ProcessGroup, device: torch.device, wanted: Wanted) -> Cuda:
    """The device's driver functions, once all ranks have seen that they reach each other. Collective."""
    with _all_or_none(group, wanted):
        if (obstacle := _obstacle(group, device)) is not None:
            raise _ObstacleError(obstacle)
        return Cuda(device)


@dataclass(frozen=True)
class PeerMemory:
    """Memory of each rank of a group, mapped here, and what reads it.

    Attributes:
        parts: uint8, by rank; this rank's too.
        side: a stream for copies.
    """

    parts: list[Tensor]
    device: Cuda
    side: int


def peer_memory(group: dist.ProcessGroup, device: torch.device, nbytes: int, wanted: Wanted) -> PeerMemory:
    """New memory of `nbytes`, the same on all ranks, that every rank of the group can read. Collective. What one rank
    writes another reads after a collective of both.

    Raises:
        ConfigError: as `copy_engine`, in the words of `wanted`.
    """
    cuda = _reachable(group, device, wanted)
    if _is_isolated(group):
        own = torch.empty(nbytes, dtype=torch.uint8, device=device)
        return PeerMemory([own] * group.size(), cuda, _side_stream(device))
    memory = symmetric_memory()
    # apart from the rendezvous, which is collective: a rank that cannot allocate must be known before the others enter
    with _all_or_none(group, wanted):
        own = memory.empty(nbytes, dtype=torch.uint8, device=device)
    with _all_or_none(group, wanted):
        handle = memory.rendezvous(own, group)
        parts = [own if q == group.rank() else handle.get_buffer(q, own.shape, own.dtype) for q in range(group.size())]
    return PeerMemory(parts, cuda, _side_stream(device))


@contextmanager
def _all_or_none(group: dist.ProcessGroup, wanted: Wanted = _CHUNKS) -> Iterator[None]:
    """Collective: the body succeeds on every rank, or every rank raises what was found on those where it does not.

    Otherwise a rank that succeeds would wait for ever in the next collective for one that has raised.
    """
    failure: str | None = None
    cause: Exception | None = None
    try:
        yield
    except _ObstacleError as error:
        failure = str(error)
    except (OSError, RuntimeError) as error:  # no driver library; no handles to share, or no way to map them
        failure, cause = f"memory cannot be shared ({error})", error
    found = [failure] * group.size()
    if not _is_isolated(group):
        dist.all_gather_object(found, failure, group=group)
    by_rank = {rank: text for rank, text in enumerate(found) if text is not None}
    if not by_rank:
        return
    if len(by_rank) == len(found) and len(set(found)) == 1:
        what = str(found[0])
    else:
        what = "; ".join(f"rank {rank} finds: {text}" for rank, text in by_rank.items())
    raise ConfigError(
        f"{wanted.what} needs GPUs of one host that reach each other's memory; here {what}: {wanted.advice}"
    ) from cause


def _obstacle(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why copy engines cannot reach the ranks of the group, as far as this rank sees; None if they can."""
    if device.type != "cuda":
        return f"the ranks compute on {device.type}"
    if _is_isolated(group):
        return None
    boot = Path("/proc/sys/kernel/random/boot_id")  # containers made from one image may share a host name
    host = socket.gethostname(), boot.read_text() if boot.exists() else ""
    uuid = torch.cuda.get_device_properties(device).uuid
    ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(ranks, (host, str(uuid)), group=group)
    if len({host for host, _ in ranks}) > 1:
        return f"the ranks are on {len({host for host, _ in ranks})} hosts"
    if len({uuid for _, uuid in ranks}) < len(ranks):
        return "ranks share a GPU"
    # CUDA_VISIBLE_DEVICES may hide peers from this rank: it can judge only the pairs that it sees
    index = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    visible = [index[uuid] for _, uuid in ranks if uuid in index]
    for a in visible:
        for b in visible:
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                return f"GPU {a} has no access to the memory of GPU {b}"
    return None


def _side_stream(device: torch.device) -> int:
    # torch hands streams out of a pool that lives as long as the process: the handle stays valid
    return torch.cuda.Stream(device, priority=-1).cuda_stream


def _symmetric_ring(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> Ring:
    """A ring of new slots. Collective; the one place where the CPU waits for the GPUs."""
    if torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "symmetric memory cannot be allocated during CUDA graph capture: run a step before you capture"
        )
    n, rank, memory = group.size(), group.rank(), symmetric_memory()

    with _all_or_none(group):
        torch.cuda.synchronize(device)  # the previous, smaller ring is idle here, and once all agree also at the peers
        own_slots = memory.empty(RING, nbytes, dtype=torch.uint8, device=device)
        own_flags = memory.empty(2, RING, n, dtype=torch.int32, device=device)
    with _all_or_none(group):  # no rank returns, and sends, before the flags of all are set
        handle = memory.rendezvous(own_slots, group)
        slots = [own_slots if q == rank else handle.get_buffer(q, own_slots.shape, torch.uint8) for q in range(n)]
        addresses = memory.rendezvous(own_flags, group).buffer_ptrs
        own_flags[FULL].zero_()
        own_flags[FREE].fill_(1)
        torch.cuda.synchronize(device)

    def flag(owner: int, which: int, slot: int, peer: int) -> int:
        return addresses[owner] + own_flags.element_size() * ((which * RING + slot) * n + peer)

    return Ring(rank, slots, flag)


def _local_ring(group: dist.ProcessGroup, device: torch.device, nbytes: int) -> Ring:
    """A ring of new slots without peers: flags start as if every peer had read."""
    n, rank = group.size(), group.rank()
    torch.cuda.synchronize(device)
    slots = torch.zeros(RING, nbytes, dtype=torch.uint8, device=device)
    flags = torch.zeros(2, RING, n, dtype=torch.int32, device=device)
    flags[FREE] = 1
    torch.cuda.synchronize(device)
    column = one_rank_flags(rank, n)

    def flag(owner: int, which: int, slot: int, peer: int) -> int:
        return flags.data_ptr() + flags.element_size() * ((which * RING + slot) * n + column(owner, peer))

    return Ring(rank, [slots] * n, flag)
