"""One rank of a run, from joining its group to the last line."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colrow.checkpoint.distributed import Checkpoints
from colrow.config import RunConfig
from colrow.data.prepare import PreparedData, prepare
from colrow.train import preflight
from colrow.train.attention import attention_kernel
from colrow.train.loop import Loop, Outcome, resume
from colrow.train.metrics import Metrics
from colrow.train.plot import plot_loss
from colrow.train.progress import Progress
from colrow.train.run_folder import CHECKPOINTS, PLAN, TOKENIZER, claimed, write_config
from colrow.train.sample import sample
from colrow.train.setup import Training, set_up


@dataclass(frozen=True)
class Place:
    """Where a rank is: what torchrun told it."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int


def run_rank(config: RunConfig, place: Place, source: str, stop_requested: Callable[[], bool]) -> Outcome:
    """Train as one rank of the run, with the run's folder, metrics, checkpoints and last lines. Collective.

    Args:
        source: the config's file, for the line that says how to continue.
    """
    config.mesh.require_world_size(place.world_size)
    first = place.rank == 0
    with ExitStack() as stack:
        if first:
            stack.enter_context(claimed(config.run.dir))
        progress = stack.enter_context(Progress(first, config.train.steps, config.train.log_every))
        data = prepare(config.data, preflight.build_source(config.model, config.run.seed).vocab_size, progress=False)
        mesh, device = stack.enter_context(joined(config, place))
        training = set_up(config, mesh, device)
        checkpoints = Checkpoints(
            config.run.dir / CHECKPOINTS,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            mesh=config.mesh,
            vocabulary=data.tokenizer.digest,
        )
        if first:
            describe_folder(config, training, data)
        start = resume(config, training, data, checkpoints)
        for line in opening_lines(config, training, start):
            progress.say(line)
        loop = Loop(config, training, data, checkpoints, progress, stop_requested)
        stack.callback(loop.close)
        metrics: Any = stack.enter_context(Metrics(config, start)) if first else nullcontext()
        outcome = loop.run(start, metrics if first else None)
        progress.stop()
        finish(config, training, data, outcome, progress, source)
        return outcome


@contextmanager
def joined(config: RunConfig, place: Place) -> Iterator[tuple[DeviceMesh, torch.device]]:
    """The default process group, the mesh, and this rank's device: gloo on CPUs, NCCL on GPUs."""
    kind = preflight.device_type(config)
    preflight.require_devices(place.local_world_size, kind)
    options: dict[str, Any] = {}
    device = torch.device("cpu")
    if kind == "cuda":
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        options["device_id"] = device
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", rank=place.rank, world_size=place.world_size, **options
    )
    yield config.mesh.build(kind, place.world_size), device
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def describe_folder(config: RunConfig, training: Training, data: PreparedData) -> None:
    """Write config.yaml, plan.yaml and tokenizer.json."""
    write_config(config)
    training.plan.save(config.run.dir / PLAN)
    data.tokenizer.save(config.run.dir / TOKENIZER)


def opening_lines(config: RunConfig, training: Training, start: int) -> list[str]:
    """What runs, and what it writes."""
    count = sum(param.numel() for param in training.model.parameters())
    device = training.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_threads()} a rank"
    tokens = config.train.global_batch * config.data.seq_len
    lines = [
        f"model      {training.source.name}, {count:,} parameters",
        f"mesh       {config.mesh} ({config.mesh.world_size} ranks on {where})",
        f"plan       {training.plan.name}, loss {training.plan.loss}",
        f"compute    {training.precision}, {'compiled blocks' if training.compiled else 'eager'}{_attention(config, training)}",
        f"batch      {config.train.global_batch} × {config.data.seq_len} = {tokens:,} tokens a step, {config.train.steps} steps",
        f"writes     {config.run.dir}: config.yaml, plan.yaml, metrics.jsonl, checkpoints/",
    ]
    if start:
        lines.append(f"continues  after step {start}")
    return lines


def finish(
    config: RunConfig, training: Training, data: PreparedData, outcome: Outcome, progress: Progress, source: str
) -> None:
    """The last lines: what came out, where it lies, and what to do next. Collective."""
    run = config.run.dir
    memory = peak_memory(training.device)
    if outcome.stopped:
        progress.say(f"stopped after step {outcome.step}, which is saved in {run / CHECKPOINTS}/step-{outcome.step}")
        progress.say(f"continue   colrow train {source}")
        return
    if dist.get_rank() == 0:
        progress.say(f"loss curve {plot_loss(run)}")
    progress.say(f"checkpoint {run / CHECKPOINTS}/step-{outcome.step}")
    progress.say(f"memory     {memory}")


def peak_memory(device: torch.device) -> str:
    """The largest peak of any rank. Collective."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    allocated = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    peaks = torch.tensor([host, allocated], dtype=torch.float64, device=device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    host_gib, device_gib = (peak / 2**30 for peak in peaks.tolist())
    gpu = f", {device_gib:.2f} GiB of a GPU" if device.type == "cuda" else ""
    return f"peak {host_gib:.2f} GiB of a rank's host memory{gpu}"


def _attention(config: RunConfig, training: Training) -> str:
    shape = training.source.config
    if training.device.type != "cuda" or shape is None:
        return ""
    tp = config.mesh.tp if training.plan.name == "llama" else 1
    kernel = attention_kernel(
        training.device,
        torch.bfloat16 if training.precision.startswith("bf16") else torch.float32,
        heads=shape.num_attention_heads // tp,
        kv_heads=max(shape.num_key_value_heads // tp, 1),
        head_dim=shape.head_dim,
        seq_len=config.data.seq_len,
    )
    return f", attention {kernel}"


def _threads() -> str:
    n = torch.get_num_threads()
    return f"{n} thread{'' if n == 1 else 's'}"
