"""The memory of one rank's step on fake tensors: which storages are alive, and the peak of each part of the step.

[Note: segments]
A step is cut into segments: forward of each block, backward of each block, and what lies before, between and after
them. A segment knows what was alive at its start and end and its peak. Blocks of one kind have equal segments, so a
step of two blocks gives that of any number.

[Note: fused kernels]
In compiled blocks a chain of pointwise operators is one kernel. What a chain writes is allocated when an operator of
another kind reads it, or when it outlives the segment; until then it is pending. The kernel reads what the chain began
with, so that lives until then too, though the operators that read it one by one are done. Only where both have one size
can the output take an input's place.

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
from colrow.sharding.operators import operator_name
from colrow.torch_compat import CompilableMode, is_async, is_higher_order, tensors_in

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
class StepSegment:
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


@dataclass(eq=False)
class _Storage:
    """Memory of tensors, from its first tensor to its last.

    Attributes:
        pending: no kernel has written it yet; then it reads `sources` when one does ([Note: fused kernels]).
        alone: it may take a source's place: it is not put together of slices.
        readers: pending storages of which this is a source; it stays until they are written.
    """

    nbytes: int
    pending: bool = False
    sources: frozenset[_Storage] = frozenset()
    alone: bool = True
    is_gradient: bool = False
    is_freed: bool = False
    readers: int = 0


class LiveStorages(CompilableMode):
    """A mode around forward and backward on fake tensors. `suspend` and `resume` keep operators out of it.

    Args:
        given: tensors that exist before the step.
        fused: blocks are compiled ([Note: fused kernels]).
    """

    def __init__(self, given: Iterable[Tensor], *, fused: bool = False) -> None:
        super().__init__()
        self._fused = fused
        self._storages: dict[int, _Storage] = {}
        self._suspended = 0
        self.live = Live()
        self.counter = WorkCounter()
        self.segments: list[StepSegment] = []
        for tensor in given:  # outside of the mode: reading a shard is an operator
            self._storages[_key(tensor)] = _Storage(0)
        self.begin("", backward=False)

    def begin(self, block: str, *, backward: bool) -> None:
        """End the running segment and start one."""
        if self.segments:
            self._close()
        self.segments.append(StepSegment(block, backward, self.live, peak=self.live))
        self.counter.begin(self.segments[-1].work)

    def end(self, block: str) -> None:
        """End the block's backward, unless that of the block before it has begun: both hang on one tensor."""
        if self.segments[-1].block == block:
            self.begin("", backward=True)

    def finish(self) -> list[StepSegment]:
        """The segments, after the step."""
        self._close()
        return self.segments

    def mark_gradient(self, tensor: Tensor) -> None:
        """Count this tensor among the gradients of parameters."""
        storage = self._storages.get(_key(tensor))
        if storage is not None and not storage.is_gradient:
            self._write([storage])
            self._count(storage, -storage.nbytes)
            storage.is_gradient = True
            self._count(storage, storage.nbytes)

    def suspend(self) -> None:
        self._suspended += 1

    def resume(self) -> None:
        self._suspended -= 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tensors_in((args, kwargs))
        if any(isinstance(leaf, DTensor) or is_async(leaf) for leaf in leaves):
            return NotImplemented  # it comes again, on local tensors
        out = func(*args, **(kwargs or {}))
        if self._suspended or is_higher_order(func):
            return out
        outputs = tensors_in(out)
        pointwise = self.counter.add(func, args, kwargs or {}, leaves, outputs)
        # Inside a compiled block a pointwise operator's result takes memory once a kernel of another kind reads it.
        read = [storage for storage in map(self._storages.get, {_key(x) for x in leaves}) if storage is not None]
        if not pointwise:
            self._write(read)
        pending = pointwise and self._fused and bool(self.segments[-1].block)
        for tensor in outputs:
            self._add(tensor, read if pending else None, alone=operator_name(func) != "cat")
        return out

    def _add(self, tensor: Tensor, read: list[_Storage] | None, *, alone: bool) -> None:
        """`read`: by the pointwise operator that makes the tensor inside a fused kernel."""
        memory = tensor.untyped_storage()
        if memory._cdata in self._storages:
            return
        storage = _Storage(-(-memory.nbytes() // _BLOCK) * _BLOCK, pending=True, alone=alone)
        self._storages[memory._cdata] = storage
        # not at the interpreter's exit, which would run it for storages that are alive there
        weakref.finalize(memory, self._freed, memory._cdata, storage).atexit = False
        if read is None:
            self._write([storage])
            return
        storage.sources = frozenset().union(*(x.sources if x.pending else {x} for x in read))
        for source in storage.sources:
            source.readers += 1

    def _write(self, storages: Iterable[_Storage]) -> None:
        """Allocate those of these storages that are pending, by one kernel, which reads their sources."""
        written = [storage for storage in storages if storage.pending]
        for storage in written:
            storage.pending = False
            if (source := self._place(storage)) is not None:
                self._count(source, -source.nbytes)
                source.nbytes = 0
            self._count(storage, storage.nbytes)
        segment = self.segments[-1]
        if self.live.total > segment.peak.total:
            segment.peak = self.live
        for storage in written:
            self._leave_sources(storage)

    def _place(self, storage: _Storage) -> _Storage | None:
        """A source in whose memory the kernel can write: nothing else reads it, and the sizes are equal."""
        if not storage.alone:
            return None
        fits = (x for x in storage.sources if x.is_freed and x.readers == 1 and x.nbytes == storage.nbytes)
        return next(fits, None)

    def _leave_sources(self, storage: _Storage) -> None:
        for source in storage.sources:
            source.readers -= 1
            if source.is_freed and not source.readers:
                self._count(source, -source.nbytes)
        storage.sources = frozenset()

    def _freed(self, key: int, storage: _Storage) -> None:
        del self._storages[key]
        self.counter.forget(key)
        storage.is_freed = True
        if storage.pending:
            storage.pending = False
            self._leave_sources(storage)
        elif not storage.readers:
            self._count(storage, -storage.nbytes)

    def _count(self, storage: _Storage, nbytes: int) -> None:
        live = self.live
        if storage.is_gradient:
            self.live = Live(live.activations, live.gradients + nbytes)
        else:
            self.live = Live(live.activations + nbytes, live.gradients)

    def _close(self) -> None:
        self._write(list(self._storages.values()))
        self.segments[-1].end = self.live


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
