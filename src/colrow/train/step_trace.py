"""Reads a profiler's trace of one step: time in kernels by kind, exposed communication, idle time.

The trace is the one that torch.profiler exports for Chrome. Annotations enclose kernels and would count them twice:
they have a category of their own there, which is left out.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_KINDS = (  # the first that matches
    ("communication", ("nccl", "memcpy ptop")),
    ("loss", ("_statistics_kernel", "_loss_kernel")),
    ("product", ("triton_tem",)),  # a template of the compiler's for a product
    # before attention: names of compiled kernels list the operations that they fuse
    ("compiled pointwise", ("triton_",)),
    ("attention", ("fmha", "flash", "sdpa", "attention")),
    ("product", ("gemm", "nvjet", "cutlass", "splitk")),
    ("optimizer", ("adam", "multi_tensor")),
    ("copy", ("memcpy", "memset", "copy_kernel", "catarray", "split_with_sizes", "chunk_cat")),
)


@dataclass(frozen=True)
class StepTrace:
    """Milliseconds of one profiled step on one rank; None without a GPU.

    Attributes:
        span: from the first kernel to the end of the last.
        busy: time in which at least one kernel runs.
        communication: sum over NCCL's kernels, in which a rank also waits for the others, and copies to peers.
        exposed: time in which these run and nothing else. A stream that waits for a peer's copy counts as idle.
        kinds: sum over kernels, by kind.
        collectives: number of NCCL's kernels by kind, and of copies to peers; on CPUs of c10d's calls.
        operators: number of calls of colrow's operators, of its sends of chunks, and of fp8 matmuls; with CUDA graphs,
            those of the captured step.
        kernels: number of kernels.
        graph_launches: number of CUDA graphs that the host launched.
    """

    span: float | None
    busy: float | None
    communication: float | None
    exposed: float | None
    kinds: dict[str, float]
    collectives: dict[str, int]
    operators: dict[str, int]
    kernels: int
    names: tuple[str, ...] = ()
    graph_launches: int = 0

    @property
    def idle(self) -> float | None:
        """Time in which no kernel runs."""
        return None if self.span is None or self.busy is None else self.span - self.busy

    def to_data(self) -> dict[str, Any]:
        """The trace as plain values for JSON, without `names`, those of all kernels."""
        return {**{key: value for key, value in asdict(self).items() if key != "names"}, "idle": self.idle}


@contextmanager
def profiling(activities: list[ProfilerActivity], kept: Path | None = None) -> Iterator[list[StepTrace]]:
    """Profile the block. After it, the list holds its trace; the trace's file is left at `kept`."""
    traces: list[StepTrace] = []
    if ProfilerActivity.CUDA not in activities:  # of a GPU's profiler the errors are worth their lines
        # libkineto of torch 2.13 logs each start and stop at its highest level; it reads this at its first profile
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    with profile(activities=activities, acc_events=True) as profiler:  # without, torch warns of later cycles
        yield traces
    with tempfile.TemporaryDirectory() as folder:
        path = kept or Path(folder) / "trace.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        traces.append(read_trace(path))


def read_trace(path: Path) -> StepTrace:
    """The times and counts of a Chrome trace of one step."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return from_events([event for event in events if event.get("ph") == "X"])


def from_events(events: list[dict[str, Any]]) -> StepTrace:
    """The times and counts of complete events: `cat`, `name`, `ts` and `dur` in microseconds."""
    own = ("colrow::", "aten::_scaled_mm")
    on_cpu = [event for event in events if event.get("cat") in ("cpu_op", "user_annotation")]
    operators = Counter(event["name"] for event in on_cpu if event["name"].startswith(own))
    functions = Counter("linear_cross_entropy" for e in events if e["name"] == "_LinearCrossEntropy")
    device = [event for event in events if event.get("cat") in _ON_DEVICE]
    # a CPU run has no kernels: what was called is known, times are not
    if not device:
        calls = Counter(e["name"] for e in events if e.get("cat") == "cpu_op" and e["name"].startswith("c10d::"))
        return StepTrace(None, None, None, None, {}, dict(calls), dict(operators + functions), 0)
    kinds: dict[str, float] = {}
    for event in device:
        kind = kind_of(event["name"])
        kinds[kind] = kinds.get(kind, 0.0) + event["dur"] / 1e3
    nccl = [event for event in device if kind_of(event["name"]) == "communication"]
    others = [event for event in device if kind_of(event["name"]) != "communication"]
    busy = union_ms(device)
    return StepTrace(
        span=(max(e["ts"] + e["dur"] for e in device) - min(e["ts"] for e in device)) / 1e3,
        busy=busy,
        communication=sum(event["dur"] for event in nccl) / 1e3,
        exposed=busy - union_ms(others),  # time in which NCCL alone ran
        kinds=dict(sorted(kinds.items(), key=lambda item: -item[1])),
        collectives=dict(Counter(_collective(event["name"]) for event in nccl)),
        operators=dict(operators + functions),
        kernels=len(device),
        names=tuple(sorted({event["name"] for event in device})),
        graph_launches=sum(event["name"].startswith("cudaGraphLaunch") for event in events),
    )


def kind_of(name: str) -> str:
    """The kind of a kernel, by its name."""
    lowered = name.lower()
    return next((kind for kind, marks in _KINDS if any(mark in lowered for mark in marks)), "other")


def union_ms(events: Iterable[dict[str, Any]]) -> float:
    """Milliseconds in which at least one of the events runs."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total / 1e3


def _collective(kernel: str) -> str:
    """`ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(...)` is a ReduceScatter; `Memcpy PtoP (...)` stays."""
    parts = kernel.split("(")[0].split("_")
    return parts[1] if len(parts) > 1 else kernel
