"""Who carries a chunk from one rank to another, beside products: the process group, or the copy engines of the GPUs.

[Note: exchange]
In an exchange each rank of a group sends one chunk to each other rank, and all chunks have one shape. A gather sends
the same chunk to all; a reduce-scatter sends each rank its own. With n ranks it has n - 1 steps: in step i a rank
sends to the rank i places after it, and receives from the rank i places before, so that in no step two send to one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import profiler
from torch.profiler import record_function

from colrow.errors import ConfigError
from colrow.ops.collectives import group_named

Overlap = Literal["none", "collectives", "point_to_point", "copy_engine"]
"""What runs beside products: nothing; backward's collectives, whole; or chunks of every collective, on one of the
carriers. `collectives` on GPUs are NCCL's, whose kernels take multiprocessors from the products.
"""
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)


class Exchange(ABC):
    """One exchange (see the note), from the first `send` to `close`.

    Attributes:
        slots: [n, *chunk]. Row q is rank q's chunk once it was received; this rank's own row is free to be written.
    """

    mark: ClassVar[str]
    """What a profiler's trace shows for each send."""

    def __init__(self, slots: Tensor, rank: int) -> None:
        self.slots, self.rank = slots, rank

    @property
    def size(self) -> int:
        """n, the ranks of the group."""
        return self.slots.shape[0]

    @property
    def own(self) -> Tensor:
        return self.slots[self.rank]

    def after(self, i: int) -> int:
        """The rank i places after this one."""
        return (self.rank + i) % self.size

    def before(self, i: int) -> int:
        """The rank i places before this one."""
        return (self.rank - i) % self.size

    def send(self, i: int, chunk: Tensor) -> None:
        """Step i: start to send `chunk`, contiguous, which must not change before `close`."""
        if profiler._is_profiler_enabled:
            with record_function(self.mark):
                self._send(i, chunk)
        else:  # a mark that nobody reads costs as much of the CPU as the sending
            self._send(i, chunk)

    @abstractmethod
    def _send(self, i: int, chunk: Tensor) -> None: ...

    @abstractmethod
    def receive(self, i: int) -> Tensor:
        """The chunk of step i, after that step's `send`. On a GPU the current stream waits, and not the CPU."""

    def gathered(self, own: Tensor) -> Tensor:
        """[n t, ...], of a gather of `own` [t, ...] in which everything was received; not to be kept after `close`."""
        self.own.copy_(own)
        return self.slots.flatten(0, 1)

    @abstractmethod
    def close(self) -> None:
        """After the last use of `slots`: they may be overwritten from now on."""


class Carrier(ABC):
    """Opens exchanges on a group of `size` ranks. At most `copy_engine.RING` may be open at a time."""

    size: int

    @abstractmethod
    def open(self, shape: tuple[int, ...], dtype: torch.dtype) -> Exchange:
        """An exchange of chunks of this shape. All ranks open the same ones in the same order."""


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
        self._works[i] = dist.batch_isend_irecv(pair)
        self._held.append(chunk)

    def receive(self, i: int) -> Tensor:
        for work in self._works.pop(i):
            work.wait()
        return self.slots[self.before(i)]

    def close(self) -> None:
        assert not self._works, "a chunk was not received"
        self._held.clear()


def carrier(overlap: str, group_name: str, device: torch.device) -> Carrier | None:
    """What carries chunks; None for `none` and `collectives`, which have none.

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
            from colrow.ops.copy_engine import copy_engine  # symmetric memory is imported where it is used

            return copy_engine(group, device)
    raise ConfigError(f"overlap={overlap!r}: choose from {', '.join(OVERLAPS)}")
