"""What sends chunks between ranks while matmuls run: the process group, or the GPUs' copy engines."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.copy_engine_cuda import copy_engine
from colrow.ops.exchange import Carrier, Exchange
from colrow.torch_compat import group_named

Overlap = Literal["none", "collectives", "point_to_point", "copy_engine"]
"""What runs at the same time as matmuls: nothing; backward's collectives, each as one; or chunks of every collective,
sent by one of the carriers. On GPUs `collectives` are NCCL's, whose kernels take multiprocessors from the matmuls.
"""
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)


class PointToPoint(Carrier):
    """The process group's sends and receives: on any device and any number of hosts."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device, self.size = group, device, group.size()

    def open(self, shape: tuple[int, ...], dtype: torch.dtype) -> Exchange:
        slots = torch.empty(self.size, *shape, dtype=dtype, device=self.device)
        return _PointToPointExchange(slots, self.group)


class _PointToPointExchange(Exchange):
    mark = "colrow::send_point_to_point"

    def __init__(self, slots: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__(slots, group.rank())
        self._group = group
        self._works: dict[int, list[dist.Work]] = {}
        self._held: list[Tensor] = []

    def _send(self, i: int, chunk: Tensor) -> None:
        to, source = self.after(i), self.before(i)
        pair = [
            dist.P2POp(dist.isend, chunk, group=self._group, group_peer=to),
            dist.P2POp(dist.irecv, self.slots[source], group=self._group, group_peer=source),
        ]
        # As one batch: NCCL runs a group's operations in order, so separate sends of all ranks could wait for the
        # receives that each rank has enqueued behind its own send.
        self._works[i] = dist.batch_isend_irecv(pair)
        self._held.append(chunk)  # the send reads it until `receive` has waited for the batch

    def receive(self, i: int) -> Tensor:
        for work in self._works.pop(i):
            work.wait()
        return self.slots[self.before(i)]

    def close(self) -> None:
        assert not self._works, "a chunk was not received"
        self._held.clear()


def carrier(overlap: str, group_name: str, device: torch.device) -> Carrier | None:
    """The carrier for this value of `overlap`; None for `none` and `collectives`, which send no chunks.

    Raises:
        ConfigError: `overlap` is unknown, or copy engines cannot reach the ranks of the group.
    """
    group = group_named(group_name)
    match overlap:
        case "none" | "collectives":
            return None
        case "point_to_point":
            return PointToPoint(group, device)
        case "copy_engine":
            return copy_engine(group, device)
    raise ConfigError(f"overlap={overlap!r}: choose from {', '.join(OVERLAPS)}")
