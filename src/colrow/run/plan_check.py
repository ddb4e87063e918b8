"""Whether a run's plan may train, and what it will cost: decided before the ranks start, here or in a child process."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from colrow.config import RunConfig
from colrow.derive.judged import Judgement
from colrow.errors import PlanError
from colrow.models.build import Source, build_source, built
from colrow.plans.plan import Plan
from colrow.plans.split_share import SplitShare
from colrow.run.decision import Start, decide
from colrow.run.forecast_line import Forecast, Gpus, forecast_run, gpus_here, keep_forecast
from colrow.run.kept_proof import KeptProof, builders_of, dependencies
from colrow.run.kept_start import KeptStart

T = TypeVar("T")


def check_plan(
    config: RunConfig,
    source: Source,
    plan: Plan,
    judgement: Judgement | None = None,
    meanwhile: str = "in seconds",
) -> list[str]:
    """`decision.decide` with the run's batch, sequence length and folder. Returns what is printed: a line for each
    warning, and how much the plan splits.

    Takes a second or two, whatever the model's size: of equal layers two are run, on fake tensors. Where it verifies a
    reduced model, it takes some more, and prints a line before and after; `meanwhile` ends the first. What a
    derivation has judged already is not judged again.

    Raises:
        PlanError: the plan is refused; the text says why, and what to do.
    """
    if nothing_to_decide(config):
        return split_lines(config, source, plan)
    ids = torch.zeros(config.train.micro_batch, config.data.seq_len, dtype=torch.long)
    path = config.model.reduced
    depends = cache(lambda: dependencies(config, source.model, plan, *builders_of(config)))
    how = repr((config.check, config.verify, config.run.seed))
    kept, printed = KeptStart(config.run.dir, "check", lambda: {**depends(), "how": how}), list[str]()
    if judgement is None and (lines := kept.find()) is not None:
        return ["check      as at the last start: nothing that it depends on has changed", *lines]

    def say(line: str) -> None:
        printed.append(line)
        print(f"verify     {line}", flush=True)

    decision = decide(
        source.model,
        plan,
        config.mesh,
        *ids.shape,
        # of the run's sizes, with a seed: a kept check has to be that of the next start
        inputs=(ids.random_(source.vocab_size, generator=torch.Generator().manual_seed(config.run.seed)),),
        name=source.name,
        stop_on_errors=config.check,
        verify=config.verify,
        build_reduced=None if path is None else lambda: built(path, config.run.seed),
        start=Start(
            judgement,
            proofs=KeptProof(config.run.dir, depends),
            say=say,
            meanwhile=meanwhile,
        ),
    )
    if not decision.accepted:
        raise PlanError(decision.refusal)
    warnings = [
        f"warning    {f.code} {f.slug} at {f.where}: {f.message}; {f.fix} ({f.page})" for f in decision.findings
    ]
    lines = warnings + split_lines(config, source, plan, decision.flops_split)
    if not printed:  # else a proof was needed: KeptProof keeps it
        kept.keep(lines)
    return lines


def split_lines(config: RunConfig, source: Source, plan: Plan, flops: float | None = None) -> list[str]:
    """What is printed of how much the plan splits: a warning, with the largest reasons, where that is little."""
    if config.mesh.tp == 1:
        return []
    share = SplitShare.of(source.model, plan, config.mesh.tp, flops)
    if not share.is_small:
        return [f"split      {share.summary()}"]
    return [f"warning    {share.summary()}", *(f"           {line}" for line in share.reasons())]


def nothing_to_decide(config: RunConfig) -> bool:
    """Whether no plan is checked or verified."""
    return config.mesh.tp == 1 or (not config.check and config.verify == "never")


def check_plan_apart(config: RunConfig, plan: Plan, judgement: Judgement | None = None) -> list[str]:
    """`check_plan` in a child process: the process groups that it makes leave no trace in this rank.

    The child is forked, which saves seconds of imports, unless this process has threads: a fork has only the calling
    thread, so a backward there would wait forever for autograd's device threads.
    """
    if nothing_to_decide(config):
        return split_lines(config, build_source(config.model, config.run.seed), plan)
    return _in_child(_check_in_child, config, plan.to_yaml(), judgement)


def forecast_apart(config: RunConfig, plan: Plan) -> list[str]:
    """`forecast_run` of a rank without a launcher of colrow's, in a child process as `check_plan_apart`; kept for the
    comparison with the run. Returns what is printed."""
    gpus = gpus_here(config)
    if gpus is None:
        return []
    found, lines = _in_child(_forecast_in_child, config, plan.to_yaml(), gpus)
    keep_forecast(config, found)
    return lines


def _in_child(call: Callable[..., T], *args: Any) -> T:
    threads = Path("/proc/self/task")  # Linux; elsewhere the number of native threads is unknown
    is_single_threaded = threads.exists() and len(list(threads.iterdir())) == 1
    context = multiprocessing.get_context("fork" if is_single_threaded else "spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(call, *args).result()


def _forecast_in_child(config: RunConfig, plan: str, gpus: Gpus) -> tuple[Forecast | None, list[str]]:
    return forecast_run(config, build_source(config.model, config.run.seed).model, Plan.from_yaml(plan), gpus)


def _check_in_child(config: RunConfig, plan: str, judgement: Judgement | None) -> list[str]:
    # a model may hold what cannot be pickled: the child builds its own
    source = build_source(config.model, config.run.seed)
    return check_plan(config, source, Plan.from_yaml(plan), judgement, meanwhile="while the other ranks wait")
