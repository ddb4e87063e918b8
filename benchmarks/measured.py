"""The measured rows of benchmarks/results, each with its forecast, and what its trace shows of a rate."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from colrow.dryrun.block_kinds import BlockTraces
from colrow.forecasting.devices import Device, Rates
from colrow.forecasting.forecast import cost
from colrow.forecasting.memory import Memory, Setting, peak_memory, stages_of
from colrow.forecasting.timing import (
    CPU_BOUND,
    FP8_SHARE,
    NORM_BYTES,
    OPERANDS,
    SUMS_OF_FLAT,
    UPDATE_BYTES,
    Machine,
    Program,
    StepTime,
    cpu_rate,
    fsdp_unit_rate,
    fsdp_units,
    fused_seconds,
    operand_bytes,
)
from colrow.forecasting.traffic import stage_work, traffic_of
from colrow.forecasting.walk import HEAD, ROOT, Cell, Walk, applies_on_data_axes, walk
from colrow.forecasting.work import Work
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES
from colrow.ops.float8 import PER_TENSOR
from colrow.parallel.pipeline_split import layer_costs, split_layers
from colrow.plans.plan import Plan
from colrow.plans.presets import FAST, PRESETS

RESULTS = Path(__file__).parent / "results"
OLDER = ("2026-11-22", "b0c34f1", "a97a009", "4a0b930", "d4185cd")
"""Dates and commits before the update became one kernel."""
EIGHT_BIT_GATHERS = "2026-11-27"
"""Since then a step in fp8 gathers and rounds as it does today (decision 0017)."""
POINTWISE = ("compiled pointwise", "other", "copy", "loss")
GATHERS_OF_EIGHT_BITS = "2026-11-27"
"""Files from this day on are of a program that keeps and sends 8-bit numbers with fp8 (decision 0017)."""
LATENCY = 20e-6
LAUNCH = 10e-6
MEASURED_ON = {"h200": "H200", "h100-sxm": "H100"}
"""By `--gpu`, what stands in a results file's device."""


@dataclass(frozen=True)
class Measured:
    """A row of a results file, and what its forecast needs."""

    file: str
    name: str
    model: str
    layers: int
    plan: str
    loss: str
    mesh: Mesh
    cell: Cell
    micro_batches: int
    reshard: bool
    cuda_graph: bool
    fp8: str
    older: bool
    allocated: float | None
    device: float | None
    step_ms: float
    trace: dict[str, Any]
    gather: str = "collectives"
    exchange: str = "collectives"
    gather_fp8: bool = False

    @property
    def setting(self) -> Setting:
        config = replace(SHAPES[self.model], num_hidden_layers=self.layers)
        stages: tuple[int, ...] = (self.layers,)
        if self.mesh.pp > 1:
            costs = layer_costs(config, self.cell.seq_len, self.cell.micro_batch)
            firsts = (0, *split_layers(costs, self.mesh.pp), self.layers)
            stages = tuple(b - a for a, b in pairwise(firsts))
        return Setting(
            self.mesh,
            self.micro_batches,
            stages,
            copies=self.mesh.tp_alone,
            reshard=self.reshard and self.mesh.pp == 1,
            cuda_graph=self.cuda_graph,
            copy_engine=FAST.get(self.plan) == "copy_engine" and self.mesh.tp > 1,
            gather=self.gather,
            exchange=self.exchange,
            gather_fp8=self.gather_fp8,
        )

    @property
    def program(self) -> Program:
        overlap = FAST.get(self.plan, "none") if self.mesh.tp > 1 else "none"
        return Program(
            overlap,
            bool(self.fp8),
            self.cell.compiled,
            self.cuda_graph,
            self.loss == "linear",
            bf16_wgrad=bool(self.fp8) and self.fp8 not in PER_TENSOR,
        )

    def walk(self) -> Walk:
        recipe = self.fp8 if self.file >= GATHERS_OF_EIGHT_BITS else ""
        data_axes = applies_on_data_axes(_plan(self.plan, self.loss, self.fp8), self.mesh)
        seen = _walked(self.model, self.plan, self.loss, recipe, replace(self.cell, data_axes=data_axes))
        return replace(seen, repeats={seen.order[0]: 1, seen.order[1]: self.layers - 1})

    def memory(self) -> Memory:
        return peak_memory(self.walk(), self.setting)

    def work(self) -> tuple[Work, Work]:
        """In blocks and outside of them, in a step."""
        seen, total = self.walk(), (Work(), Work())
        for part, into in zip(stage_work(seen, next(iter(stages_of(seen, self.setting)))), total, strict=True):
            into.add(part, self.micro_batches)
        return total

    def kind(self, *kinds: str) -> float:
        """Seconds of the trace in kernels of these kinds."""
        return sum(self.trace["kinds"].get(kind, 0.0) for kind in kinds) / 1e3

    def product_flops(self) -> float:
        """Of matmuls; more where copies beside them make them longer."""
        slowed = 1 + (Rates.overlap_slowdown if self.program.overlap == "copy_engine" else 0.0)
        return slowed * sum(float(sum(work.products.values())) for work in self.work())

    def product_seconds(self) -> float:
        """Of matmuls, by their FLOPs alone."""
        inside, outside = self.work()
        return self.kind("product") - operand_bytes(inside.products + outside.products, self.walk()) / OPERANDS

    def fp8_rate(self, rates: Rates) -> float:
        """Of the matmuls in blocks, with the kernels that round for them."""
        inside, outside = self.work()
        rounding = self.kind(*POINTWISE) - fused_seconds(inside, self.program, rates) - self.around(rates)
        low = FP8_SHARE * sum(inside.products.values())
        products = inside.products + outside.products
        rest = (sum(products.values()) - low) / rates.matmul + operand_bytes(products, self.walk()) / OPERANDS
        return low / (self.kind("product") + rounding - rest)

    def attention_flops(self) -> float:
        return sum(work.attention_forward + work.attention_backward for work in self.work())

    def pointwise_bytes(self) -> float:
        return sum(work.bytes for work in self.work())

    def around(self, rates: Rates) -> float:
        """Seconds of pointwise operators around blocks, by the rates."""
        return self.work()[1].bytes / (rates.outside_linear if self.program.linear_loss else rates.outside)

    def fused_rate(self, rates: Rates) -> float:
        """With the kernels that sum and copy chunks, where chunks are sent."""
        inside = self.work()[0].fused_bytes
        if self.program.overlap != "copy_engine":
            return inside / self.kind("compiled pointwise")
        return inside / (self.kind(*POINTWISE) - self.around(rates))

    def outside_rate(self, rates: Rates) -> float:
        """Of a plain plan: all but compiled blocks, without the norm of gradients, or the flat engine's sums."""
        per_parameter = SUMS_OF_FLAT if self.setting.mesh.is_flat else NORM_BYTES / 2
        of_gradients = per_parameter / UPDATE_BYTES * self.update_bytes() / self.mesh.dp_shard / rates.optimizer
        return self.work()[1].bytes / (self.kind("other", "copy", "loss") - of_gradients)

    def update_bytes(self) -> float:
        seen = self.walk()
        units = sum(seen.units[name].trained_count * n for name, n in seen.repeats.items())
        return UPDATE_BYTES * (units + seen.units[ROOT].trained_count + seen.units[HEAD].trained_count)

    def operators(self) -> int:
        return sum(work.operators for work in self.work())

    def cpu_rate(self) -> float:
        """Seconds of a step for each kernel of a compiled block, or for each eager operator."""
        return cpu_rate(self.step_ms / 1e3, *self.work(), compiled=self.cell.compiled, launch=LAUNCH)

    @property
    def fsdp_units(self) -> int:
        """Units that FSDP2 gathers and reduces in a step."""
        return self.micro_batches * fsdp_units(self.setting, next(iter(stages_of(self.walk(), self.setting))))

    def fsdp_unit(self, kernel: float) -> float:
        """Seconds of the CPU for a unit of FSDP2, beyond those for kernels of compiled blocks."""
        return fsdp_unit_rate(self.step_ms / 1e3, *self.work(), self.fsdp_units, kernel=kernel, launch=LAUNCH)

    @property
    def is_cpu_bound(self) -> bool:
        """A stream that waits for fp8's scales counts as idle too."""
        return self.trace.get("idle", 0.0) > CPU_BOUND * self.step_ms and not self.cuda_graph and not self.fp8

    def peer_rate(self) -> float:
        """bytes/s of gathers and exchanges by copy engines, with the few numbers that NCCL sends beside them."""
        stage = next(iter(stages_of(self.walk(), self.setting)))
        carried = [
            t for t in traffic_of(self.walk(), self.setting, stage) if self.setting.by_copy_engine(t.axis, t.kind)
        ]
        sent = sum(t.calls * t.bytes for t in carried) * (1 - 1 / self.mesh.dp_shard)
        return sent / self.kind("communication")

    def bus(self, seconds: float) -> float:
        """bytes/s that a rank sends along tp, if its collectives take so long."""
        seen, n = self.walk(), self.mesh.tp
        traffic = traffic_of(seen, self.setting, next(iter(stages_of(seen, self.setting))))
        wire = sum(t.calls * t.bytes * (n - 1) / n for t in traffic if t.axis == "tp")
        return wire / max(1e-6, seconds - LATENCY * sum(t.calls for t in traffic))

    def time(self, device: Device) -> StepTime:
        return cost(self.walk(), self.setting, self.program, Machine(device, 8))[1]

    def is_at_edge(self, device: Device) -> bool:
        """Whether the allocator gives back its reserve in each step, which takes time that no rate knows."""
        return "allocator" in self.time(device).parts


@cache
def _walked(model: str, name: str, loss: str, fp8: str, cell: Cell) -> Walk:
    config = replace(SHAPES[model], num_hidden_layers=2)
    config = replace(config, max_position_embeddings=max(cell.seq_len, config.max_position_embeddings))
    with torch.device("meta"):
        built = Llama(config)
    return walk(built, _plan(name, loss, fp8), cell, BlockTraces())


def _plan(name: str, loss: str, fp8: str) -> Plan:
    plan = Plan.preset(name, loss)  # type: ignore[arg-type]
    return plan.with_fp8(fp8) if fp8 else plan  # type: ignore[arg-type]


def rows(gpu: str = "h200") -> Iterator[Measured]:
    """Of every file of Llama on such GPUs; derived plans, whose steps are those of the presets, are left out."""
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        environment = data.get("environment", data)
        if MEASURED_ON[gpu] not in f"{environment.get('device')} {environment.get('hardware')} {path.name.upper()}":
            continue
        stamp = f"{path.name} {environment.get('commit')}"
        older = any(mark in stamp for mark in OLDER)
        for row in data.get("results", []):
            if row["plan"] in PRESETS:
                yield _of_bench(path.stem, row, older)
        for name, run in data.get("runs", {}).items():
            if "peak_gib" in run:
                yield _of_run(path.stem, name, run)


def _of_bench(file: str, row: dict[str, Any], older: bool) -> Measured:
    arm, mesh = row["arm"], Mesh(**row["mesh"])
    sequences = row["tokens_per_step"] // row["seq_len"]
    recompute = next((m for m in ("full", "selective") if f"activation_checkpoint={m}" in arm), "none")
    return Measured(
        file,
        f"{row.get('of', '')} {arm}".strip(),
        row["model"],
        row["layers"] or SHAPES[row["model"]].num_hidden_layers,
        row["plan"],
        row["loss"],
        mesh,
        Cell(mesh.tp, row["micro_batch"], row["seq_len"], recompute, row["compiled"]),  # type: ignore[arg-type]
        sequences // (row["micro_batch"] * mesh.dp),
        "reshard_after_forward=false" not in arm and mesh.dp_shard > 1,
        bool(row.get("cuda_graph")),
        recipe[1] if (recipe := re.search(r"train\.fp8=(\w+)", arm)) else "tensorwise" if "fp8" in arm else "",
        older or ("fp8" in arm and file < EIGHT_BIT_GATHERS),
        row.get("peak_allocated_gib"),
        row.get("device_used_gib"),
        row["step_ms"],
        row.get("trace") or {},
        *("copy_engine" if f"fsdp.{key}=copy_engine" in arm else "collectives" for key in ("gather", "exchange")),
        "fsdp.gather_fp8=true" in arm,
    )


def _of_run(file: str, name: str, run: dict[str, Any]) -> Measured:
    """A run of `colrow train` on llama3-8b, global batch 4, seq 8,192."""
    words = run["command"].split()
    flags = {key[2:]: value for key, value in pairwise(words) if key.startswith("--")}
    mesh = Mesh(**{key[5:]: int(value) for key, value in flags.items() if key.startswith("mesh.")})
    micro_batch = int(flags["train.micro_batch"])
    cell = Cell(mesh.tp, micro_batch, 8192)
    count = 4 // (micro_batch * mesh.dp)
    step_ms = 4 * 8192 / (run["tokens_per_second_per_gpu"] * mesh.world_size) * 1e3
    return Measured(
        file, name, "llama3-8b", 32, flags.get("plan", "llama"), "linear", mesh, cell, count, mesh.dp_shard > 1, False,
        "", False, run["peak_gib"], None, step_ms, {},
    )  # fmt: skip
