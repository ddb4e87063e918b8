"""One rank of a run, from joining its group to the last line."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.space import naming_a_full_disk
from colrow.config import RunConfig
from colrow.data.prepare import PreparedData, prepare
from colrow.models.build import Source
from colrow.plans.patterns import with_stars
from colrow.plans.plan import Plan
from colrow.run import plan_check, preflight, startup
from colrow.run.finish import finish
from colrow.run.forecast_line import forecast_reader, gpus_here
from colrow.run.hang_guard import RankGuard
from colrow.run.heartbeat import Heartbeat
from colrow.run.loop import Loop, Outcome, Watchers
from colrow.run.outputs import output_lines, will_export
from colrow.run.process_group import RankInfo, join_store, process_group
from colrow.run.progress import TrainingProgress, labelled
from colrow.run.requirements import runs_on
from colrow.run.resume import resume
from colrow.run.run_folder import CHECKPOINTS, EXPORT, claimed, write_folder
from colrow.train.metrics import Metrics
from colrow.train.setup import Training, set_up


def run_rank(
    config: RunConfig,
    info: RankInfo,
    command: str,
    stop_requested: Callable[[], bool],
    *,
    plan: Plan | None = None,
    guard: RankGuard | None = None,
    log: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Join the other ranks and train. The first rank holds the lock of the run's folder. Collective.

    Args:
        command: the command that started the run, to print as the one that continues it.
        stop_requested: whether this rank was asked to save and stop.
        plan: the plan that the launcher resolved and checked. Without, each rank resolves it and the first checks it.
        guard: reports what this rank does, to the launcher or to the other ranks.
        log: gets the lines that the first rank prints.
    """
    heartbeat = guard.heartbeat if guard is not None else Heartbeat()
    config.mesh.require_world_size(info.world_size)
    first = info.rank == 0
    with ExitStack() as stack:
        if first:
            stack.enter_context(claimed(config.run.dir))
        checked = preflight.check(config, info.local_world_size, plan)
        config.mesh.require_world_size(info.world_size, partial(runs_on, checked.source, checked.plan, config))
        # Before anything here starts a thread: the check runs in a fork, which would have the calling thread only.
        lines = _lines_without_launcher(config, checked) if first and plan is None else []
        progress = stack.enter_context(TrainingProgress(first, config.train.steps, config.train.log_every, log=log))
        if plan is None:  # else the launcher has printed them
            lines = [*(f"changed    {line}" for line in checked.changes), *lines]
        if (warning := config.mesh.warning_across_hosts(info.local_world_size)) is not None:
            lines.append(f"warning    {warning}")
        for line in lines:
            progress.say(line)
        gpus = gpus_here(config) if first else None
        forecast = forecast_reader(config, checked.source.model, checked.plan, gpus)
        startup.mark("model and plan")
        # Before the data: under torchrun the ranks watch each other through the store while they tokenize. Colrow's own
        # launcher, which hands over a plan, watches them itself.
        store = join_store(info)
        if guard is not None and plan is None:
            guard.join(store)
        startup.mark("process group")
        with heartbeat.during("tokenization"):
            same_text = partial(preflight.require_text_of, checked, config)
            data = prepare(config.data, checked.source.vocab_size, progress=False, accept=same_text)
        startup.mark("data")
        mesh, device = stack.enter_context(process_group(config, info, store))
        startup.mark("process group")
        watchers = Watchers(progress, stop_requested, heartbeat, forecast)
        return train_run(config, checked.source, checked.plan, data, mesh, device, watchers, command=command)


def _lines_without_launcher(config: RunConfig, checked: preflight.Checked) -> list[str]:
    """What colrow's own launcher does and prints before ranks start, in a child of the first rank."""
    lines = plan_check.check_plan_apart(config, checked.plan, checked.judgement)
    lines += output_lines(config, checked.source, checked.stored)
    return lines + plan_check.forecast_apart(config, checked.plan)


def train_run(
    config: RunConfig,
    source: Source,
    plan: Plan,
    data: PreparedData,
    mesh: DeviceMesh,
    device: torch.device,
    watchers: Watchers,
    *,
    command: str = "",
) -> Outcome:
    """Set up, continue from the newest checkpoint, train, and finish. The first rank writes metrics and files.

    Collective over the mesh, which spans the default group. For `source` and `plan` see `set_up`.
    """
    first, progress = dist.get_rank() == 0, watchers.progress
    exports = first and will_export(config, source)  # of the unsharded model
    with ExitStack() as stack:
        stack.enter_context(naming_a_full_disk(config.run.dir))
        training = set_up(config, mesh, device, source, plan)
        stack.callback(training.close)
        startup.mark("weights")
        checkpoints = Checkpoints(
            config.run.dir / CHECKPOINTS,
            keep=config.checkpoint.keep,
            asynchronous=config.checkpoint.asynchronous,
            mesh=config.mesh,
            vocabulary=data.tokenizer.digest,
            tied=training.tied,
        )
        at = resume(config, training, data, checkpoints)
        startup.mark("checkpoint")
        if at.step >= config.train.steps:
            progress.say(finished_line(config, at.step, exports))
            return Outcome(at.step, at.step, stopped=False)
        if first:
            write_folder(config, training.plan, data.tokenizer)
        for line in opening_lines(config, training, exports):
            progress.say(line)
        if at.step:
            progress.say(f"continues  {at.line(config, data)}")
        loop = Loop(config, training, data, checkpoints, watchers)
        stack.callback(loop.close)
        metrics = stack.enter_context(Metrics(config, at.step)) if first else None
        outcome = loop.run(at, metrics)
        progress.stop()
        if outcome.stopped:
            progress.say(f"stopped    after step {outcome.step} of {config.train.steps}; the state is saved")
            progress.say(f"continue   {command}")
        else:
            with watchers.heartbeat.during("export"):
                finish(config, training, data.tokenizer, outcome, progress)
        return outcome


def finished_line(config: RunConfig, step: int, exports: bool) -> str:
    """What to print when a run that has all its steps is started again; `exports`: whether it writes an export."""
    run = config.run.dir
    lost = exports and not (run / EXPORT).exists()
    sample = shlex.join(["colrow", "generate", str(run), "--prompt", "TEXT"])
    command = shlex.join(["colrow", "export", str(run), "-o", str(run / EXPORT)])
    export = f"Its export is not there: `{command}` writes it.\n" if lost else ""
    return (
        f"the run in {run} is finished: {step} of {config.train.steps} steps.\n{export}"
        f"Sample it with `{sample}`; to train on, raise train.steps;\n"
        "to start again, set run.dir to another folder."
    )


def opening_lines(config: RunConfig, training: Training, exports: bool) -> list[str]:
    """What is going to run, and what it writes. `run.executed` prints what did run, after the first steps."""
    device = training.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {_threads()} a rank"
    train, tokens, counts = config.train, config.tokens_per_step, training.counts
    computed_by = ""
    if training.source.weights == "folder" and training.source.config is None:
        computed_by = f" by {type(training.source.model).__name__} of transformers"
    compute = (
        "fp32" if training.precision.compute_dtype == torch.float32 else "bf16 over fp32 weights and gradient sums"
    )
    losses = "".join(f" + {weight:g} {name}" for name, weight in training.source.auxiliary.items())
    objective = [f"objective  cross entropy{losses}"] if losses else []
    return [
        f"model      {training.source.name}{computed_by}, {training.counts.total:,} parameters",
        f"mesh       {config.mesh}, {where}",
        f"plan       {training.plan.name}, loss {training.plan.loss}",
        *objective,
        f"compute    {compute}",
        f"decay      {train.weight_decay:g} on {counts.decaying:,} of {counts.trained:,} trained parameters",
        f"batch      {train.global_batch} × {config.data.seq_len} = {tokens:,} tokens a step, {train.steps:,} steps",
        f"writes     {config.run.dir}: config.yaml, plan.yaml, tokenizer.json, metrics.jsonl,",
        f"           checkpoints/, loss.png, loss.svg{', export/' * exports}",
        *random_lines(training),
    ]


def random_lines(training: Training) -> Iterator[str]:
    """How modules that draw random numbers for a shard draw them; nothing of models that do not."""
    draws, tp = training.draws, training.mesh["tp"].size()
    if draws.on_shards:
        how = (
            f"a seed of each tp rank's own for shards, other numbers than with tp 1, in {_patterns(draws.on_shards)}"
            if training.device.type == "cuda"
            else f"each tp rank draws its shard of the unsharded tensor's numbers in {_patterns(draws.on_shards)}"
        )
        compiled = ", which are not compiled" if training.compiled else ""
        yield labelled("random", how + compiled)
    for reason in dict.fromkeys(draws.unknown.values()):
        where = _patterns([name for name, why in draws.unknown.items() if why == reason])
        yield labelled(
            "warning", f"the {tp} tp ranks draw equal random numbers for different shards in {where}: {reason}"
        )


def _patterns(names: Sequence[str]) -> str:
    """Modules' names, with * for the number of a layer."""
    return ", ".join(dict.fromkeys(with_stars(name) or "the model" for name in names))


def _threads() -> str:
    n = torch.get_num_threads()
    return f"{n} thread{'' if n == 1 else 's'}"
