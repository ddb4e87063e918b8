"""Steps of the flat data engine with gathers and exchanges by copy engines, which a CPU simulates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from benchmarks.parity import step as parity
from benchmarks.parity.step import config_of, on_ranks
from colrow.config_sections import FsdpSection
from colrow.mesh import Mesh
from colrow.ops.copy_engine_cuda import PeerMemory
from colrow.ops.execution_record import recorded
from colrow.parallel import flat_exchange, flat_gather
from colrow.parallel.flat_gather import PeerGathers
from helpers.mapped_engine import Host, mapped_engine


def flat(**degrees: int) -> Mesh:
    return Mesh(**degrees, data_engine="flat")  # type: ignore[arg-type]


def exchanged_by_peers(device: str, degrees: dict[str, int], folder: Path, left_out: str = "") -> float:
    """The largest error of two steps with exchanges by copy engines."""
    config = config_of(flat(**degrees)).model_copy(update={"fsdp": FsdpSection(exchange="copy_engine")})
    shown: list[Any] = [str(folder)]
    dist.broadcast_object_list(shown, device=torch.device(device))
    Path(shown[0]).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(parity, "config_of", return_value=config))
        if device == "cpu":
            engine = partial(mapped_engine, Path(shown[0]), left_out)
            stack.enter_context(mock.patch.object(flat_exchange, "copy_engine", engine))
        worst = on_ranks(device, "llama, tied, odd vocabulary", flat(**degrees), steps=2).worst
    assert "exchanges on copy engines" in recorded("data")
    return worst


@contextmanager
def simulated_peers(*, barriers: bool = True) -> Iterator[None]:
    """Gathers by copy engines on CPUs, where a rank sees the others' memory as it was at the last barrier."""

    def memory(group: dist.ProcessGroup, device: torch.device, nbytes: int, wanted: Any) -> Any:
        parts = [torch.zeros(nbytes, dtype=torch.uint8) for _ in range(group.size())]
        return PeerMemory(parts, Host(), 1)  # type: ignore[arg-type]

    def barrier(gathers: PeerGathers) -> None:
        parts = gathers._memory.parts
        found = [torch.empty_like(part) for part in parts]
        dist.all_gather(found, parts[gathers._group.rank()], group=gathers._group)
        for part, value in zip(parts, found, strict=True):
            part.copy_(value)

    with (
        mock.patch.object(flat_gather, "peer_memory", memory),
        mock.patch.object(PeerGathers, "barrier", barrier if barriers else lambda _: None),
    ):
        yield


def by_peers(device: str, degrees: dict[str, int], *, barriers: bool) -> float:
    """The largest error of two steps with gathers by copy engines."""
    config = config_of(flat(**degrees)).model_copy(update={"fsdp": FsdpSection(gather="copy_engine")})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(parity, "config_of", return_value=config))
        if device == "cpu":
            stack.enter_context(simulated_peers(barriers=barriers))
        return on_ranks(device, "llama, tied, odd vocabulary", flat(**degrees), steps=2).worst
