"""Compare forecasts with every row of benchmarks/results: memory, and time with rates fitted on half of the rows.

    python -m benchmarks.forecast                                # the tables of docs/guide/forecast.md, to the screen
    python -m benchmarks.forecast --table src/colrow/forecasting/tables/h200.json    # and write the fitted rates
    python -m benchmarks.forecast --gpu h100-sxm --calibrated FILE --table ...     # beside what colrow calibrate wrote

A row of the present program is one that was measured after its optimizer's update became one kernel (2026-11-23,
0ab5939). Of these, every second one of each kind (mesh, plan) gives rates, part by part from its trace; the others
test them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from colrow.dryrun.block_kinds import BlockTraces
from colrow.forecasting.devices import Device, Points, Rates, device_named
from colrow.forecasting.memory import GIB, Memory, Setting, peak_memory, stages_of
from colrow.forecasting.timing import (
    CPU_OF_OVERLAP,
    FP8_SHARE,
    OPERANDS,
    UPDATE_BYTES,
    Machine,
    Program,
    StepTime,
    operand_bytes,
    step_time,
)
from colrow.forecasting.traffic import stage_work, traffic_of
from colrow.forecasting.walk import HEAD, ROOT, Cell, Walk, walk
from colrow.forecasting.work import Work
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES
from colrow.parallel.pipeline_split import layer_costs, split_layers
from colrow.plans.plan import Plan
from colrow.plans.presets import FAST, PRESETS

RESULTS = Path(__file__).parent / "results"
OLDER = ("2026-11-22", "b0c34f1", "a97a009", "4a0b930", "d4185cd")
"""Dates and commits before the update became one kernel."""
_POINTWISE = ("compiled pointwise", "other", "copy", "loss")
LINK_SIZES = (2**16, 2**20, 2**24, 2**27, 2**30)
LATENCY = 20e-6
LAUNCH = 10e-6
EDGE = "memory's edge"
"""Rows where the allocator gives back its reserve in each step, which takes time that no rate knows."""
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
    fp8: bool
    older: bool
    allocated: float | None
    device: float | None
    step_ms: float
    trace: dict[str, Any]

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
            copy_engine=FAST.get(self.plan) == "copy_engine",
        )

    @property
    def program(self) -> Program:
        overlap = FAST.get(self.plan, "none")
        return Program(overlap, self.fp8, self.cell.compiled, self.cuda_graph)

    def walk(self) -> Walk:
        seen = _walked(self.model, self.plan, self.loss, self.cell)
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

    def matmul_rate(self) -> float:
        inside, outside = self.work()
        products = inside.products + outside.products
        return sum(products.values()) / (self.kind("product") - operand_bytes(products, self.walk()) / OPERANDS)

    def fp8_rate(self, rates: Rates) -> float:
        """Of the matmuls in blocks, with the kernels that round for them."""
        inside, outside = self.work()
        rounding = self.kind(*_POINTWISE) - inside.fused_bytes / rates.fused_fast - outside.bytes / rates.outside
        low = FP8_SHARE * sum(inside.products.values())
        products = inside.products + outside.products
        rest = (sum(products.values()) - low) / rates.matmul + operand_bytes(products, self.walk()) / OPERANDS
        return low / (self.kind("product") + rounding - rest)

    def attention_flops(self) -> float:
        return sum(work.attention_forward + work.attention_backward for work in self.work())

    def pointwise_bytes(self) -> float:
        return sum(work.bytes for work in self.work())

    def fused_rate(self, rates: Rates) -> float:
        inside, outside = self.work()
        return inside.fused_bytes / (self.kind(*_POINTWISE) - outside.bytes / rates.outside)

    def update_bytes(self) -> float:
        seen = self.walk()
        units = sum(seen.units[name].trained_count * n for name, n in seen.repeats.items())
        return UPDATE_BYTES * (units + seen.units[ROOT].trained_count + seen.units[HEAD].trained_count)

    def operators(self) -> int:
        return sum(work.operators for work in self.work())

    def cpu_rate(self) -> float:
        """Seconds of a step for each kernel of a plain compiled block, or for each eager operator."""
        inside, outside = self.work()
        if not self.cell.compiled:
            return self.step_ms / 1e3 / (inside.operators + outside.operators)
        launched = LAUNCH * outside.kernels
        return (self.step_ms / 1e3 - launched) / (inside.kernels * CPU_OF_OVERLAP[self.program.overlap])

    def bus(self, seconds: float) -> float:
        """bytes/s that a rank sends along tp, if its collectives take so long."""
        seen, n = self.walk(), self.mesh.tp
        traffic = traffic_of(seen, self.setting, next(iter(stages_of(seen, self.setting))))
        wire = sum(t.calls * t.bytes * (n - 1) / n for t in traffic if t.axis == "tp")
        return wire / max(1e-6, seconds - LATENCY * sum(t.calls for t in traffic))

    def time(self, device: Device) -> StepTime:
        return step_time(self.walk(), self.setting, self.program, Machine(device, 8))


@cache
def _walked(model: str, plan: str, loss: str, cell: Cell) -> Walk:
    config = replace(SHAPES[model], num_hidden_layers=2)
    config = replace(config, max_position_embeddings=max(cell.seq_len, config.max_position_embeddings))
    with torch.device("meta"):
        built = Llama(config)
    return walk(built, Plan.preset(plan, loss), cell, BlockTraces())  # type: ignore[arg-type]


def rows(gpu: str = "h200") -> Iterator[Measured]:
    """Of every file of Llama on such GPUs; derived plans, whose steps are those of the presets, are left out, and so is
    what the forecast does not know yet: fast styles at tp 1, and gradients that copy engines exchange."""
    for path in sorted(RESULTS.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        environment = data.get("environment", data)
        if MEASURED_ON[gpu] not in f"{environment.get('device')} {environment.get('hardware')} {path.name.upper()}":
            continue
        stamp = f"{path.name} {environment.get('commit')}"
        older = any(mark in stamp for mark in OLDER)
        for row in data.get("results", []):
            if row["plan"] in PRESETS and not _unknown(row):
                yield _of_bench(path.stem, row, older)
        for name, run in data.get("runs", {}).items():
            if "peak_gib" in run:
                yield _of_run(path.stem, name, run)


def _unknown(row: dict[str, Any]) -> bool:
    return "exchange=copy_engine" in row["arm"] or (row["plan"] in FAST and row["mesh"].get("tp", 1) == 1)


def _of_bench(file: str, row: dict[str, Any], older: bool) -> Measured:
    arm, mesh = row["arm"], Mesh(**row["mesh"])
    sequences = row["tokens_per_step"] // row["seq_len"]
    recompute = "full" if "activation_checkpoint=full" in arm else "none"
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
        "fp8" in arm,
        older,
        row.get("peak_allocated_gib"),
        row.get("device_used_gib"),
        row["step_ms"],
        row.get("trace") or {},
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
        False, False, run["peak_gib"], None, step_ms, {},
    )  # fmt: skip


# -- rates ---------------------------------------------------------------------------------------------------------


def fit_beside(measured: list[Measured], calibrated: Rates) -> Rates:
    """What a calibration does not measure. Where FSDP2 copies, pointwise kernels show nothing of compiled blocks."""
    traced = [row for row in measured if row.trace.get("kinds") and row.cell.compiled and not row.fp8]
    fast = [row for row in traced if row.program.overlap == "copy_engine"]
    plain = [row for row in traced if row.program.overlap == "none"]
    bare = [row for row in plain if row.mesh.tp_alone or row.mesh.data_engine == "flat"]
    return replace(
        calibrated,
        fused=_median(row.fused_rate(calibrated) for row in bare) or calibrated.fused,
        fused_fast=_median(row.fused_rate(calibrated) for row in fast) or calibrated.fused_fast,
        gap=_median(row.trace["idle"] / 1e3 / row.operators() for row in plain) or calibrated.gap,
    )


def fit(measured: list[Measured]) -> Rates:
    """Each rate as the median over the rows that show it."""
    traced = [row for row in measured if row.trace.get("kinds")]
    rates = device_named("h200").rates
    memory = _median(row.pointwise_bytes() / row.kind(*_POINTWISE) for row in traced if not row.cell.compiled)
    rates = replace(rates, memory=memory or rates.memory)
    bf16 = [row for row in traced if not row.fp8 and row.cell.compiled and row.mesh.dp == 1]
    plain, fast = ([row for row in bf16 if (row.program.overlap == "none") == want] for want in (True, False))
    overlapped = _median(row.matmul_rate() for row in fast if row.program.overlap == "copy_engine")
    matmul = _median(row.matmul_rate() for row in bf16 if row.program.overlap != "copy_engine") or overlapped
    attention = _median(row.attention_flops() / row.kind("attention") for row in traced)
    rates = replace(
        rates,
        matmul=matmul,
        overlap_slowdown=max(0.0, matmul / overlapped - 1),
        attention_forward=1.15 * attention,  # of its 3.5 shares one is forward's, which runs at the higher rate
        attention_backward=0.95 * attention,
        **_pointwise_rates(plain, rates),
        optimizer=_median(row.update_bytes() / row.kind("optimizer") for row in traced if row.setting.copies),
    )
    rates = replace(rates, fused_fast=_median(row.fused_rate(rates) for row in fast))
    bound = [row for row in traced if row.trace["idle"] > 0.3 * row.step_ms and not row.cuda_graph]
    rates = replace(
        rates,
        kernel=_median(row.cpu_rate() for row in bound if row.cell.compiled) or rates.kernel,
        operator=_median(row.cpu_rate() for row in bound if not row.cell.compiled) or rates.operator,
        links={**rates.links, **_links(measured, rates)},
    )
    rounded = [row for row in traced if row.fp8]
    rates = replace(rates, matmul_fp8=_median(row.fp8_rate(rates) for row in rounded) or rates.matmul_fp8)
    # a stream that waits for a peer's copy counts as idle, and so does one that waits for fp8's scales
    ahead = [row for row in traced if row.trace["idle"] < 0.15 * row.step_ms and not row.fp8]
    ahead = [row for row in ahead if row.program.overlap != "copy_engine"]
    return replace(rates, gap=_median(row.trace["idle"] / 1e3 / row.operators() for row in ahead))


def _pointwise_rates(plain: list[Measured], rates: Rates) -> dict[str, float]:
    """Seconds = a x fused bytes in blocks + b x bytes outside of them, by least squares of the relative errors."""
    seconds = [row.kind(*_POINTWISE) for row in plain]
    works = [row.work() for row in plain]
    matrix = [[inside.fused_bytes / s, outside.bytes / s] for (inside, outside), s in zip(works, seconds, strict=True)]
    a, b = np.linalg.lstsq(np.array(matrix), np.ones(len(plain)), rcond=None)[0] if len(plain) > 1 else (0.0, 0.0)
    return {"fused": 1 / a, "outside": 1 / b} if min(a, b) > 0 else {}


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else 0.0


def _links(measured: list[Measured], rates: Rates) -> dict[int, Points]:
    """By the ranks of tp, from the collectives' kernels; where no trace shows them, from what is left of the step."""
    links = {}
    plain = [row for row in measured if row.program.overlap == "none" and row.cell.compiled and row.mesh.pp == 1]
    for n in {row.mesh.tp for row in plain}:
        rows = [row for row in plain if row.mesh.tp == n and row.mesh.dp == 1]
        bus = _median(row.bus(row.kind("communication")) for row in rows if row.trace)
        if not bus:
            silent = replace(
                device_named("h200"), rates=replace(rates, links={n: ((1.0, 1e-12), (1e12, 1e-12))}, gap=0.0)
            )
            bus = _median(row.bus(row.step_ms / 1e3 - row.time(silent).seconds) for row in rows)
        if bus:
            links[n] = tuple((float(size), LATENCY + size / bus) for size in LINK_SIZES)
    return links


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="write the fitted rates to this file")
    parser.add_argument("--gpu", choices=tuple(MEASURED_ON), default="h200")
    parser.add_argument("--calibrated", type=Path, help="what colrow calibrate wrote: its rates are kept")
    options = parser.parse_args()
    measured = list(rows(options.gpu))
    present = [row for row in measured if not row.older]
    training, test = halves([row for row in present if not row.name.startswith(EDGE)])
    base = device_named(options.gpu, options.calibrated)
    rates = fit(training) if options.calibrated is None else fit_beside(training, base.rates)
    device = replace(base, rates=rates)
    print(memory_table(present))
    errors = [abs(row.time(device).seconds * 1e3 / row.step_ms - 1) for row in test]
    for title, chosen in (
        ("fitted on", training),
        ("tested on", test),
        ("older programs", [r for r in measured if r.older]),
    ):
        print(f"\n{title}:\n\n{time_table(chosen, device)}")
    print(f"\ntest: median {statistics.median(errors):.1%}, largest {max(errors):.1%}")
    if options.table is not None:
        write_table(options.table, rates, errors, base.source if options.calibrated else "")


def halves(measured: list[Measured]) -> tuple[list[Measured], list[Measured]]:
    """Every second row of each kind: mesh, plan, compiled or not, fp8 or not."""
    seen: Counter[Any] = Counter()
    sides: tuple[list[Measured], list[Measured]] = [], []
    for row in measured:
        kind = (row.mesh, row.plan, row.cell.compiled, row.fp8)
        sides[seen[kind] % 2].append(row)
        seen[kind] += 1
    return sides


def memory_table(measured: list[Measured]) -> str:
    lines = ["| file | arm | mesh | measured | forecast | error | device | forecast | error |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    errors = []
    for row in measured:
        if row.allocated is None:
            continue
        memory = row.memory()
        errors.append(memory.allocated / GIB / row.allocated - 1)
        cells = [row.file, row.name, str(row.mesh), f"{row.allocated:.2f}", f"{memory.allocated / GIB:.2f}"]
        cells += [f"{errors[-1]:+.1%}"]
        if row.name.startswith(EDGE):
            row = replace(row, device=None)
        device = "" if row.device is None else f"{row.device:.2f}"
        off = "" if row.device is None else f"{memory.device / GIB / row.device - 1:+.1%}"
        lines.append("| " + " | ".join([*cells, device, f"{memory.device / GIB:.2f}", off]) + " |")
    sizes = sorted(map(abs, errors))
    lines.append(
        f"\nallocated: median {statistics.median(sizes):.2%}, largest {sizes[-1]:.1%}, most too low {min(errors):.1%}"
    )
    return "\n".join(lines)


def time_table(measured: list[Measured], device: Device) -> str:
    lines = [
        "| file | arm | mesh | measured ms | forecast ms | error | parts, ms |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for row in measured:
        time = row.time(device)
        parts = ", ".join(f"{name} {seconds * 1e3:.0f}" for name, seconds in time.parts.items() if seconds > 5e-4)
        off = time.seconds * 1e3 / row.step_ms - 1
        cells = [
            row.file,
            row.name,
            str(row.mesh),
            f"{row.step_ms:.0f}",
            f"{time.seconds * 1e3:.0f}",
            f"{off:+.1%}",
            parts,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_table(path: Path, rates: Rates, errors: list[float], calibrated: str) -> None:
    ranked = sorted(errors)
    source = "fitted on every second row of benchmarks/results, 2 and 4 x H200, torch 2.11, NV18; not calibrated"
    if calibrated:
        source = f"{calibrated}; what that leaves out fitted on every second row of benchmarks/results"
    table = {
        "source": source,
        "band": round(ranked[int(0.9 * len(ranked))], 3),
        "rates": {key: value for key, value in vars(rates).items() if key != "network"},
    }
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
