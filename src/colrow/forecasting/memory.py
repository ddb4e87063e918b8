"""Peak memory of a rank: the walk of one micro-batch, put together for all layers, stages, micro-batches and data axes.

[Note: who holds gradients and weights]
bytes a parameter: master 4, two moments 8, where the compute dtype is lower a copy to compute with 2. Then
- tp alone, one micro-batch: gradients 2, made in backward, and passed on as they are (`ComputeWeights`).
- tp alone, several micro-batches: their sums 4, from the first backward to the step's end.
- FSDP2, one micro-batch: a unit's gradients become fp32 shards, 4 / dp_shard, when its backward ends; the buffer that
  is reduced, 4 bytes a parameter of the unit, lives until the next unit's is.
- FSDP2, several micro-batches: sums are not reduced until the last, 4 bytes a parameter of the tp rank.
- FSDP2 with resharding: of the gathered weights those of the running unit and of the prefetched one, and of root and
  head until their backward has ended; without: all of them.
- `mesh.data_engine: flat`: a copy of 2 / dp_shard beside two blocks' gathered weights, root and head; gradients are
  fp32 shards at once, of all micro-batches; a unit's gradients, 2 bytes a parameter, and what the rank gets of other
  ranks' stay until the next unit's backward ends. With copy engines the shards of all units, and two slots for what the
  rank gets, lie in memory that peers see, which the allocator does not count.

[Note: pools]
CUDA's allocator keeps what a stream has freed for that stream. FSDP2 makes reduced gradients on one of its own, and
gathers on another: their largest sums stay reserved when the compute stream has its peak, and the other way round.
When memory runs out the allocator gives back what is free, and the step takes longer (`timing.AT_EDGE`): so the pools
count for what the driver shows, and not for whether a cell fits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil

import torch

from colrow.forecasting.storages import StepSegment
from colrow.forecasting.walk import HEAD, ROOT, UnitParameters, Walk
from colrow.mesh import Mesh

GIB = 2**30
WORKSPACES = 96 * 2**20
"""Bytes of workspaces inside the allocator: cuBLAS takes 32 MiB a stream, and attention's backward has its own."""
CONTEXT = 2.7 * GIB
"""What the driver shows beside the allocator: CUDA's context, loaded kernels, NCCL's buffers (2.7 GiB on 2 and 4 H200,
torch 2.11)."""
RING_SLOTS = 2  # of `ops.copy_engine`, in symmetric memory, which the allocator does not count
FRAGMENTATION = 0.08
"""What a stream's pool holds beyond its peak, as a share of what comes and goes in a step; more where blocks are
recomputed, of which a live one is large beside what is kept. Fitted to benchmarks/results."""
FRAGMENTATION_OF_RECOMPUTATION = 0.3
FLAT_RESERVE = 12
"""The same of `mesh.data_engine: flat`, in gathered sizes of its largest unit. Fitted to four rows, which it misses by
-4 to +9% of what the driver shows; no rule is known. With exchanges by copy engines there is none."""


@dataclass(frozen=True)
class Setting:
    """What memory depends on, beside the walk.

    Attributes:
        micro_batches: of a data-parallel rank in a step.
        stages: layers of each pipeline stage, by rank of pp; one entry without a pipeline.
        schedule: of the pipeline.
        copies: the model computes with `ComputeWeights`; else with the parameters, or by FSDP2's mixed precision.
        copy_engine: the plan sends chunks by copy engines.
        gather, exchange: who carries those of the flat data engine, as `fsdp.gather` and `fsdp.exchange`.
        gather_fp8: it gathers what 8-bit matmuls read in 8 bits.
    """

    mesh: Mesh
    micro_batches: int = 1
    stages: tuple[int, ...] = ()
    schedule: str = "1f1b"
    copies: bool = True
    reshard: bool = True
    cuda_graph: bool = False
    copy_engine: bool = False
    gather: str = "collectives"
    exchange: str = "collectives"
    gather_fp8: bool = False

    def by_copy_engine(self, axis: str, kind: str) -> bool:
        """Whether copy engines carry this kind of collective of an axis: of the flat engine alone."""
        carrier = {"all_gather": self.gather, "all_to_all": self.exchange}.get(kind)
        return self.mesh.is_flat and axis == "dp_shard" and carrier == "copy_engine"

    @property
    def copies_between_gpus(self) -> bool:
        """Whether GPUs must reach each other's memory."""
        flat = self.mesh.is_flat and self.mesh.dp_shard > 1 and "copy_engine" in (self.gather, self.exchange)
        return self.copy_engine or flat


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak, by part.

    Attributes:
        weights: what the model computes with, beside the masters: copies in the compute dtype, or gathered parameters.
        masters: the parameters that the optimizer updates; optimizer: its two moments.
        gradients: of parameters; activations: all else that a step allocates.
        buffers: of collectives of the data axes.
        graphs: what CUDA graphs keep in pools of their own: gradients, activations and buffers are in it then, but for
            the flat engine's sums of gradients.
        reserve: what the allocator holds beyond the peak ([Note: pools]).
        rest: on the device beside the allocator.
    """

    weights: float = 0.0
    masters: float = 0.0
    optimizer: float = 0.0
    gradients: float = 0.0
    activations: float = 0.0
    buffers: float = 0.0
    graphs: float = 0.0
    reserve: float = 0.0
    rest: float = 0.0

    @property
    def allocated(self) -> float:
        """What `torch.cuda.max_memory_allocated` shows: a CUDA graph keeps its memory in a pool of its own."""
        static = self.weights + self.masters + self.optimizer + WORKSPACES
        return static + self.gradients + self.activations + self.buffers

    @property
    def device(self) -> float:
        """What the driver shows (nvidia-smi)."""
        return WORKSPACES + sum(getattr(self, part.name) for part in fields(self))

    @property
    def gib_by_part(self) -> dict[str, float]:
        """`device` by the parts' names for people, in GiB."""
        parts = {part.name: getattr(self, part.name) / GIB for part in fields(self)}
        beside = parts.pop("rest") + WORKSPACES / GIB
        return parts | {"CUDA and NCCL": beside}

    @property
    def needed(self) -> float:
        """Without what the allocator gives back when memory runs out ([Note: pools])."""
        comes_and_goes = self.gradients + self.activations + self.buffers + self.graphs
        return self.device - self.reserve + min(self.reserve, FRAGMENTATION * comes_and_goes)

    def on(self, nbytes: float) -> Memory:
        """On a device of that size: the reserve ends where the device does."""
        return replace(self, reserve=self.reserve - max(0.0, self.device - max(self.needed, nbytes)))


@dataclass(frozen=True)
class StageLayers:
    """The layers of a pipeline rank: names of blocks of the walk, one for each layer.

    Attributes:
        first, last: the rank has the embedding; it has the head and the loss.
        in_flight: micro-batches whose activations it holds at once.
    """

    layers: tuple[str, ...]
    first: bool
    last: bool
    in_flight: int


def peak_memory(walk: Walk, setting: Setting) -> Memory:
    """The peak of the rank that needs most."""
    stages = stages_of(walk, setting)
    peaks = (_StagePeak(walk, setting, *each).peak() for stage in stages for each in _times(stage, setting))
    return max(peaks, key=lambda memory: memory.device)


def _times(stage: StageLayers, setting: Setting) -> Iterator[tuple[StageLayers, bool]]:
    """When a step can have its peak: micro-batches in flight, and whether their sums of gradients are there.

    A stage whose forwards all come before its first backward never holds all micro-batches and the sums at once.
    """
    if 1 < stage.in_flight == setting.micro_batches:
        yield stage, False  # before the first backward: every micro-batch's activations
        yield replace(stage, in_flight=1), True  # in the last backward: the sums of all, one micro-batch's activations
    else:
        yield stage, setting.micro_batches > 1


def stages_of(walk: Walk, setting: Setting) -> Iterator[StageLayers]:
    """The pipeline's ranks, from the first; one without a pipeline."""
    layers = [name for name in walk.order for _ in range(walk.repeats[name])]
    counts = setting.stages or (len(layers),)
    first, pp = 0, len(counts)
    for i, count in enumerate(counts):
        # gpipe runs all forwards first; in 1f1b stage i starts its backwards after pp - i forwards
        held = setting.micro_batches if setting.schedule == "gpipe" else min(setting.micro_batches, pp - i)
        yield StageLayers(tuple(layers[first : first + count]), i == 0, i == pp - 1, held if pp > 1 else 1)
        first += count


@dataclass
class _Segments:
    """The walk's segments by place."""

    walk: Walk
    forward: dict[str, StepSegment] = field(default_factory=dict)
    backward: dict[str, StepSegment] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for segment in self.walk.segments:
            if segment.block:
                (self.backward if segment.backward else self.forward)[segment.block] = segment

    @property
    def before(self) -> Sequence[StepSegment]:
        return self.walk.segments[: self._index(backward=False)]

    @property
    def between(self) -> Sequence[StepSegment]:
        """From the last block's forward to its backward: head and loss."""
        blocks = [i for i, s in enumerate(self.walk.segments) if s.block and not s.backward]
        start = blocks[-1] + 1 if blocks else 0
        return self.walk.segments[start : self._index(backward=True)]

    @property
    def after(self) -> Sequence[StepSegment]:
        blocks = [i for i, s in enumerate(self.walk.segments) if s.block]
        return self.walk.segments[blocks[-1] + 1 :] if blocks else []

    def _index(self, backward: bool) -> int:
        found = (i for i, s in enumerate(self.walk.segments) if s.block and s.backward == backward)
        return next(found, len(self.walk.segments))


@dataclass(frozen=True)
class _Held:
    """Bytes that do not depend on the walk's activations; `on_other_streams` are those outside the compute stream's
    pool."""

    weights: float
    gradients: float
    buffers: float = 0.0
    on_other_streams: float = 0.0


class _StagePeak:
    """Follows a micro-batch of a stage and keeps the largest sum. `summed`: sums over micro-batches are complete."""

    def __init__(self, walk: Walk, setting: Setting, stage: StageLayers, summed: bool) -> None:
        self._walk, self._setting, self._stage, self._summed = walk, setting, stage, summed
        self._at = _Segments(walk)
        self._low = walk.cell.dtype.itemsize
        self._wide = max(4, self._low)
        names = [
            *([ROOT] if stage.first or HEAD not in walk.units else []),
            *stage.layers,
            *([HEAD] if stage.last else []),
        ]
        self._units = [walk.units[name] for name in names]
        self._peak = Memory()
        self._compute = 0.0
        """Peak of the compute stream's pool."""
        self._live = 0.0
        self._done: list[UnitParameters] = []
        """Units whose backward has ended."""

    def peak(self) -> Memory:
        """Memory at the peak of one forward and backward."""
        if self._stage.in_flight > 1:
            self._live += (self._stage.in_flight - 1) * self._kept_of_a_micro_batch()
        at, stage = self._at, self._stage
        if stage.first:
            self._run(at.before, [self._walk.units[ROOT]])
        else:
            self._live += 2 * self._walk.boundary  # received, and its gradient to send
        for name in stage.layers:
            self._run([at.forward[name]], [self._walk.units[name]])
        if stage.last:
            self._run(at.between, [self._walk.units[HEAD]])
            self._done.append(self._walk.units[HEAD])
        for name in reversed(stage.layers):
            self._run([at.backward[name]], [self._walk.units[name]], backward=True)
            self._done.append(self._walk.units[name])
        if stage.first:
            self._run(at.after, [self._walk.units[ROOT]], backward=True)
        return self._with_device(self._peak)

    def _kept_of_a_micro_batch(self) -> float:
        before = sum(s.change.activations for s in self._at.before) if self._stage.first else self._walk.boundary
        return before + sum(self._at.forward[name].change.activations for name in self._stage.layers)

    def _run(self, segments: Sequence[StepSegment], units: list[UnitParameters], backward: bool = False) -> None:
        own = 0
        for segment in segments:
            self._take(self._live + segment.rise.activations, own + segment.rise.gradients, units, backward)
            own += segment.change.gradients
            self._live += segment.change.activations

    def _take(self, activations: float, own: float, units: list[UnitParameters], backward: bool) -> None:
        """Compare with the peak so far. `own`: the running unit's gradients, in the compute dtype."""
        if self._setting.copies or not self._fsdp:
            held = self._held_by_copies(own)
        elif self._setting.mesh.is_flat:
            held = self._held_by_flat_engine(own, backward)
        else:
            held = self._held_by_fsdp(own, units, backward)
        shards, wide = self._setting.mesh.dp_shard, self._wide
        memory = Memory(
            weights=held.weights,
            masters=wide * sum(_shard(unit.numels, shards) for unit in self._units),
            optimizer=2 * wide * sum(_shard(unit.trained, shards) for unit in self._units),
            gradients=held.gradients,
            activations=activations,
            buffers=held.buffers,
        )
        self._compute = max(self._compute, memory.allocated - held.on_other_streams)
        if memory.allocated > self._peak.allocated:
            self._peak = memory

    def _held_by_copies(self, own: float) -> _Held:
        """Unsharded gradients, in the compute dtype until micro-batches are summed; a copy of the weights, or none."""
        weights = self._low * sum(unit.count for unit in self._units) if self._setting.copies else 0.0
        if self._several:
            return _Held(weights, self._wide * sum(unit.trained_count for unit in self._with_sums) + own)
        return _Held(weights, self._low * sum(unit.trained_count for unit in self._done) + own)

    def _held_by_flat_engine(self, own: float, backward: bool) -> _Held:
        setting, shards, received = self._setting, self._setting.mesh.dp_shard, 0.0
        # for a graph the sums keep their memory from step to step
        done = self._units if self._several or setting.cuda_graph else self._done
        gradients = self._sums(done) + own
        if backward and self._done and shards > 1:
            # the last unit's gradients, and the rows that other ranks sent, unless these lie in peer memory
            rows = 0.0 if setting.by_copy_engine("dp_shard", "all_to_all") else 1 - 1 / shards
            received = self._low * self._done[-1].trained_count * (1 + rows)
        return _Held(self._flat_weights(), gradients, received)

    def _sums(self, units: Sequence[UnitParameters]) -> float:
        """Bytes of a rank's shards of gradients."""
        return self._wide * sum(_shard(unit.trained, self._setting.mesh.dp_shard) for unit in units)

    def _held_by_fsdp(self, own: float, units: list[UnitParameters], backward: bool) -> _Held:
        """FSDP2 gathers on one stream and reduces on another; its sums over micro-batches are unsharded."""
        setting, low, wide = self._setting, self._low, self._wide
        shards = setting.mesh.dp_shard
        weights = low * (self._gathered(units) if setting.reshard else sum(unit.count for unit in self._units))
        # the next unit's gathered parameters, before they are copied out
        next_unit = float(low * max(unit.count for unit in units)) if setting.reshard and shards > 1 else 0.0
        if self._several:
            reduced = 0.0
            gradients = wide * sum(unit.gradient_count for unit in self._with_sums) + own
        else:
            reduced = self._sums(self._done)
            gradients = reduced + own
        buffers = next_unit
        if backward and self._done and shards * setting.mesh.dp_replicate > 1:
            buffers += wide * self._done[-1].trained_count
        return _Held(weights, gradients, buffers, next_unit + reduced)

    @property
    def _several(self) -> bool:
        return self._setting.micro_batches > 1

    @property
    def _with_sums(self) -> list[UnitParameters]:
        """Units that hold sums over micro-batches: all from the second micro-batch on."""
        return self._units if self._summed else self._done

    @property
    def _fsdp(self) -> bool:
        mesh = self._setting.mesh
        return mesh.dp > 1 or self._walk.cell.dtype != torch.float32

    def _gathered(self, units: list[UnitParameters]) -> int:
        """Parameters that FSDP2 holds unsharded: the running unit's, and root and head until their backward ends."""
        done = {id(unit) for unit in self._done}
        ends = [unit for unit in (self._walk.units[ROOT], self._walk.units[HEAD]) if id(unit) not in done]
        held = {id(unit): unit for unit in (*units, *ends)}
        return sum(unit.count for unit in held.values() if any(unit is own for own in self._units))

    def _flat_weights(self) -> int:
        """Bytes of the flat engine's shards and buffers; the shards of root and head lie in their buffers. What is
        gathered in 8 bits has a shard in the compute dtype beside it."""
        shards = self._setting.mesh.dp_shard
        rounded = [unit.in_8_bits for unit in self._units] if self._setting.gather_fp8 else []
        copies = self._low * sum(_shard(numels, shards) for numels in rounded)
        complete = sum(self._gathered_bytes(unit) for unit in self._units)
        if not self._setting.reshard or shards == 1:
            return complete + copies
        blocks = [self._walk.units[name] for name in self._stage.layers]
        turns = 2 * max((self._gathered_bytes(unit) for unit in blocks), default=0)
        ends = complete - sum(self._gathered_bytes(unit) for unit in blocks)
        kept = blocks if self._setting.gather == "collectives" else []
        return ends + turns + sum(self._shard_bytes(unit) for unit in kept) + copies

    def _gathered_bytes(self, unit: UnitParameters) -> int:
        saved = (self._low - 1) * sum(numel for numel, _ in unit.in_8_bits) if self._setting.gather_fp8 else 0
        return self._low * unit.count - saved

    def _shard_bytes(self, unit: UnitParameters) -> int:
        """Bytes that a rank sends of a unit to be gathered."""
        shards = self._setting.mesh.dp_shard
        saved = (self._low - 1) * _shard(unit.in_8_bits, shards) if self._setting.gather_fp8 else 0
        return self._low * _shard(unit.numels, shards) - saved

    def _peer_memory(self) -> float:
        """Bytes of symmetric memory, beside the allocator."""
        setting, low = self._setting, self._low
        shards = [_shard(unit.numels, setting.mesh.dp_shard) for unit in self._units]
        slots = RING_SLOTS * self._walk.boundary * setting.mesh.tp if setting.copy_engine else 0
        if setting.mesh.is_flat and setting.mesh.dp_shard > 1:
            if setting.gather == "copy_engine":
                slots += sum(self._shard_bytes(unit) for unit in self._units)
            if setting.exchange == "copy_engine":
                slots += RING_SLOTS * low * (setting.mesh.dp_shard - 1) * max(shards)
        return slots

    def _with_device(self, memory: Memory) -> Memory:
        setting = self._setting
        comes_and_goes = memory.gradients + memory.activations + memory.buffers
        reserve = self._reserve(memory, comes_and_goes)
        memory = replace(memory, reserve=reserve, rest=CONTEXT + self._peer_memory())
        if not setting.cuda_graph:
            return memory
        held = float(self._sums(self._units)) if setting.mesh.is_flat else 0.0
        return replace(memory, gradients=held, activations=0.0, buffers=0.0, graphs=comes_and_goes - held)

    def _reserve(self, memory: Memory, comes_and_goes: float) -> float:
        """What the allocator keeps beyond the peak: see [Note: pools]."""
        setting, low, wide = self._setting, self._low, self._wide
        recomputed = self._walk.cell.recompute == "full"
        kept = (FRAGMENTATION_OF_RECOMPUTATION if recomputed else FRAGMENTATION) * comes_and_goes
        if setting.copies or not self._fsdp:
            return kept
        shards, (largest, *others) = setting.mesh.dp_shard, sorted((unit.count for unit in self._units), reverse=True)
        if setting.mesh.is_flat:
            return kept + (FLAT_RESERVE * low * largest if setting.exchange == "collectives" else 0.0)
        pools: float = wide * sum(_shard(unit.trained, shards) for unit in self._units)
        if shards > 1:  # two gathered units, and what the rank sends of them
            pools += low * (largest + sum(others[:1])) * (1 + 1 / shards)
        before = wide * largest / 2  # room for the gradients of the largest unit before they are reduced
        return kept + before + max(0.0, self._compute + pools - memory.allocated)


def _shard(numels: Sequence[tuple[int, int]], shards: int) -> int:
    """Elements on a rank: FSDP2 pads dim 0 to a multiple of the shards."""
    return sum(numel // rows * ceil(rows / shards) if rows else numel for numel, rows in numels)
