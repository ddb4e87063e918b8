"""Compare forecasts with every row of benchmarks/results: memory, and time with rates fitted on half of the rows.

    python -m benchmarks.forecast                                # the tables of docs/guide/forecast.md, to the screen
    python -m benchmarks.forecast --table src/colrow/forecasting/tables/h200.json    # and write the fitted rates
    python -m benchmarks.forecast --gpu h100-sxm --calibrated FILE --table ...     # beside what colrow calibrate wrote
    python -m benchmarks.forecast --base FILE --table ...     # links of more GPUs than rows show from what it wrote

A row of the present program is one that was measured after its optimizer's update became one kernel (2026-11-23,
0ab5939). Of these, every second one of each kind (mesh, plan) gives rates, part by part from its trace; the others
test them.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.measured import LATENCY, MEASURED_ON, POINTWISE, Measured, rows
from colrow.forecasting.devices import Device, Points, Rates, device_named
from colrow.forecasting.memory import GIB

LINK_SIZES = (2**16, 2**20, 2**24, 2**27, 2**30)
LEAST_BAND = 0.09  # nine in ten of the derived rows of other models are within it


def fit(measured: list[Measured], base: Rates, *, calibrated: bool = False) -> Rates:
    """Each rate over the rows that show it; what no row shows is that of `base`.

    Args:
        calibrated: `base` is a calibration of the cards that were measured: what it measures is kept.
    """
    traced = [row for row in measured if row.trace.get("kinds")]
    bf16 = [row for row in traced if not row.fp8 and row.cell.compiled]
    alone = [row for row in bf16 if row.mesh.dp == 1 and row.mesh.pp == 1]
    fast = [row for row in alone if row.program.overlap != "none"]
    plain = [row for row in bf16 if row.program.overlap == "none" and row.gather == "collectives"]
    bare = [row for row in plain if row.mesh.tp_alone or row.setting.mesh.is_flat]
    memory = _median(row.pointwise_bytes() / row.kind(*POINTWISE) for row in traced if not row.cell.compiled)
    rates = replace(
        base,
        memory=memory or base.memory,
        overlap_slowdown=Rates.overlap_slowdown,
        fused=_median(row.fused_rate(base) for row in plain) or base.fused,
        **({} if calibrated else _calibrated_rates(traced, alone)),
        **_cpu_rates(measured),
        **_peer_copy(measured),
    )
    for name, linear in (("outside", False), ("outside_linear", True)):
        rate = _median(row.outside_rate(rates) for row in bare if row.program.linear_loss == linear)
        rates = replace(rates, **{name: rate or getattr(base, name)})
    for name, overlap in (("fused_fast", "collectives"), ("fused_chunked", "copy_engine")):
        rate = _median(row.fused_rate(rates) for row in fast if row.program.overlap == overlap)
        rates = replace(rates, **{name: rate or getattr(base, name)})
    rounded = [row for row in traced if row.fp8 == "tensorwise"]
    rates = replace(rates, matmul_fp8=_median(row.fp8_rate(rates) for row in rounded) or rates.matmul_fp8)
    # a stream that waits for a peer's copy counts as idle, and so does one that waits for fp8's scales
    ahead = [row for row in alone if row.program.overlap != "copy_engine" and row.trace["idle"] < 0.15 * row.step_ms]
    rates = replace(rates, gap=_median(row.trace["idle"] / 1e3 / row.operators() for row in ahead) or base.gap)
    return rates if calibrated else replace(rates, links={**base.links, **_links(measured)})


def _calibrated_rates(traced: list[Measured], alone: list[Measured]) -> dict[str, Any]:
    """What `colrow calibrate` measures too."""
    flops = sum(row.product_flops() for row in alone)
    attention = sum(row.attention_flops() for row in traced) / sum(row.kind("attention") for row in traced)
    return {
        "matmul": flops / sum(row.product_seconds() for row in alone),
        "attention_forward": 1.15 * attention,  # of its 3.5 shares one is forward's, which runs at the higher rate
        "attention_backward": 0.95 * attention,
        "optimizer": _median(row.update_bytes() / row.kind("optimizer") for row in traced if row.setting.copies),
    }


def _cpu_rates(measured: list[Measured]) -> dict[str, float]:
    """Of the rows whose pace the CPU sets; those of FSDP2 give `fsdp_unit`, by the others' rates."""
    paced = [row for row in measured if row.is_cpu_bound]
    bound = [row for row in paced if not row.fsdp_units]
    names = {"none": "kernel", "collectives": "kernel_fast", "copy_engine": "kernel_chunked"}
    compiled = {
        name: _median(row.cpu_rate() for row in bound if row.cell.compiled and row.program.overlap == overlap)
        for overlap, name in names.items()
    }
    found = {**compiled, "operator": _median(row.cpu_rate() for row in bound if not row.cell.compiled)}
    if kernel := found["kernel"]:
        units = [row for row in paced if row.fsdp_units and row.cell.compiled and row.program.overlap == "none"]
        found["fsdp_unit"] = _median(row.fsdp_unit(kernel) for row in units)
    return {name: rate for name, rate in found.items() if rate}


def _peer_copy(measured: list[Measured]) -> dict[str, float]:
    """Of the rows whose data axis sends by copy engines alone."""
    rows = [row for row in measured if row.gather == row.exchange == "copy_engine" and row.mesh.tp == 1 and row.trace]
    rate = _median(row.peer_rate() for row in rows)
    return {"peer_copy": rate} if rate else {}


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else 0.0


def _links(measured: list[Measured]) -> dict[int, Points]:
    """By the ranks of tp, from the collectives' kernels."""
    plain = [row for row in measured if row.program.overlap == "none" and row.cell.compiled and row.trace]
    alone = [row for row in plain if row.mesh.tp_alone and row.mesh.tp > 1]
    found = {n: _median(row.bus(row.kind("communication")) for row in alone if row.mesh.tp == n) for n in (2, 4, 8)}
    return {n: tuple((float(size), LATENCY + size / bus) for size in LINK_SIZES) for n, bus in found.items() if bus}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, help="write the fitted rates to this file")
    parser.add_argument("--gpu", choices=tuple(MEASURED_ON), default="h200")
    parser.add_argument("--calibrated", type=Path, help="what colrow calibrate wrote: its rates are kept")
    parser.add_argument("--base", type=Path, help="the same of other cards of the kind: only what no row shows is kept")
    options = parser.parse_args()
    measured = list(rows(options.gpu))
    present = [row for row in measured if not row.older]
    base = device_named(options.gpu, options.calibrated or options.base)
    training, test = halves(present, base)
    rates = fit(training, base.rates, calibrated=options.calibrated is not None)
    device = replace(base, rates=rates)
    print(memory_table(present, device))
    test, of_hosts = by_pace(test)
    errors = [abs(row.time(device).seconds * 1e3 / row.step_ms - 1) for row in test]
    for title, chosen in (
        ("fitted on", training),
        ("tested on", test),
        ("paced by the CPU of their host", of_hosts),
        ("older programs", [r for r in measured if r.older]),
    ):
        print(f"\n{title}:\n\n{time_table(chosen, device)}")
    print(f"\ntest: median {statistics.median(errors):.1%}, largest {max(errors):.1%}")
    if options.table is not None:
        write_table(options.table, rates, errors, base, calibrated=options.calibrated is not None)


def halves(measured: list[Measured], device: Device) -> tuple[list[Measured], list[Measured]]:
    """Every second row of each kind: mesh, plan, compiled or not, fp8 or not, who exchanges gradients, and whether the
    CPU sets its pace. Rows at memory's edge show no rate: all are in the second half."""
    edge = [row for row in measured if row.is_at_edge(device)]
    seen: Counter[Any] = Counter()
    sides: tuple[list[Measured], list[Measured]] = [], []
    for row in (row for row in measured if row not in edge):
        kind = (row.mesh, row.plan, row.cell.compiled, row.fp8, row.exchange, row.is_cpu_bound)
        sides[seen[kind] % 2].append(row)
        seen[kind] += 1
    return sides[0], sides[1] + edge


def by_pace(measured: list[Measured]) -> tuple[list[Measured], list[Measured]]:
    """Rows that the GPU paces, and those that the CPU does: hosts with the same cards differ by a third in the CPU's
    time for a step, and the table has their median. `colrow calibrate` measures a host's own."""
    of_hosts = [row for row in measured if row.is_cpu_bound]
    return [row for row in measured if row not in of_hosts], of_hosts


def memory_table(measured: list[Measured], on: Device) -> str:
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
        if row.is_at_edge(on):
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


def write_table(path: Path, rates: Rates, errors: list[float], base: Device, *, calibrated: bool) -> None:
    ranked = sorted(errors)
    begun = base.source.partition(";")[0]
    fitted = "fitted to every second row of benchmarks/results"
    source = f"{begun}; the rest is {fitted}" if calibrated else f"{fitted}; the rest is {begun}"
    table = {
        "source": source,
        "band": round(max(LEAST_BAND, ranked[int(0.9 * len(ranked))]), 3),
        "rates": {key: value for key, value in vars(rates).items() if key != "network"},
    }
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
