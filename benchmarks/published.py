"""Forecast runs that others published with batch, sequence and hardware, and forecast what nobody here can measure.

    python -m benchmarks.published        # the tables of docs/guide/forecast.md, to the screen; two minutes

The programs are torchtitan's, not colrow's, and the figures those of their authors: the errors say how good an order of
meshes is on hardware that was never calibrated, not how exact a forecast of colrow is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from colrow.forecasting.devices import Device, device_named
from colrow.forecasting.forecast import Forecaster, Options, Row
from colrow.forecasting.memory import CONTEXT, GIB
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES
from colrow.plans.plan import Plan


@dataclass(frozen=True)
class Published:
    """A published run; sequences of 8,192 tokens.

    Attributes:
        batch: sequences of a data-parallel rank, in one micro-batch.
        reserved_gib: of torch's allocator; None where nothing is said.
        source: file in pytorch/torchtitan's `benchmarks`, or what was measured here with torchtitan.
    """

    model: str
    mesh: Mesh
    batch: int
    recompute: Any
    compiled: bool
    tokens_per_second_per_gpu: float
    reserved_gib: float | None
    device: str
    source: str
    layers: int | None = None
    name: str = "h100-96gb-500w"


END_OF_2024, ASYNC_TP = "llama3_h100_202412", "asyncTP_llama3_h100_2025-06"
OURS = "beside-torchtitan, 2026-11-26"
RUNS = [
    Published("llama3-8b", Mesh(dp_shard=8), 2, "selective", False, 5762, 82.4, "h100", END_OF_2024),
    Published("llama3-8b", Mesh(dp_shard=8), 2, "selective", True, 6667, 77.0, "h100", END_OF_2024),
    Published("llama3-8b", Mesh(dp_shard=128), 2, "selective", False, 5605, 67.0, "h100", END_OF_2024),
    Published("llama3-8b", Mesh(dp_shard=128), 2, "selective", True, 6514, 62.0, "h100", END_OF_2024),
    Published("llama3-8b", Mesh(dp_shard=8, tp=8), 12, "selective", True, 4378, None, "h100", ASYNC_TP),
    Published("llama3-70b", Mesh(dp_shard=32, tp=8), 16, "full", True, 597, None, "h100", ASYNC_TP),
    Published("llama3-8b", Mesh(tp=4), 2, "none", True, 7899, None, "h200", OURS),
    Published("llama3-8b", Mesh(dp_shard=2, tp=2), 2, "none", True, 9107, None, "h200", OURS),
    Published("llama3-8b", Mesh(tp=4), 4, "none", True, 15506, None, "h200", OURS, layers=16),
]
SCALES = [
    ("llama3-8b", 1, "selective", [Mesh(dp_shard=n) for n in (8, 64, 256, 1024)]),
    ("llama3-8b", 1, "selective", [Mesh(dp_replicate=n // 8, dp_shard=8) for n in (64, 256, 1024)]),
    ("llama3-70b", 4, "full", [Mesh(dp_shard=n // 8, tp=8) for n in (64, 256, 1024)]),
    ("llama3-70b", 4, "full", [Mesh(dp_replicate=n // 64, dp_shard=8, tp=8) for n in (256, 1024)]),
]
"""Model, sequences of a rank in its one micro-batch, recomputation, meshes."""


def devices() -> dict[str, Device]:
    """`h100`: of the published runs, with 96 GB of HBM2e, 2.4 TB/s, at 500 W; its rates are
    those calibrated on cards of 700 W, with that memory's."""
    h100 = device_named("h100-sxm")
    share = 2.4 / 3.35
    slower = {
        name: share * getattr(h100.rates, name) for name in ("memory", "fused", "fused_fast", "outside", "optimizer")
    }
    grand_teton = replace(h100, memory=95.0 * GIB, rates=replace(h100.rates, **slower))
    return {"h100": grand_teton, "h200": device_named("h200")}


@cache
def forecaster(model: str, layers: int | None, device: str) -> Forecaster:
    config = SHAPES[model]
    config = replace(config, num_hidden_layers=layers or config.num_hidden_layers)
    with torch.device("meta"):
        return Forecaster(Llama(config), devices()[device])


def row_of(model: str, mesh: Mesh, batch: int, recompute: Any, compiled: bool, device: str, layers: int | None) -> Row:
    options = Options(batch, 1, 8192, recompute, compiled)
    return forecaster(model, layers, device).row(Plan.preset("llama"), mesh, options)


def published_lines() -> Iterator[str]:
    yield "| run | mesh | batch | recompute | tokens/s per GPU | forecast | error | reserved GiB | forecast | error |"
    yield "| --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for run in RUNS:
        row = row_of(run.model, run.mesh, run.batch, run.recompute, run.compiled, run.device, run.layers)
        rate, memory = row.tokens_per_second_per_gpu, (row.memory.device - CONTEXT) / GIB
        shape = f"{run.model}{f', {run.layers} layers' if run.layers else ''}{'' if run.compiled else ', eager'}"
        cells = [f"{shape} ({run.source})", str(run.mesh), str(run.batch), run.recompute]
        cells += [f"{run.tokens_per_second_per_gpu:,.0f}", f"{rate:,.0f}"]
        cells += [f"{rate / run.tokens_per_second_per_gpu - 1:+.0%}"]
        cells += ["", f"{memory:.1f}", ""] if run.reserved_gib is None else [
            f"{run.reserved_gib:.1f}", f"{memory:.1f}", f"{memory / run.reserved_gib - 1:+.0%}"
        ]  # fmt: skip
        yield "| " + " | ".join(cells) + " |"


def scale_lines() -> Iterator[str]:
    yield "| model | GPUs | mesh | batch | recompute | GiB | step ms | tokens/s per GPU | largest wait |"
    yield "| --- | ---: | --- | ---: | --- | ---: | ---: | ---: | --- |"
    for model, batch, recompute, meshes in SCALES:
        for mesh in meshes:
            row = row_of(model, mesh, batch, recompute, True, "h200", None)
            cells = [model, str(mesh.world_size), str(mesh), str(batch), recompute, f"{row.memory.device / GIB:.1f}"]
            cells += [f"{row.time.seconds * 1e3:,.0f}", f"{row.tokens_per_second_per_gpu:,.0f}", _wait(row)]
            yield "| " + " | ".join(cells) + " |"


def _wait(row: Row) -> str:
    axes = {axis: row.time.parts.get(axis, 0.0) for axis in ("tp", "dp_shard", "dp_replicate")}
    worst = max(axes, key=lambda axis: axes[axis])
    return f"{worst} {axes[worst] * 1e3:.0f} ms"


def main() -> None:
    for lines in (published_lines(), scale_lines()):
        for line in lines:
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
