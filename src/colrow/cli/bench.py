"""`colrow bench [CONFIG.yaml] ...`: arms of one model beside each other, on random tokens.

Each arm runs in processes of its own; with `--rounds` the arms take turns.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from colrow.bench import JOB
from colrow.cli.flags import parse
from colrow.cli.ranks import signal_of
from colrow.config import RunConfig, parse_config
from colrow.errors import ConfigError

if TYPE_CHECKING:
    from colrow.bench.measure import Job


@dataclass(frozen=True)
class Flags:
    """Measure ways to train one model (arms) in turn: tokens/s per GPU, MFU, memory, time in exposed collectives."""

    config: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="[CONFIG.yaml]")] = None
    """A run's config, whose data is not read. The flags below override it, or replace it."""
    arms: tuple[str, ...] = ("article", "plain", "linear", "fast")
    """article, plain, linear, fast, overlap, graph, overlap-graph, fp8, or config (as it stands); each may be followed
    by changes of config keys, fast:train.compile=false. Other packages: torchtitan:DIR, a checkout; transformers."""
    shape: str | None = None
    """A named shape."""
    layers: int | None = None
    """Number of layers instead of the shape's."""
    tp: int | None = None
    """Tensor-parallel degree."""
    dp_shard: int | None = None
    """Ranks that share parameters and batch (FSDP2)."""
    dp_replicate: int | None = None
    """Replicas that share the batch."""
    seq_len: int | None = None
    """Tokens in a sequence."""
    micro_batch: int | None = None
    """Sequences that a data-parallel rank runs at a time."""
    accumulate: int | None = None
    """Micro-batches in a step."""
    device: str | None = None
    """cpu, cuda or auto."""
    steps: int = 10
    """Timed steps; the first two of them are left out of the median."""
    warmup: int = 5
    """Steps before those that are timed."""
    rounds: int = 1
    """How often the arms take turns; each round starts new processes."""
    one_rank: bool = False
    """Run only one rank of the mesh, on one device. Nothing is sent: it shows a rank's memory, and the time of a step
    with all communication hidden, without the other GPUs."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write JSON to this file."""
    trace: Path | None = None
    """Keep each arm's profiler trace in this folder."""
    beside: tuple[Path, ...] = ()
    """Earlier results, to print below, with a warning where they were measured on another GPU or torch."""
    trust_code: bool = False
    """Run the Python code that the config of a run made by somebody else names for its model."""


def main(argv: list[str]) -> int:
    """Exit 0; 1 when an arm failed, after the table of the others; 2 for bad usage; 130, 143 when a signal ended it."""
    if argv and argv[0] == JOB:
        return _rank(Path(argv[1]))
    flags = parse(Flags, "bench", argv)
    if flags.steps < 1 or flags.warmup < 1 or flags.rounds < 1:
        raise ConfigError("--steps, --warmup and --rounds are at least 1")
    from colrow.bench.arms import arm_config
    from colrow.bench.peers import check_peer, is_peer
    from colrow.bench.report import read
    from colrow.cli.text import require_writable

    require_writable(flags.output)
    base = base_config(flags)
    configs = {arm: base if is_peer(arm) else arm_config(base, arm) for arm in flags.arms}
    for arm in filter(is_peer, configs):
        check_peer(arm, base)
    for path in flags.beside:
        read(path)  # raises for a file that is none, before the arms start
    if len({config.mesh.world_size for config in configs.values()}) > 1:
        raise ConfigError("the arms need different numbers of ranks: compare them in calls of their own")
    return _run(flags, configs)


def base_config(flags: Flags) -> RunConfig:
    """The config that all arms start from."""
    from colrow.bench.arms import on_random_tokens
    from colrow.run.run_folder import load_trusted

    tree: dict[str, Any] = (
        load_trusted(flags.config, trust_code=flags.trust_code).model_dump(mode="json")
        if flags.config is not None
        else on_random_tokens(flags.shape, flags.seq_len or 512, flags.micro_batch or 1)
    )
    if flags.config is None and flags.shape is None:
        raise ConfigError("give a config file or --shape NAME")
    mesh, train = tree.setdefault("mesh", {}), tree["train"]
    for axis in ("tp", "dp_shard", "dp_replicate"):
        if getattr(flags, axis) is not None:
            mesh[axis] = getattr(flags, axis)
    if flags.shape is not None:
        from colrow.models.shapes import shape

        shape(flags.shape)  # raises for one that is not known, before the arms start
        tree["model"] = {"shape": flags.shape}
    for section, key in (("model", "layers"), ("data", "seq_len"), ("train", "micro_batch")):
        if getattr(flags, key) is not None:
            tree[section][key] = getattr(flags, key)
    if flags.device is not None:
        tree["device"] = flags.device
    ranks = mesh.get("dp_shard", 1) * mesh.get("dp_replicate", 1)
    # a config keeps its global batch, unless what divides it is given
    if flags.config is None or flags.accumulate is not None or flags.micro_batch is not None:
        train["global_batch"] = train["micro_batch"] * ranks * (flags.accumulate or 1)
    # one more is profiled; the run's own warm-up and decay may be longer than all of them, which is refused
    train |= {"steps": flags.warmup + flags.steps + 1, "warmup_steps": 0, "decay_steps": None}
    return parse_config(tree, str(flags.config or "flags"))


def _run(flags: Flags, configs: dict[str, RunConfig]) -> int:
    """Measure the arms in turn, then print and keep their results. Returns the exit status."""
    from colrow.bench import report
    from colrow.cli.text import Terminal

    console, environment = Terminal(highlight=False, soft_wrap=True, width=132), report.environment()
    rounds: list[list[dict[str, Any]]] = []
    failed, stopped = False, None
    try:
        for turn in range(flags.rounds):
            rounds.append([])
            for arm, config in configs.items():
                done = _arm(flags, arm, config)
                if done is None:
                    failed = True
                    continue
                rounds[-1].append(done)
                rate = done["tokens_per_second_per_gpu"]
                console.print(f"round {turn + 1}: {arm} {done['step_ms']:.1f} ms, {rate:,.0f} tok/s/GPU")
                if flags.output is not None:  # after each arm: kept when a later one fails
                    report.write(report.merged(rounds), rounds, environment, flags.output)
    except KeyboardInterrupt as error:
        stopped = signal_of(error)
        print("colrow bench: stopped; results of the arms before:", file=sys.stderr, flush=True)
    report.show(report.merged(rounds), environment, console)
    for path in flags.beside:
        report.show_beside(path, environment, console)
    if flags.output is not None and any(rounds):
        console.print(f"written to {flags.output}")
    return int(failed) if stopped is None else 128 + stopped


def _arm(flags: Flags, arm: str, config: RunConfig) -> dict[str, Any] | None:
    """The results of one arm; None, with the reason on stderr, when it failed."""
    from colrow.bench.beside_forecast import forecast_data
    from colrow.bench.measure import Job
    from colrow.bench.peers import is_peer
    from colrow.bench.run_arm import ArmError, run_arm

    job = Job(
        arm=arm,
        config=config,
        warmup=flags.warmup,
        steps=flags.steps,
        trace=flags.trace.resolve() if flags.trace else None,
        one_rank=flags.one_rank,
    )
    if is_peer(arm):
        return _peer(job)
    try:
        return run_arm(job) | forecast_data(config)
    except ArmError as error:
        print(f"colrow bench: arm {arm} failed: {error}", file=sys.stderr, flush=True)
        return None


def _peer(job: Job) -> dict[str, Any] | None:
    """`_arm` of another package."""
    from colrow.bench.peers import measure_peer
    from colrow.bench.report import environment
    from colrow.forecasting.devices import peak_flops

    device = environment()["device"]
    try:
        return measure_peer(job, device, peak_flops(device))
    except ConfigError as error:
        print(f"colrow bench: {error}", file=sys.stderr, flush=True)
        return None


def _rank(path: Path) -> int:
    """One rank of one arm, under the launcher."""
    from colrow.cli.ranks import rank_folder, rank_info, reporting_errors

    with reporting_errors("bench"):
        from colrow.bench.run_arm import run_rank
        from colrow.run.stop import StopRequest

        with StopRequest(rank_folder()):  # ends this rank when another is lost
            run_rank(path, rank_info())
    return 0
