"""The interface of `ops.carriers`: an exchange of chunks between the ranks of a group, and what opens one.

[Note: exchange]
In an exchange each rank of a group sends one chunk to each other rank, and all chunks have one shape. An all-gather
sends the same chunk to all ranks, a reduce-scatter another one to each. With n ranks it has n - 1 steps: in step i a
rank sends to rank + i and receives from rank - i (mod n), so that in no step two ranks send to the same one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd import profiler
from torch.profiler import record_function


class Exchange(ABC):
    """One exchange (see the note), from the first `send` to `close`.

    Attributes:
        slots: [n, *chunk]. Row q is rank q's chunk once it was received; the row of this rank is free to be written.
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
        """This rank's slot."""
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
        else:  # record_function takes as much CPU time as the send itself
            self._send(i, chunk)

    @abstractmethod
    def _send(self, i: int, chunk: Tensor) -> None: ...

    @abstractmethod
    def receive(self, i: int) -> Tensor:
        """The chunk of step i, after that step's `send`. On a GPU the current stream waits, and not the CPU."""

    def receive_all(self) -> None:
        """Every chunk of which none was received yet: the complete `slots`, but for this rank's own."""
        for i in range(1, self.size):
            self.receive(i)

    def gathered(self, own: Tensor) -> Tensor:
        """[n t, ...]: the result of a gather of `own` [t, ...], once all was received. Overwritten after `close`."""
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
