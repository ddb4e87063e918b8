"""What a launch costs this host's CPU in a training step: the rates that `forecasting.timing.cpu_seconds` reads.

A step of few tokens takes the time that the CPU needs to launch it, whatever the GPU can do. Each rate is that of one
arm, by the kernels and operators that the forecast counts in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from colrow.bench.arms import arm_config, on_random_tokens
from colrow.bench.measure import Job
from colrow.bench.run_arm import ArmError, run_arm
from colrow.config import RunConfig, parse_config
from colrow.forecasting.memory import Setting, stages_of
from colrow.forecasting.timing import CPU_BOUND, cpu_rate, fsdp_unit_rate, fsdp_units
from colrow.forecasting.traffic import stage_work
from colrow.forecasting.walk import Cell, walk
from colrow.models.build import build_source
from colrow.run.preflight import choose_plan

ARMS = {
    "operator": ("tp", "plain:train.compile=false"),
    "kernel": ("tp", "plain:train.compile=true"),
    "kernel_fast": ("tp", "fast:train.compile=true"),
    "kernel_chunked": ("tp", "overlap:train.compile=true"),
    "fsdp_unit": ("dp_shard", "linear:train.compile=true"),
}
"""By the rate that an arm shows, with the mesh's axis. `fsdp_unit` is what the arm takes beyond its kernels."""
OF_SENDING = ("kernel_fast", "kernel_chunked", "fsdp_unit")


@dataclass(frozen=True)
class Steps:
    """What is timed: a named shape, its layers, and the tokens of a rank. `SMALL` is for tests.

    The tokens are those from which `llama-overlap` sends chunks, in two sequences or more: a single one needs no copies
    around its gathers. The layers are all of the shape's: what a step costs once, such as its loss, counts with them.
    """

    shape: str = "llama3.2-1b"
    layers: int = 16
    seq_len: int = 1024
    sequences: int = 2
    warmup: int = 5
    steps: int = 10


SMALL = Steps("laptop", layers=2, seq_len=16, warmup=2, steps=4)


def cpu_rates(
    ranks: int, device: str, rates: Mapping[str, Any], steps: Steps, say: Callable[[str], None]
) -> dict[str, float]:
    """Those that this host shows.

    Args:
        ranks: of this host; an axis gets the largest of 1, 2, 4 and 8 that they have.
        rates: that were calibrated before: `launch`, and `peer_copy`, without which there are no copies to launch.
        say: gets a line for each rate that is left out.

    Raises:
        KeyboardInterrupt: a signal has ended an arm.
    """
    degree = max(n for n in (1, 2, 4, 8) if n <= ranks)
    found: dict[str, float] = {}
    for rate, (axis, arm) in ARMS.items():
        if (degree == 1 and rate in OF_SENDING) or (rate == "kernel_chunked" and not rates.get("peer_copy")):
            continue  # nothing is sent, or not by copies
        if rate == "fsdp_unit" and "kernel" not in found:
            say(f"{rate} is left out: it needs kernel")
            continue
        config = arm_config(_config(axis, degree, device, steps), arm)
        try:
            result = run_arm(Job(arm=arm, config=config, warmup=steps.warmup, steps=steps.steps))
        except ArmError as error:
            say(f"{rate} is left out: arm {arm} failed: {error}")
            continue
        step = result["step_ms"]
        if device == "cuda" and result["trace"]["idle"] < CPU_BOUND * step:
            say(f"{rate} is left out: the GPU sets the pace of arm {arm}")
            continue
        found[rate] = _rate(config, step / 1e3, float(rates["launch"]), found.get("kernel", 0.0))
    return found


def _rate(config: RunConfig, step: float, launch: float, kernel: float) -> float:
    """Of a config with one micro-batch: on a data axis seconds of a unit beyond its kernels, by `kernel`."""
    model, compiled = build_source(config.model, config.run.seed).model, bool(config.train.compile)
    cell = Cell(config.mesh.tp, config.train.micro_batch, config.data.seq_len, compiled=compiled)
    walked = walk(model, choose_plan(config, model), cell)
    setting = Setting(config.mesh, 1, (walked.layers,))
    (stage,) = stages_of(walked, setting)
    inside, outside = stage_work(walked, stage)
    if units := fsdp_units(setting, stage):
        return max(0.0, fsdp_unit_rate(step, inside, outside, units, kernel=kernel, launch=launch))
    return cpu_rate(step, inside, outside, compiled=compiled, launch=launch)


def _config(axis: str, degree: int, device: str, steps: Steps) -> RunConfig:
    """The axis's ranks have a rank's tokens each, or as many together."""
    split = degree if axis == "tp" else 1
    tree = on_random_tokens(steps.shape, steps.seq_len, steps.sequences * split)
    tree |= {"mesh": {axis: degree}, "device": device}
    tree["model"]["layers"] = steps.layers
    tree["train"]["steps"] = steps.warmup + steps.steps + 1  # one more is profiled
    tree["train"]["global_batch"] *= degree // split
    return parse_config(tree, "calibrate")
