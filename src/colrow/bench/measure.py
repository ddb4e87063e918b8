"""One arm on one rank: random tokens, warm-up, timed steps, one profiled step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity

from colrow.bench.one_rank import fake_group
from colrow.config import RunConfig
from colrow.data.loader import Batch
from colrow.errors import ConfigError
from colrow.forecasting.devices import peak_flops
from colrow.forecasting.memory import GIB
from colrow.mesh import MeshAxes
from colrow.models.build import build_source
from colrow.models.shapes import mfu
from colrow.ops.execution_record import recorded
from colrow.ops.kernels.optional_triton import UNAVAILABLE
from colrow.parallel.quantized_shards import GATHERED_IN_8_BITS
from colrow.plans.plan import Plan
from colrow.run import preflight
from colrow.run.executed import executed_paths
from colrow.run.pace import rate
from colrow.run.process_group import RankInfo, process_group, set_device
from colrow.run.requirements import check_sequence, device_type
from colrow.train.cuda_graph import EAGER_STEPS, MEASURED_STEPS, can_be_captured
from colrow.train.setup import Training, set_up
from colrow.train.step_trace import StepTrace, profiling

SETTLING_STEPS = 2  # first timed steps, left out of the median: allocator and clocks still settle


class Job(BaseModel, frozen=True):
    """What one arm runs. It goes to the ranks as JSON.

    Args:
        warmup: steps before the clock starts, at least 1.
        steps: timed steps.
        trace: folder that keeps the profiler's trace of the first rank.
        one_rank: run this rank alone, and send nothing.
    """

    arm: str
    config: RunConfig
    warmup: int
    steps: int
    trace: Path | None = None
    one_rank: bool = False


def measure(job: Job, info: RankInfo) -> dict[str, Any]:
    """Train with random tokens and return the arm's results, the same on each rank. Collective.

    With `one_rank`, a collective costs only the local copy of its result.

    Raises:
        ConfigError: something does not fit; or a fast path was requested and the profiled step did not run it.
    """
    config = job.config
    _require_measurable(job)
    source = build_source(config.model, config.run.seed)
    plan = preflight.choose_plan(config, source.model)
    check_sequence(config, plan)
    with one_rank(config, info) if job.one_rank else process_group(config, info) as (mesh, device):
        training = set_up(config, mesh, device, source, plan)
        axes = MeshAxes(mesh)
        batches = random_batches(config, training.source.vocab_size, axes.data_rank, device)
        losses: list[Tensor] = []
        captured = _warm_up(training, batches, job, losses)
        _synchronise(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = timed_steps(
            lambda number, batch: losses.append(training.step(number, batch)[0]), batches, job, device
        )
        memory = memory_peaks(device)
        trace = _profiled(training, next(batches), job, info.rank, device)
        result = _result(job, training, seconds, memory, device)
        result |= {"ran": executed_paths(training, config.data.seq_len), "one_rank": job.one_rank}
        # The first rank alone has a trace. All get its result: where a fast path did not run, all raise.
        shared: list[Any] = [None]
        if info.rank == 0:
            assert trace is not None
            if training.captured:  # a replay launches kernels and calls no operator: take those of the capture
                trace = replace(trace, operators=captured)
            shared[0] = {**result, "trace": trace.to_data(), **_problem(config, training, trace)}
        shared_device = device if device.type == "cuda" else None  # NCCL sends only what lies on a GPU
        dist.broadcast_object_list(shared, device=shared_device)
        result = shared[0]
        if not job.one_rank:  # without the other ranks' terms the loss is meaningless
            ends = torch.stack([losses[0], losses[-1]]).double() * axes.loss_weight
            dist.all_reduce(ends)
            result["loss_first"], result["loss_last"] = ends.tolist()
        training.close()
    if "problem" in result:
        raise ConfigError(f"arm {job.arm}: {result['problem']}")
    return result


def _require_measurable(job: Job) -> None:
    config = job.config
    chooses = config.train.cuda_graph == "auto" and can_be_captured(config, device_type(config))
    eager = MEASURED_STEPS if chooses else EAGER_STEPS
    if (chooses or config.train.is_graphed) and job.warmup <= eager:
        raise ConfigError(
            f"arm {job.arm}: train.cuda_graph captures in step {eager + 1}, and --warmup is {job.warmup}: use "
            f"--warmup {eager + 1} or more"
        )
    if job.one_rank and config.mesh.pp > 1:
        raise ConfigError(
            "--one-rank: a pipeline's stages wait for each other, and the time of one alone says little: use pp 1"
        )


@contextmanager
def one_rank(config: RunConfig, info: RankInfo) -> Iterator[tuple[DeviceMesh, torch.device]]:
    """What `process_group` yields, for a mesh whose other ranks do not exist."""
    device = set_device(device_type(config), info.local_rank)
    with fake_group(info.rank, info.world_size):
        yield config.mesh.build(device.type, info.world_size), device


def random_batches(config: RunConfig, vocab: int, data_rank: int, device: torch.device) -> Iterator[list[Batch]]:
    """Micro-batches of random ids for each step, drawn by the data-parallel rank: a tp group has the same."""
    train, step = config.train, 0
    count = config.micro_batches
    while True:
        # a generator of its own: what the model draws must not depend on how batches are made
        generator = torch.Generator().manual_seed(1000 * step + data_rank)
        rows = torch.randint(0, vocab, (count, train.micro_batch, config.data.seq_len + 1), generator=generator)
        rows = rows.to(device)
        yield [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
        step += 1


def _warm_up(training: Training, batches: Iterator[list[Batch]], job: Job, losses: list[Tensor]) -> dict[str, int]:
    """The steps before the clock starts. Returns the operators of the one that captures CUDA graphs."""
    captured: dict[str, int] = {}
    for step in range(job.warmup):
        batch = next(batches)
        if training.graphs and step == training.eager_steps:
            with profiling([ProfilerActivity.CPU]) as traces:
                losses.append(training.step(step, batch)[0])
            captured = traces[0].operators
        else:
            losses.append(training.step(step, batch)[0])
    return captured


def timed_steps(
    run: Callable[[int, list[Batch]], None], batches: Iterator[list[Batch]], job: Job, device: torch.device
) -> list[float]:
    """Seconds of each step that `run` takes. On a GPU its own events are read: the host runs ahead of it, as in
    training."""
    ready = [next(batches) for _ in range(job.steps)]  # before the clock starts: no timed step draws and copies them
    _synchronise(device)
    if device.type != "cuda":
        ends = [time.perf_counter()]
        for i, batch in enumerate(ready):
            run(job.warmup + i, batch)
            dist.barrier()  # a step ends when the slowest rank's does
            ends.append(time.perf_counter())
        return [b - a for a, b in pairwise(ends)]
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(job.steps + 1)]
    marks[0].record()
    for i, batch in enumerate(ready):
        run(job.warmup + i, batch)
        marks[i + 1].record()
    _synchronise(device)
    return [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]


def _profiled(training: Training, batch: list[Batch], job: Job, rank: int, device: torch.device) -> StepTrace | None:
    """The trace of one step on the first rank; None on the others, which run the step too: it is collective."""
    step = job.warmup + job.steps
    if rank != 0:
        training.step(step, batch)
        _synchronise(device)
        return None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    kept = job.trace / f"{job.arm.replace(':', '-').replace('=', '-')}.json" if job.trace else None
    # The device is waited for inside, where its last kernels still count; the barrier, a kernel itself, stays outside.
    with profiling(activities, kept) as traces:
        training.step(step, batch)
        _synchronise_here(device)
    _synchronise(device)
    return traces[0]


def _result(
    job: Job, training: Training, seconds: list[float], memory: dict[str, float], device: torch.device
) -> dict[str, Any]:
    """The row of results without its trace: what ran, its time and its memory. Collective."""
    config = job.config
    timing = timing_fields(config, *of_slowest_rank(seconds, device), seconds)
    result: dict[str, Any] = {
        "arm": job.arm,
        "plan": training.plan.name,
        "loss": training.plan.loss,
        "compiled": training.compiled,
        "cuda_graph": training.captured,
        "compute": str(training.precision.compute_dtype).removeprefix("torch."),
        "model": training.source.name,
        **timing,
        **memory,
    }
    shape = training.source.config
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = peak_flops(device_name)
    result |= {"mfu_causal": None, "mfu_full": None}
    if shape is not None and peak is not None:
        result |= mfu(shape, config.data.seq_len, timing["tokens_per_second_per_gpu"], peak)
    return result


def of_slowest_rank(seconds: list[float], device: torch.device) -> tuple[float, float]:
    """The median and the shortest of the steps' seconds, of the rank that has the longest. Collective."""
    kept = sorted(seconds[SETTLING_STEPS:] or seconds)  # of fewer steps than settle all count
    slowest = torch.tensor([statistics.median(kept), kept[0]], device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    median, best = slowest.tolist()
    return median, best


def timing_fields(config: RunConfig, seconds: float, best: float, steps: list[float]) -> dict[str, Any]:
    """What every row of results says of the work and its time; `steps`: seconds of each."""
    return {
        "layers": config.model.layers,
        "mesh": config.mesh.model_dump(),
        "seq_len": config.data.seq_len,
        "micro_batch": config.train.micro_batch,
        "tokens_per_step": config.tokens_per_step,
        "step_ms": seconds * 1e3,
        "step_ms_best": best * 1e3,
        "steps_ms": [round(each * 1e3, 3) for each in steps],
        "tokens_per_second_per_gpu": rate(config, seconds),
    }


def memory_peaks(device: torch.device) -> dict[str, float]:
    """GiB of the rank that needs most: the allocator's peaks since the warm-up, and the device memory in use."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    used = [torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), total - free]
    peaks = torch.tensor(used, dtype=torch.float64, device=device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    allocated, reserved, device_used = (peaks / GIB).tolist()
    return {"peak_allocated_gib": allocated, "peak_reserved_gib": reserved, "device_used_gib": device_used}


def _problem(config: RunConfig, training: Training, trace: StepTrace) -> dict[str, str]:
    """The fast paths that plan and config request and the profiled step did not run, as an error's text."""
    axes, graphed = MeshAxes(training.mesh), training.captured or config.train.is_graphed
    tp, data_axes = axes.size("tp"), bool(axes.data_groups())
    missing = missing_paths(training.plan, trace, tp, data_axes=data_axes, cuda_graph=graphed, loss=config.mesh.pp == 1)
    if config.mesh.is_flat and not recorded("data"):
        missing.append("mesh.data_engine: flat (no gradient was exchanged)")
    if config.fsdp.gather_fp8 and GATHERED_IN_8_BITS not in recorded("data"):
        missing.append("fsdp.gather_fp8 (no weight was rounded before it was gathered)")
    return {"problem": f"requested and not run: {', '.join(missing)}"} if missing else {}


def missing_paths(
    plan: Plan, trace: StepTrace, tp: int, *, data_axes: bool = False, cuda_graph: bool = False, loss: bool = True
) -> list[str]:
    """The fast paths of `plan`, and CUDA graphs, that a step's trace does not show. `loss`: whether the traced rank
    computes it; a pipeline's first stage does not."""
    applied = [style for style in plan.modules.values() if style.applies(tp, data_axes=data_axes)]
    missing = ["train.cuda_graph (no cudaGraphLaunch)"] if cuda_graph and not trace.graph_launches else []
    operators = {style.operator: style.name for style in applied if style.operator}
    for operator, name in operators.items():
        if not trace.operators.get(f"colrow::{operator}"):
            missing.append(f"style {name} (operator colrow::{operator})")
    for overlap in ("point_to_point", "copy_engine") if tp > 1 else ():
        requested = any(getattr(style, "overlap", None) == overlap for style in plan.modules.values())
        if requested and not trace.operators.get(f"colrow::send_{overlap}"):
            missing.append(f"overlap: {overlap} (no chunk was sent: tokens / tp below the styles' chunk_rows?)")
    if loss and plan.loss == "linear" and not trace.operators.get("linear_cross_entropy"):
        missing.append("linear cross entropy")
    on_device = trace.kernels > 0  # on a CPU the reference stands for kernels
    wants_fp8 = any(getattr(style, "fp8", "") for style in applied)
    if wants_fp8 and on_device and not any(name.startswith("aten::_scaled_mm") for name in trace.operators):
        missing.append("fp8 (operator aten::_scaled_mm)")
    if loss and plan.loss == "linear" and on_device and not any("_loss_kernel" in name for name in trace.names):
        missing.append(f"the loss's Triton kernels ({UNAVAILABLE or 'no such kernel ran'})")
    return missing


def _synchronise_here(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _synchronise(device: torch.device) -> None:
    """Wait until every rank's device is idle. A barrier of NCCL is a kernel, which is waited for as well."""
    _synchronise_here(device)
    dist.barrier()
    _synchronise_here(device)
