"""The memory of one rank's step on fake tensors: which storages are alive, and the peak of each part of the step.

[Note: segments]
A step is cut into segments: forward of each block, backward of each block, and what lies before, between and after
them. A segment knows what was alive at its start and end and its peak. Blocks of one kind have equal segments, so a
step of two blocks gives that of any number.

Two things that a walk over operators would count and no rank allocates: the tensors of the unsharded size by which
DTensor propagates shapes, and views of parameters, whose storages are there before the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from colrow.forecasting.work import Work, WorkCounter
from colrow.torch_compat import CompilableMode, is_async, is_higher_order, tree_leaves

_BLOCK = 512
"""Bytes to which CUDA's allocator rounds each tensor up."""


@dataclass(frozen=True)
class Live:
    """Bytes that are alive: gradients of parameters, and everything else that the step allocates."""

    activations: int = 0
    gradients: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.gradients

    def __sub__(self, other: Live) -> Live:
        return Live(self.activations - other.activations, self.gradients - other.gradients)


@dataclass
class Segment:
    """A part of the step: see [Note: segments].

    Attributes:
        block: the block's name; empty outside of blocks.
    """

    block: str
    backward: bool
    start: Live
    peak: Live = Live()
    end: Live = Live()
    work: Work = field(default_factory=Work)

    @property
    def rise(self) -> Live:
        """From the start to the peak."""
        return self.peak - self.start

    @property
    def change(self) -> Live:
        """From the start to the end."""
        return self.end - self.start


class LiveStorages(CompilableMode):
    """A mode around forward and backward on fake tensors. `suspend` and `resume` keep operators out of it.

    Args:
        given: tensors that exist before the step.
        fused: blocks are compiled. There what a pointwise operator writes is allocated when an operator of another kind
            reads it, or when it outlives the segment: until then it is a value inside a fused kernel.
    """

    def __init__(self, given: Iterable[Tensor], *, fused: bool = False) -> None:
        super().__init__()
        self._fused = fused
        self._pending: dict[int, int] = {}
        """Bytes of storages that no kernel has written yet."""
        self._bytes: dict[int, int] = {}
        self._gradients: set[int] = set()
        self._suspended = 0
        self.live = Live()
        self.counter = WorkCounter()
        self.segments: list[Segment] = []
        for tensor in given:  # outside of the mode: reading a shard is an operator
            self._bytes[_key(tensor)] = 0
        self.begin("", backward=False)

    def begin(self, block: str, *, backward: bool) -> None:
        """End the running segment and start one."""
        if self.segments:
            self._close()
        self.segments.append(Segment(block, backward, self.live, peak=self.live))
        self.counter.begin(self.segments[-1].work)

    def end(self, block: str) -> None:
        """End the block's backward, unless that of the block before it has begun: both hang on one tensor."""
        if self.segments[-1].block == block:
            self.begin("", backward=True)

    def finish(self) -> list[Segment]:
        """The segments, after the step."""
        self._close()
        return self.segments

    def mark_gradient(self, tensor: Tensor) -> None:
        """Count this tensor among the gradients of parameters."""
        key = _key(tensor)
        self._write([key])
        if key in self._bytes and key not in self._gradients:
            self._gradients.add(key)
            nbytes = self._bytes[key]
            self.live = Live(self.live.activations - nbytes, self.live.gradients + nbytes)

    def suspend(self) -> None:
        self._suspended += 1

    def resume(self) -> None:
        self._suspended -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, DTensor) or is_async(leaf) for leaf in leaves):
            return NotImplemented  # it comes again, on local tensors
        out = func(*args, **(kwargs or {}))
        if self._suspended or is_higher_order(func):
            return out
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        pointwise = self.counter.add(func, args, kwargs or {}, leaves, outputs)
        if not pointwise:
            self._write({_key(tensor) for tensor in leaves})
        for tensor in outputs:
            self._add(tensor, pending=pointwise and self._fused and bool(self.segments[-1].block))
        return out

    def _add(self, tensor: Tensor, *, pending: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._bytes:
            return
        self._bytes[key] = nbytes = -(-storage.nbytes() // _BLOCK) * _BLOCK
        weakref.finalize(storage, self._freed, key, nbytes).atexit = False
        self._pending[key] = nbytes
        if not pending:
            self._write([key])

    def _write(self, keys: Iterable[int]) -> None:
        """Allocate those of these storages that are pending."""
        nbytes = sum(self._pending.pop(key, 0) for key in keys)
        self.live = Live(self.live.activations + nbytes, self.live.gradients)
        segment = self.segments[-1]
        if self.live.total > segment.peak.total:
            segment.peak = self.live

    def _freed(self, key: int, nbytes: int) -> None:
        self._bytes.pop(key, None)
        self.counter.forget(key)
        if self._pending.pop(key, None) is not None:
            return
        if key in self._gradients:
            self._gradients.discard(key)
            self.live = Live(self.live.activations, self.live.gradients - nbytes)
        else:
            self.live = Live(self.live.activations - nbytes, self.live.gradients)

    def _close(self) -> None:
        self._write(list(self._pending))
        self.segments[-1].end = self.live


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
