"""The time of a step by parts, from what a rank computes and sends and from a device's rates.

    products       FLOPs / rate, and the bytes of operands / memory's rate, of each matmul
    attention      causal FLOPs / rate, forward and backward
    pointwise      bytes / rate: in compiled blocks each chain of operators as one pass
    optimizer      bytes of the update / rate
    copies         of FSDP2, between its buffers, parameters and gradients
    AXIS           exposed time of the collectives of tp, dp_shard, dp_replicate, pp
    bubble         a pipeline's ranks waiting for each other
    gaps           between kernels, even of a CUDA graph: a few microseconds an operator
    cpu            what the CPU takes longer to launch than the GPU to run

[Note: exposed]
Collectives of tp are exposed unless a style sends chunks beside matmuls; a copy engine hides what has matmuls beside
it, more at tp 2 than above. FSDP2 gathers and reduces beside compute: exposed are the first gather, the last reduction,
and what is longer than the compute.

[Note: between hosts]
NCCL sends a gather or a sum around rings through all ranks of a group. A ring enters and leaves a host once, and there
are as many rings as the group has ranks on a host, each by the network card of another rank: so the cards of a host
share what a rank sends. A group with one rank on each host, such as dp_shard beside a tp that fills the hosts, has one
card. What a ring takes beyond that grows with its ranks: a message has to pass each of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil

from colrow.forecasting.devices import Device, Points, Rates, seconds_of
from colrow.forecasting.memory import Setting, StageLayers, stages_of
from colrow.forecasting.traffic import Traffic, stage_work, traffic_of
from colrow.forecasting.walk import HEAD, ROOT, Walk
from colrow.forecasting.work import Product, Work
from colrow.mesh import AXES
from colrow.ops.float8 import PER_TENSOR
from colrow.plans.plan import Plan

EXPOSED = {"none": 1.0, "point_to_point": 0.5, "collectives": 0.9}
"""Share of tp's collectives of fast styles that nothing hides, by what overlaps them. Measured on 2 and 4 H200."""
EXPOSED_OF_COPY_ENGINE = {2: 0.06, 4: 0.22}
UPDATE_BYTES = 28  # a parameter: master and moments read and written, the gradient read
NORM_BYTES = 4  # a parameter: the gradient, once more; the flat engine's sums square what they write
CASTS_OF_FSDP = 17  # a parameter of the shard, for each gather, beside the update: fp32 to the compute dtype
SUMS_OF_FLAT = 8  # a parameter of the shard: rows of two ranks read, fp32 sums written
SHARD_COPIES_OF_FSDP = 3  # a gathered parameter, for each gather and reduction, into and out of buffers; most is hidden
COPIES_OF_FSDP = 31  # without shards: casts of parameters and gradients, which nothing hides
SLOWED_BY_NCCL = 0.1  # of the hidden seconds of data axes, by which matmuls beside NCCL's kernels take longer
HOP_IN_HOST, HOP_BETWEEN_HOSTS = 3.4e-6, 14e-6
"""Seconds from a rank of a ring to the next one by NVLink and by a network: NCCL's own estimates for long messages
(`src/graph/tuning.cc`). Not measured here."""
_BY_RING = ("all_gather", "reduce_scatter", "all_reduce", "broadcast")
OPERANDS = 15e12  # bytes/s of a matmul's operands beside its FLOPs; tells small matmuls from large ones
CPU_BAND = 0.33
"""Half of the band where the CPU sets the pace: hosts of one kind took 83, 89 and 116 ms for the same step, and the
steps of one run differ by as much."""
CPU_BOUND = 0.25
"""A GPU that is idle for more than this share of a step waits for the CPU."""
FP8_SHARE = 0.9  # of the matmuls of a fast plan; the head's stay in bf16


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part; `band` to either side."""

    parts: Mapping[str, float]
    band: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def at_memorys_edge(self) -> StepTime:
        """The time of a step in which the allocator gives back its reserve and takes memory again: see `AT_EDGE`."""
        lost = AT_EDGE * self.seconds
        return StepTime({**self.parts, "allocator": lost}, self.band + lost)

    @property
    def bottleneck(self) -> str:
        """The largest part that another mesh, plan or micro-batch could change, in words."""
        waits = {name: seconds for name, seconds in self.parts.items() if name in _WORDS}
        worst = max(waits, key=lambda name: waits[name], default="")
        if worst and waits[worst] > 0.08 * self.seconds:
            return _WORDS[worst]
        if self.parts["pointwise"] + self.parts["optimizer"] > 0.35 * self.seconds:
            return "memory traffic of pointwise kernels and optimizer"
        return "compute"


_WORDS = {
    "tp": "exposed collectives of tp",
    "dp_shard": "exposed gathers and reductions of dp_shard",
    "dp_replicate": "exposed reductions of dp_replicate",
    "pp": "sends between pipeline stages",
    "bubble": "the pipeline's bubble",
    "cpu": "the CPU, which launches kernels slower than the GPU runs them",
    "allocator": "memory's edge, where the allocator returns its reserve in each step",
}

AT_EDGE = 0.1
"""How much longer a step takes, as a share, that needs the allocator's reserve: measured 5, 10 and 17% on H100."""


@dataclass(frozen=True)
class Machine:
    """The devices and how many of them a host has."""

    device: Device
    per_host: int

    def ranks_on_host(self, setting: Setting, axis: str) -> int:
        """How many ranks of a group along this axis share a host."""
        inner = 1
        for name in reversed(AXES):
            size: int = getattr(setting.mesh, name)
            if name == axis:
                return max(1, min(size, self.per_host // inner))
            inner *= size
        raise AssertionError(axis)

    def seconds(self, setting: Setting, axis: str, kind: str, nbytes: float) -> float:
        """Seconds of a collective in which each rank sends `nbytes` to its neighbour: see [Note: between hosts]."""
        rates, size = self.device.rates, getattr(setting.mesh, axis)
        near = self.ranks_on_host(setting, axis)
        within = seconds_of(_nearest(rates.links, near), nbytes) if near > 1 else 0.0
        if near == size or not rates.network:
            return within or seconds_of(_nearest(rates.links, size), nbytes)
        hosts = ceil(size / near)
        cards = near if kind in _BY_RING else 1
        across = seconds_of(rates.network, nbytes / cards)
        if kind in _BY_RING:
            across += (hosts - 1) * HOP_BETWEEN_HOSTS + (size - hosts) * HOP_IN_HOST
        return max(across, within)


@dataclass(frozen=True)
class Program:
    """How the step is run.

    Attributes:
        overlap: of the plan's fast styles; `none` for plain ones.
        fp8: matmuls of fast styles run in fp8; bf16_wgrad: but for those of weights' gradients.
        linear_loss: the loss is computed by chunks with the head.
    """

    overlap: str = "none"
    fp8: bool = False
    compiled: bool = True
    cuda_graph: bool = False
    linear_loss: bool = False
    bf16_wgrad: bool = False

    @classmethod
    def of(cls, plan: Plan, *, compiled: bool, cuda_graph: bool) -> Program:
        overlaps = {overlap for style in plan.modules.values() if (overlap := getattr(style, "overlap", None))}
        order = ("copy_engine", "point_to_point", "collectives")
        overlap = next((name for name in order if name in overlaps), "none")
        recipes = {recipe for style in plan.modules.values() if (recipe := getattr(style, "fp8", None))}
        return cls(
            overlap,
            bool(recipes),
            compiled,
            cuda_graph,
            plan.loss == "linear",
            bool(recipes - PER_TENSOR),
        )


def step_time(walk: Walk, setting: Setting, program: Program, machine: Machine) -> StepTime:
    """The step of the slowest pipeline rank, with the bubble: the time that it waits for the other stages."""
    if walk.cell.tp == 1:
        program = replace(program, overlap="none")  # fast styles have nothing to send, and no chunks
    stages = list(stages_of(walk, setting))
    times = [_rank_time(walk, setting, stage, program, machine) for stage in stages]
    slowest = max(times, key=lambda parts: sum(parts.values()))
    pp, m = len(stages), setting.micro_batches
    if pp > 1:
        # A pipeline fills and drains for pp - 1 micro-batches' time; the update and the data axes run once a step.
        once = slowest["optimizer"] + slowest.get("dp_shard", 0.0) + slowest.get("dp_replicate", 0.0)
        slowest["bubble"] = (pp - 1) / m * (sum(slowest.values()) - once)
    band = max(machine.device.band, CPU_BAND) if slowest["cpu"] > 0 else machine.device.band
    return StepTime(slowest, band * sum(slowest.values()))


def _rank_time(
    walk: Walk, setting: Setting, stage: StageLayers, program: Program, machine: Machine
) -> dict[str, float]:
    """Seconds of a step of one pipeline rank, by part, without the bubble."""
    rates, m = machine.device.rates, setting.micro_batches
    inside, outside = stage_work(walk, stage)
    parts = {name: m * seconds for name, seconds in compute_parts(inside, outside, walk, program, rates).items()}
    if (program.overlap in ("copy_engine", "point_to_point") and walk.cell.tp > 1) or setting.mesh.dp_shard > 1:
        # Copies and gathers that run beside matmuls take memory bandwidth, and SMs where NCCL sends, from them.
        parts["products"] *= 1 + rates.overlap_slowdown
    compute = sum(parts.values())  # what communication can hide behind: before the update, gaps and waits are added
    parts |= _update_parts(walk, setting, stage, rates)
    sent: defaultdict[str, float] = defaultdict(float)
    by_nccl: defaultdict[str, float] = defaultdict(float)
    for traffic in traffic_of(walk, setting, stage):
        seconds = traffic.calls * call_seconds(traffic, setting, machine)
        sent[traffic.axis] += seconds
        if not setting.by_copy_engine(traffic.axis, traffic.kind):
            by_nccl[traffic.axis] += seconds
    for axis, seconds in sent.items():
        parts[axis] = exposed(axis, seconds, compute, setting, program, len(stage.layers))
        if axis in ("dp_shard", "dp_replicate"):
            parts["products"] += SLOWED_BY_NCCL * max(0.0, by_nccl[axis] - parts[axis])
    parts["gaps"] = m * rates.gap * (inside.operators + outside.operators)
    # Kernels are queued ahead, so the CPU costs only what it takes beyond the GPU's time; a graph's replay costs it
    # nothing.
    cpu = m * (cpu_seconds(inside, outside, program, rates) + rates.fsdp_unit * fsdp_units(setting, stage))
    parts["cpu"] = 0.0 if program.cuda_graph else max(0.0, cpu - sum(parts.values()))
    return parts


def _update_parts(walk: Walk, setting: Setting, stage: StageLayers, rates: Rates) -> dict[str, float]:
    """Seconds of the update, and of what FSDP2 copies and casts."""
    ends = (name for name, held in ((ROOT, stage.first), (HEAD, stage.last)) if held)
    units = sum(walk.units[name].trained_count for name in (*stage.layers, *ends))
    shards = setting.mesh.dp_shard
    if setting.mesh.is_flat:
        return {"optimizer": (UPDATE_BYTES + SUMS_OF_FLAT) * units / shards / rates.optimizer}
    update, parts = UPDATE_BYTES + (NORM_BYTES / 2 if setting.copies else NORM_BYTES), {}  # copies: of bf16
    if shards > 1:
        gathers = 2 * setting.micro_batches if setting.reshard else 1
        update += CASTS_OF_FSDP * gathers
        parts["copies"] = SHARD_COPIES_OF_FSDP * (gathers + 1) * units / rates.outside
    elif not setting.copies and (setting.mesh.dp > 1 or walk.cell.dtype.itemsize < 4):
        parts["copies"] = COPIES_OF_FSDP * units / rates.outside
    return {"optimizer": update * units / shards / rates.optimizer, **parts}


def compute_parts(inside: Work, outside: Work, walk: Walk, program: Program, rates: Rates) -> dict[str, float]:
    """Seconds of one micro-batch: `inside` and `outside` of blocks."""
    products = inside.products + outside.products
    flops = float(sum(products.values()))
    low = FP8_SHARE * sum(inside.products.values()) if program.fp8 else 0.0
    low *= 2 / 3 if program.bf16_wgrad else 1  # of three matmuls of a weight two
    fused = fused_seconds(inside, program, rates) if program.compiled else inside.bytes / rates.memory
    around = rates.outside_linear if program.linear_loss else rates.outside
    forward, backward = inside.attention_forward, inside.attention_backward
    return {
        "products": (flops - low) / rates.matmul + low / rates.matmul_fp8 + operand_bytes(products, walk) / OPERANDS,
        "attention": forward / rates.attention_forward + backward / rates.attention_backward,
        "pointwise": fused + outside.bytes / (around if program.compiled else rates.memory),
    }


def fused_seconds(inside: Work, program: Program, rates: Rates) -> float:
    """Seconds that the pointwise kernels of compiled blocks take."""
    by_overlap = {"none": rates.fused, "collectives": rates.fused_fast}
    return inside.fused_bytes / by_overlap.get(program.overlap, rates.fused_chunked)


def operand_bytes(products: Mapping[Product, int], walk: Walk) -> float:
    """Bytes that these matmuls read and write."""
    total = 0.0
    for (rows, inner, columns), flops in products.items():
        if volume := rows * inner * columns:
            total += flops / (2 * volume) * (rows * inner + inner * columns + rows * columns)
    return total * walk.cell.dtype.itemsize


def cpu_seconds(inside: Work, outside: Work, program: Program, rates: Rates) -> float:
    """Seconds that the CPU needs to launch one micro-batch."""
    if not program.compiled:
        return rates.operator * (inside.operators + outside.operators)
    return kernel_seconds(program, rates) * inside.kernels + rates.launch * outside.kernels


def fsdp_units(setting: Setting, stage: StageLayers) -> int:
    """Units that FSDP2 gathers and reduces on a rank in each micro-batch: its blocks, and the ends of the model."""
    if setting.mesh.dp == 1 or setting.mesh.is_flat:
        return 0
    return len(stage.layers) + stage.first + stage.last


def cpu_rate(step: float, inside: Work, outside: Work, *, compiled: bool, launch: float) -> float:
    """The rate of `cpu_seconds` that gives `step`, the seconds of a micro-batch whose pace the CPU sets: seconds for
    each kernel of a compiled block, or for each eager operator."""
    if not compiled:
        return step / (inside.operators + outside.operators)
    return (step - launch * outside.kernels) / inside.kernels


def fsdp_unit_rate(step: float, inside: Work, outside: Work, units: int, *, kernel: float, launch: float) -> float:
    """Seconds for a unit of FSDP2 beyond those for kernels of plain compiled blocks, where the CPU sets the pace of
    `step`, which has so many units."""
    return (step - kernel * inside.kernels - launch * outside.kernels) / units


def kernel_seconds(program: Program, rates: Rates) -> float:
    """Seconds that the CPU needs to launch one kernel of a compiled block."""
    by_overlap = {"none": rates.kernel, "collectives": rates.kernel_fast}
    return by_overlap.get(program.overlap, rates.kernel_chunked)


def call_seconds(traffic: Traffic, setting: Setting, machine: Machine) -> float:
    """Seconds of one call of the collective, with nothing beside it."""
    n = getattr(setting.mesh, traffic.axis)
    if setting.by_copy_engine(traffic.axis, traffic.kind):
        return (n - 1) / n * traffic.bytes / machine.device.rates.peer_copy
    share = {"all_reduce": 2 * (n - 1) / n, "send": 1.0, "broadcast": 1.0}.get(traffic.kind, (n - 1) / n)
    return machine.seconds(setting, traffic.axis, traffic.kind, share * traffic.bytes)


def exposed(axis: str, seconds: float, compute: float, setting: Setting, program: Program, layers: int) -> float:
    """Seconds of an axis's collectives beside which nothing runs: see [Note: exposed]."""
    if axis == "tp":
        if program.overlap == "copy_engine":
            return seconds * EXPOSED_OF_COPY_ENGINE[2 if setting.mesh.tp == 2 else 4]
        return seconds * EXPOSED[program.overlap]
    if axis == "pp":
        return seconds / 2  # the other half runs beside another micro-batch
    ends = 2 / (layers + 2)  # the first gather and the last reductions, of those of layers, head and root
    return max(seconds * ends, seconds - 0.9 * compute)


def _nearest(links: Mapping[int, Points], size: int) -> Points:
    return links[min(links, key=lambda n: (abs(n - size), n))] if links else ()
