"""Every collective of a step by axis: those of tp as a walk saw them, those of FSDP2 and pipelines by their rules.

[Note: FSDP2's traffic]
A unit's parameters are gathered in one all-gather of the compute dtype, of which each parameter is padded on dim 0 to a
multiple of the shards; its gradients leave in one reduce-scatter of fp32, and over replicas in an all-reduce of that
shard. With resharding a block is gathered twice a micro-batch; root and head once; without, all once a step. Gradients
leave in the last micro-batch. Before that FSDP2 sums what is partial over tp, such as those of norms. Once a step the
data ranks agree on the parameters that were used, by a flag each ([Note: used parameters]).

With `mesh.data_engine: flat` the ranks exchange gradients in the compute dtype, in every micro-batch. Blocks take turns
with two buffers: a backward finds the last two blocks in them, and the next micro-batch's forward the first two. With
`fsdp.gather_fp8` they agree on the largest numbers of weights once for the blocks that the update writes first, and
once for the others ([Note: quantized shards]).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import ceil

from colrow.forecasting.memory import Setting, StageLayers
from colrow.forecasting.walk import HEAD, ROOT, UnitParameters, Walk
from colrow.forecasting.work import Work


@dataclass(frozen=True)
class Traffic:
    """A kind of collective on one axis: all its calls of one size in a step of a rank.

    Attributes:
        kind: all_gather, reduce_scatter, all_reduce, all_to_all, broadcast, or send between stages.
        bytes: of the larger side, of one call.
        in_block: a block's own, so that other work can run beside it; else at the ends of a step.
    """

    axis: str
    kind: str
    bytes: int
    calls: int


def traffic_of(walk: Walk, setting: Setting, stage: StageLayers) -> list[Traffic]:
    """What this pipeline rank sends in a step: forward and backward of all micro-batches, then the data axes."""
    found: Counter[tuple[str, str, int]] = Counter()
    for work in stage_work(walk, stage) if walk.cell.tp > 1 else ():
        for (kind, nbytes), number in work.collectives.items():
            found["tp", kind, nbytes] += number * setting.micro_batches
    if setting.mesh.dp > 1:
        found.update(_of_data_axes(walk, setting, stage))
    ways = (not stage.first) + (not stage.last)
    if ways:
        found["pp", "send", walk.boundary] += 2 * ways * setting.micro_batches
    return [Traffic(*key, number) for key, number in found.items()]


def stage_work(walk: Walk, stage: StageLayers) -> tuple[Work, Work]:
    """What one micro-batch computes and sends on this pipeline rank: in blocks, and outside of them."""
    inside, outside = Work(), Work()
    times = Counter(stage.layers)
    ends = {False: stage.first, True: stage.last}
    for i, segment in enumerate(walk.segments):
        if segment.block:
            inside.add(segment.work, times[segment.block])
        elif ends[_is_head(walk, i)]:
            outside.add(segment.work)
    return inside, outside


def _is_head(walk: Walk, index: int) -> bool:
    """Whether a segment outside of blocks lies between the last block's forward and its backward."""
    blocks = [i for i, s in enumerate(walk.segments) if s.block]
    forward = [i for i in blocks if not walk.segments[i].backward]
    return bool(forward) and forward[-1] < index < min((i for i in blocks if i > forward[-1]), default=index + 1)


def _of_data_axes(walk: Walk, setting: Setting, stage: StageLayers) -> Counter[tuple[str, str, int]]:
    """(axis, kind, bytes) to the number of such calls in a step: see [Note: FSDP2's traffic]."""
    found: Counter[tuple[str, str, int]] = Counter()
    shards, replicas = setting.mesh.dp_shard, setting.mesh.dp_replicate
    low = walk.cell.dtype.itemsize
    wide = max(4, low)
    ends = ([ROOT] if stage.first else []) + ([HEAD] if stage.last else [])
    for at, name in enumerate((*stage.layers, *ends)):
        unit = walk.units[name]
        if not unit.count:
            continue
        for numel in unit.partial:
            found["tp", "all_reduce", low * numel] += 1
        if shards > 1:
            found["dp_shard", "all_gather", _gathered_bytes(unit, setting, low)] += _gathers(setting, at, stage)
            if unit.trained and setting.mesh.is_flat:
                found["dp_shard", "all_to_all", low * _padded(unit.trained, shards)] += setting.micro_batches
            elif unit.trained:  # in fp32, once: gradients are summed over micro-batches before
                found["dp_shard", "reduce_scatter", wide * _padded(unit.trained, shards)] += 1
        if replicas > 1 and unit.trained:
            found["dp_replicate", "all_reduce", wide * _padded(unit.trained, shards) // shards] += 1
    # which parameters had a gradient: 4 bytes each, see [Note: used parameters]
    flags = 4 * sum(len(walk.units[name].trained) for name in (*ends, *stage.layers))
    matmuls = sum(walk.units[name].matmuls for name in stage.layers)
    if shards > 1 and setting.gather_fp8 and matmuls:
        found["dp_shard", "all_reduce", 4 * matmuls] += 1 + (len(stage.layers) > 2)
    for axis in ("dp_replicate", "dp_shard"):
        if getattr(setting.mesh, axis) > 1:
            found[axis, "all_reduce", flags] += 1
    return found


def _gathered_bytes(unit: UnitParameters, setting: Setting, low: int) -> int:
    """Bytes of a gathered unit; `low`: of a number in the compute dtype."""
    shards = setting.mesh.dp_shard
    saved = (low - 1) * _padded(unit.in_8_bits, shards) if setting.gather_fp8 else 0
    return low * _padded(unit.numels, shards) - saved


def _gathers(setting: Setting, at: int, stage: StageLayers) -> int:
    """How often a step gathers the unit number `at` of a stage: its blocks, then root and head."""
    blocks = len(stage.layers)
    if not setting.reshard:
        return 1
    if setting.mesh.is_flat:
        return _gathers_of_flat_block(at, blocks, setting.micro_batches) if at < blocks else 1
    # FSDP2 gathers a block for forward and for backward; root and head stay gathered between (`apply_data_parallel`).
    return setting.micro_batches * (2 if at < blocks else 1)


def _gathers_of_flat_block(at: int, blocks: int, micro_batches: int) -> int:
    """In a step, with resharding: two buffers hold what backward and the next forward read first."""
    forward = micro_batches if at >= 2 else 1
    return forward + (micro_batches if at < blocks - 2 else 0)


def _padded(numels: tuple[tuple[int, int], ...], shards: int) -> int:
    return sum(numel // rows * ceil(rows / shards) * shards for numel, rows in numels)
