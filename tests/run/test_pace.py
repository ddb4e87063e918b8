"""What a run says of its forecast after twenty steps, and of what makes it slower."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import yaml

from colrow.config import RunConfig, parse_config
from colrow.run import pace
from colrow.run.forecast_line import Forecast
from colrow.run.pace import STEPS, Clock, Pace, cpu_bound_line, difference
from colrow.train.step_trace import StepTrace

CONFIG = """
run: {dir: none}
model: {shape: laptop}
data: {corpus: stdlib, seq_len: 256}
train: {steps: 1, lr: 1.0e-3, global_batch: 4, micro_batch: 1}
mesh: {tp: 2}
"""
FORECAST = Forecast(
    key="",
    tokens_per_second_per_gpu=512.0,  # a step of one second
    band=0.1,
    allocated_gib=50.0,
    device_gib=60.0,
    limit_gib=80.0,
    parts_ms={"products": 600.0, "attention": 100.0, "pointwise": 100.0, "optimizer": 50.0, "tp": 100.0, "gaps": 50.0},
    bottleneck="compute",
)
TRACE = StepTrace(
    span=1000.0,
    busy=950.0,
    communication=150.0,
    exposed=100.0,
    kinds={"product": 600.0, "attention": 100.0, "compiled pointwise": 90.0, "copy": 10.0, "optimizer": 50.0},
    collectives={},
    operators={},
    kernels=1,
)


def config(**changes: Any) -> RunConfig:
    tree = yaml.safe_load(CONFIG)
    tree["train"] |= changes.get("train", {})
    return parse_config({**tree, "mesh": changes.get("mesh", tree["mesh"])}, "test")


def said(
    seconds: float = 1.0, waits: tuple[float, ...] | float = 0.5, after: int = 1, forecast: Forecast | None = FORECAST
) -> list[str]:
    """Lines of 40 steps; they come after the twentieth."""
    lines: list[str] = []
    compared = Pace(config(), after, lambda: forecast, lines.append)
    for step in range(1, 41):
        known = len(lines)
        waited = waits if isinstance(waits, float) else waits[min(step, len(waits)) - 1]
        compared.add(9.0 if step <= after else seconds, waited * seconds, 50.5)
        assert len(lines) == known or step == STEPS
    return lines


def test_after_twenty_steps_a_run_says_how_far_off_the_forecast_was() -> None:
    (line,) = said(1.02)
    assert " ".join(line.split()) == (
        "forecast after 20 steps: 502 tokens/s per GPU (-2.0%), 50.5 GiB allocated (+1.0%)"
    )
    assert max(map(len, line.splitlines())) <= 80
    assert said(0.8)[0] != line


def test_without_a_forecast_nothing_is_compared() -> None:
    assert said(forecast=None) == []


def test_a_host_that_never_waits_keeps_the_gpu_waiting() -> None:
    assert [line.partition(" ")[0] for line in said(2.0, waits=0.0)] == ["forecast", "hint"]
    assert len(said(waits=0.0)) == 1, "a step of many kernels, as fast as forecast: the driver's queue is full"
    (hint,) = said(waits=0.0, forecast=None)
    assert "CPU-bound" in hint
    assert said(2.0, (0.0,) * 17 + (0.5,) * 30) == said(2.0, 0.0), "three of seventeen steps may be a hiccup"
    assert len(said(2.0, (0.0,) * 15 + (0.5,) * 30)) == 1
    assert len(said(2.0, (0.5,))) == 1


@pytest.mark.parametrize(
    ("changes", "graph"),
    [
        ({"mesh": {"tp": 2}, "train": {"cuda_graph": False}}, True),
        ({"mesh": {"tp": 2}}, False),
        ({"mesh": {"tp": 2}, "train": {"cuda_graph": True}}, False),
        ({"mesh": {"tp": 2, "dp_shard": 2}, "train": {"cuda_graph": False}}, False),
        ({"mesh": {"tp": 2}, "train": {"cuda_graph": False, "activation_checkpoint": "full"}}, False),
    ],
)
def test_cuda_graphs_are_named_where_they_are_possible(changes: dict[str, Any], graph: bool) -> None:
    line = cpu_bound_line(config(**changes))
    assert ("cuda_graph" in line) is graph
    assert "train.micro_batch" in line
    assert max(map(len, line.splitlines())) <= 80


@pytest.mark.parametrize(
    ("trace", "named"),
    [
        (replace(TRACE, exposed=300.0), "collectives exposed 300 ms a step (forecast 100)"),
        (replace(TRACE, span=1200.0), "GPU idle between kernels 250 ms a step (forecast 50)"),
        (replace(TRACE, kinds={**TRACE.kinds, "product": 900.0}), "matmuls 900 ms a step (forecast 600)"),
        (TRACE, "a profiled step was not"),
    ],
)
def test_what_differs_is_the_part_that_takes_longer(trace: StepTrace, named: str) -> None:
    assert named in difference(FORECAST, trace, [Clock(i, 1900.0, 1980.0) for i in range(4)])


def test_a_slow_clock_is_named_before_what_it_slows() -> None:
    slow = replace(TRACE, kinds={**TRACE.kinds, "product": 900.0})
    clocks = [Clock(i, 1700.0, 1980.0) for i in range(3)]
    assert "GPU 3 runs at 1,400 of 1,980 MHz, the others at 1,700" in difference(
        FORECAST, slow, [*clocks, Clock(3, 1400.0, 1980.0)]
    )
    assert "GPU 0 runs at 900" in difference(FORECAST, slow, [Clock(0, 900.0, 1980.0)])
    assert "clocks" not in difference(FORECAST, slow, clocks)


def test_one_step_is_profiled_where_a_run_is_slower_than_its_band(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = "print('GPU-a, 1700, 1980'); print('GPU-b, 900, 1980'); print('GPU-of-others, 345, 1980')"
    monkeypatch.setattr(pace, "gpus_of_ranks_here", lambda: {"GPU-a", "GPU-b"})
    monkeypatch.setattr(pace, "_CLOCKS", (sys.executable, "-c", printed))
    monkeypatch.setattr(pace.torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(pace, "profiling", lambda _: nullcontext([TRACE]))
    lines: list[str] = []
    slow, usual = (Pace(config(), 1, lambda: FORECAST, lines.append) for _ in range(2))
    for _ in range(STEPS):
        usual.add(1.05, 0.5, 50.0)
        slow.add(1.2, 0.6, 50.0)
    lines.clear()
    for compared in (usual, slow, slow):
        with compared.tracing():
            pass
    (line,) = lines
    assert "GPU 1 runs at 900 of 1,980 MHz" in " ".join(line.split())
    assert max(map(len, line.splitlines())) <= 80


def test_a_host_without_nvidia_smi_has_no_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pace._read(pace._start(("no-such-program",)), {"GPU-a"}) == []
    assert pace._read(pace._start((sys.executable, "-c", "print('GPU-a, [N/A], [N/A]')")), {"GPU-a"}) == []
