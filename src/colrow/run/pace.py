"""How far a run is from its forecast, after twenty steps; and what differs where it is slower than the band."""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity

from colrow.config import RunConfig
from colrow.mesh import AXES
from colrow.run.forecast_line import Forecast
from colrow.run.progress import labelled
from colrow.train.cuda_graph import can_be_captured
from colrow.train.step_trace import StepTrace, profiling

STEPS = 20
"""Steps after which a run is compared."""
_SETTLING = 2  # steps after compilation and capture in which the allocator and the clocks settle
_WITHOUT_WAIT = 0.8  # of the steps: one slow step of the host does not make a run CPU-bound
_LOW_CLOCK, _BELOW_OTHERS = 0.6, 0.9  # of the largest clock, which no GPU holds under load; of the other GPUs' median
_CLOCKS = ("nvidia-smi", "--query-gpu=uuid,clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits")


class Pace:
    """Takes each step's time on GPUs, and says once how it compares.

    A run is CPU-bound where its GPU is idle between kernels. The sign is how long the host waits for the end of a step
    while the next one is queued already: most of a step where the GPU is behind, not at all where the host is.

    Args:
        after: first steps of this start that do not count.
        forecast: reads that of the run, on the rank that prints; gives None elsewhere, and where there is none.
        say: prints.
    """

    def __init__(
        self, config: RunConfig, after: int, forecast: Callable[[], Forecast | None], say: Callable[[str], None]
    ) -> None:
        self._config, self._skip, self._read, self._say = config, after + _SETTLING, forecast, say
        self._forecast: Forecast | None = None
        self._seconds: list[float] = []
        self._without_wait: list[bool] = []
        self._count = 0
        self._wants_trace = False

    def add(self, seconds: float, waited: float | None, allocated_gib: float) -> None:
        """Take a step's seconds, and those that the host waited for it; None where no step was queued behind it."""
        self._count += 1
        if self._count <= self._skip or self._count > max(STEPS, self._skip + 1):
            return
        self._seconds.append(seconds)
        if waited is not None:
            # the event was reached before the host waited for it: the GPU had nothing left to do
            self._without_wait.append(waited < 0.02 * seconds)
        if self._count == max(STEPS, self._skip + 1):
            self._compare(allocated_gib)

    @property
    def _cpu_bound(self) -> bool:
        without = self._without_wait
        return len(without) > 0 and sum(without) >= _WITHOUT_WAIT * len(without)

    def _compare(self, allocated_gib: float) -> None:
        slow = True
        if (forecast := self._read()) is not None:
            self._forecast = forecast
            found = rate(self._config, statistics.median(self._seconds))
            self._say(compared_line(forecast, found, allocated_gib))
            slow = self._wants_trace = found < (1 - forecast.band) * forecast.tokens_per_second_per_gpu
        if slow and self._cpu_bound:  # a step of more kernels than the driver queues looks so at full speed too
            self._wants_trace = False
            self._say(cpu_bound_line(self._config))

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Around a step: where the run is slower than its band, one step is profiled, and the difference is printed."""
        if not self._wants_trace:
            yield
            return
        self._wants_trace = False
        clocks = _start(_CLOCKS)  # now, so that it reads them while the step runs
        with profiling([ProfilerActivity.CPU, ProfilerActivity.CUDA]) as traces:
            yield
            torch.cuda.synchronize()
        assert self._forecast is not None
        self._say(labelled("hint", difference(self._forecast, traces[0], _read(clocks, gpus_of_ranks_here()))))


def rate(config: RunConfig, seconds: float) -> float:
    """Tokens/s per GPU of steps of these seconds."""
    return config.tokens_per_step / seconds / config.mesh.world_size


def compared_line(forecast: Forecast, found: float, allocated_gib: float) -> str:
    """`after 20 steps 9,120 tokens/s per GPU (-3.1%), 52.9 GiB allocated (+0.2%)`; `found`: tokens/s per GPU."""
    faster, larger = found / forecast.tokens_per_second_per_gpu - 1, allocated_gib / forecast.allocated_gib - 1
    return labelled(
        "forecast",
        f"after {STEPS} steps: {found:,.0f} tokens/s per GPU ({faster:+.1%}), {allocated_gib:.3g} GiB allocated "
        f"({larger:+.1%})",
    )


def cpu_bound_line(config: RunConfig) -> str:
    """What a user can change, within 80 columns."""
    fixes = ["a larger train.micro_batch"]
    if not config.train.cuda_graph and can_be_captured(config, "cuda"):
        fixes.insert(0, "train.cuda_graph: true")
    return labelled("hint", f"GPU idle between kernels (CPU-bound): try {' or '.join(fixes)}")


@dataclass(frozen=True)
class Clock:
    """MHz of a GPU's multiprocessors while the step ran, and at most."""

    gpu: int
    mhz: float
    limit: float


_GROUPS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "collectives exposed": ((*AXES,), ("exposed",)),
    "GPU idle between kernels": (("gaps", "cpu", "bubble"), ("idle",)),
    "matmuls": (("products",), ("product",)),
    "attention": (("attention",), ("attention",)),
    "pointwise kernels": (("pointwise",), ("compiled pointwise", "other", "copy", "loss")),
    "optimizer": (("optimizer",), ("optimizer",)),
}
"""What is compared: parts of a forecast, and kinds of a trace."""


def difference(forecast: Forecast, trace: StepTrace, clocks: list[Clock]) -> str:
    """What a slow step takes longer for than forecast: low clocks, else the parts that take most of the difference."""
    if slow := _slow_clock(clocks):
        return slow
    measured = {**trace.kinds, "exposed": trace.exposed or 0.0, "idle": trace.idle or 0.0}
    parts = []
    for name, (forecast_parts, kinds) in _GROUPS.items():
        was = sum(measured.get(kind, 0.0) for kind in kinds)
        should = sum(forecast.parts_ms.get(part, 0.0) for part in forecast_parts)
        parts.append((was - should, f"{name} {was:.0f} ms a step (forecast {should:.0f})"))
    parts.sort(reverse=True)
    more = sum(excess for excess, _ in parts if excess > 0)
    named = [text for excess, text in parts[:2] if excess > 0.25 * more]  # a smaller share explains nothing
    return f"slower than forecast: {', '.join(named)}" if named else "slower than forecast; a profiled step was not"


def _slow_clock(clocks: list[Clock]) -> str:
    if not clocks:
        return ""
    slowest = min(clocks, key=lambda clock: clock.mhz)
    usual = statistics.median(clock.mhz for clock in clocks)
    if slowest.mhz >= _LOW_CLOCK * slowest.limit and slowest.mhz >= _BELOW_OTHERS * usual:
        return ""
    others = f", the others at {usual:,.0f}" if len(clocks) > 1 else ""
    at = f"GPU {slowest.gpu} runs at {slowest.mhz:,.0f} of {slowest.limit:,.0f} MHz{others}"
    return f"slower than forecast: low clocks: {at} (power or heat: see nvidia-smi -q -d PERFORMANCE)"


def _start(command: tuple[str, ...]) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


def gpus_of_ranks_here() -> set[str]:
    """UUIDs of the GPUs that this host's ranks use, as nvidia-smi prints them: it lists the host's other GPUs too."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    used = range(min(ranks, torch.cuda.device_count()))
    return {f"GPU-{torch.cuda.get_device_properties(i).uuid}" for i in used}


def _read(process: subprocess.Popen[str] | None, used: Collection[str]) -> list[Clock]:
    """The clocks that nvidia-smi printed of these GPUs, by its numbers; none where it failed."""
    if process is None:
        return []
    try:
        text, _ = process.communicate(timeout=10)
        rows = [line.split(", ") for line in text.splitlines()]
        return [Clock(i, float(mhz), float(limit)) for i, (uuid, mhz, limit) in enumerate(rows) if uuid in used]
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return []
    except ValueError:  # [N/A]
        return []
