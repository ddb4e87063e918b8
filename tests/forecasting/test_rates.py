"""What the measured rows of benchmarks/results show of the forecast, and what a forecast costs."""

from __future__ import annotations

import resource
import statistics
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.forecast import by_pace, fit, halves
from benchmarks.measured import MEASURED_ON, Measured, rows
from benchmarks.published import RUNS, forecaster, row_of
from colrow.config import parse_config
from colrow.forecasting.choices import Choices
from colrow.forecasting.devices import Device, device_named
from colrow.forecasting.forecast import Forecaster, Options
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES
from colrow.plans.plan import Plan

pytestmark = pytest.mark.exhaustive
SILENT = ((1.0, 1e-12), (1e12, 1e-12))
"""Links that take no time."""


def errors(measured: list[Measured], device: Device) -> list[float]:
    return [abs(row.time(device).seconds * 1e3 / row.step_ms - 1) for row in measured]


def test_rates_of_half_of_the_rows_give_the_other_half_and_collectives_count() -> None:
    training, test = halves([row for row in rows() if not row.older], device_named("h200"))
    test, _ = by_pace(test)
    rates = fit(training, device_named("h200").rates)
    device = replace(device_named("h200"), rates=rates)
    found = sorted(errors(test, device))
    assert statistics.median(found) < 0.06
    assert found[-1] < 0.10
    # the negative control: without collectives, rows whose plan overlaps nothing are forecast at least 5 points worse
    silent = replace(device, rates=replace(rates, links=dict.fromkeys(rates.links, SILENT)))
    exposed = [row for row in test if row.program.overlap == "none"]
    worse = statistics.median(errors(exposed, silent)) - statistics.median(errors(exposed, device))
    assert worse > 0.05, f"{worse:.1%}"


def test_the_shipped_rates_give_rows_that_gave_none() -> None:
    for gpu in MEASURED_ON:
        device = device_named(gpu)
        by_gpu, by_cpu = by_pace(halves([row for row in rows(gpu) if not row.older], device)[1])
        found = errors(by_gpu, device)
        assert len(found) > 4 * len(by_cpu)
        assert statistics.median(found) < 0.06
        assert max(found) < 0.10
        assert max(errors(by_cpu, device), default=0.0) < 0.4  # rates of other hosts' CPUs


def test_published_runs_of_another_program_are_forecast_by_its_model_and_kernels() -> None:
    """All rows stand in docs/guide/forecast.md. The negative control: as a step of colrow on 700 W, those on data axes
    at 500 W are forecast at least 20 points worse."""
    found = {run: abs(row_of(run).tokens_per_second_per_gpu / run.tokens_per_second_per_gpu - 1) for run in RUNS}
    assert statistics.median(found.values()) < 0.06
    assert max(found.values()) < 0.15
    for run in (run for run in RUNS if run.device == "h100-500w" and run.mesh.tp == 1):
        options = Options(run.batch, 1, 8192, run.recompute, run.compiled)
        own = forecaster(run.model, run.layers, "h100").row(Plan.preset("llama"), run.mesh, options)
        assert own.tokens_per_second_per_gpu / run.tokens_per_second_per_gpu - 1 > found[run] + 0.2


def test_no_measured_row_needs_much_more_memory_than_forecast() -> None:
    present = [row for gpu in MEASURED_ON for row in rows(gpu) if not row.older and row.allocated]
    found = [row.memory().allocated / 2**30 / (row.allocated or 1.0) - 1 for row in present]
    assert statistics.median(map(abs, found)) < 0.05
    assert max(map(abs, found)) < 0.08
    assert min(found) > -0.03


def seconds_of_cpu(call: Any) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def test_a_cell_takes_seconds_and_a_large_table_two_minutes() -> None:
    """On one core; the test runs beside others, so the CPU's time counts."""
    with torch.device("meta"):
        small, large = (Llama(SHAPES[name]) for name in ("llama3-8b", "llama3-70b"))
    h100 = device_named("h100-sxm")
    options = Options(2, seq_len=8192)
    assert seconds_of_cpu(lambda: Forecaster(small, h100).row(Plan.preset("llama"), Mesh(tp=4), options)) < 10
    config = parse_config({
        "run": {"dir": "none"},
        "model": {"shape": "llama3-70b"},
        "data": {"corpus": "none", "seq_len": 8192},
        "loss": "linear",
        "train": {"steps": 1, "global_batch": 256, "micro_batch": 2, "lr": 1e-4},
    })  # fmt: skip
    assert seconds_of_cpu(lambda: Choices(config, large, h100, 64, hosts=8).table()) < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 * 2**20  # KiB
