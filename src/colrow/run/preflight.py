"""What can be found to be wrong before any process starts; and the model and plan that a run is going to use."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from colrow.checking.check import Finding, check_static
from colrow.checking.degrees import plan_degrees
from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.folder import CheckpointInfo
from colrow.checkpoint.loading import require_same_model, require_same_vocabulary, signature
from colrow.checkpoint.manifest import read_manifest
from colrow.checkpoint.state import model_tensors
from colrow.config import RunConfig
from colrow.data.encode import usable_cores
from colrow.data.tokenizer import Tokenizer
from colrow.derive.judged import Judgement, derive_judged
from colrow.errors import ConfigError, PlanError
from colrow.mesh import Mesh
from colrow.models.build import Source, build_source, built, imported, resolve_implementation
from colrow.parallel.flat_weights import check_data_engine
from colrow.parallel.pipeline_split import check_pipeline, fit_micro_batch, require_parts
from colrow.plans.derive_options import DERIVED
from colrow.plans.named import derive_options, named_plan
from colrow.plans.plan import Plan
from colrow.plans.presets import PRESETS
from colrow.plans.split_share import SplitShare
from colrow.run.decision import decide, errors_found
from colrow.run.forecast_line import Forecast, Gpus, forecast_run, gpus_here, keep_forecast
from colrow.run.kept_proof import KeptProof, dependencies
from colrow.run.run_folder import CHECKPOINTS, changed_keys
from colrow.styles.heads import heads_of
from colrow.train.cuda_graph import check_cuda_graph
from colrow.train.metrics import require_sinks
from colrow.train.objective import auxiliary_weights
from colrow.train.schedule import check_schedule
from colrow.train.weight_decay import decay_by_name

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """What the checks have built and read, for the run to use."""

    source: Source
    plan: Plan
    device_type: str
    changes: list[str]
    """What changed since the run's previous start, `key: before -> now`, and what follows from it."""
    newest: CheckpointInfo | None
    """The newest complete checkpoint in the run's folder."""
    judgement: Judgement | None = None
    """What check and verify said of a plan that was derived here, at the run's batch and sequence length."""

    def finished(self, config: RunConfig) -> bool:
        """Whether all steps are done."""
        return self.newest is not None and self.newest.step >= config.train.steps


def check(config: RunConfig, local_ranks: int | None = None, plan: Plan | None = None) -> Checked:
    """Check everything that needs no other process.

    Args:
        local_ranks: ranks on this host; all of the mesh's unless given.
        plan: what `choose_plan` gave in the launcher; chosen here unless given.

    Raises:
        ConfigError, PlanError, CheckpointError: what is wrong, and how to fix it.
    """
    _ = config.micro_batches  # raises where the global batch does not divide
    check_schedule(config.train)
    require_sinks(config.log)
    device = device_type(config)
    require_devices(config.mesh.world_size if local_ranks is None else local_ranks, device)
    check_cuda_graph(config, device)
    check_data_engine(config)
    newest = Checkpoints(config.run.dir / CHECKPOINTS, keep=config.checkpoint.keep).latest()
    changes = changed_keys(config, newest.step if newest else 0)
    source = build_source(config.model, config.run.seed)
    check_model(config, source)
    decay_by_name(source.model, config.train)  # raises where a pattern of no_decay matches nothing
    source = replace(source, auxiliary=auxiliary_weights(source, config.train.auxiliary_losses))
    if source.auxiliary and config.mesh.pp > 1:
        raise ConfigError(
            f"{source.name} returns losses that are trained ({', '.join(source.auxiliary)}), which a pipeline does not "
            "pass on: set mesh.pp to 1, or train.auxiliary_losses to {}"
        )
    judgement = None
    if plan is None:
        plan, judgement = _judged_plan(config, source.model)
    require_heads(config, source, plan)
    if config.check:
        require_sound(config, source, plan, check_static(source.model, plan, config.mesh.tp, config.data.seq_len))
    else:
        plan.check_shapes(source.model, config.mesh.tp)
        check_sequence(config, plan)
    return Checked(source, plan, device, changes, newest, judgement)


def choose_plan(config: RunConfig, model: nn.Module) -> Plan:
    """The plan that `config.plan` names (a preset, `huggingface`, a derived one, or a file), with `train.fp8` applied.

    Raises:
        ConfigError, PlanError: there is no such plan, or none of its styles can compute in fp8.
    """
    return _judged_plan(config, model)[0]


def _judged_plan(config: RunConfig, model: nn.Module) -> tuple[Plan, Judgement | None]:
    """`choose_plan`, and what a derivation found of its plan: the check need not run again before the ranks start."""
    requests, judgement = config.derive, None
    if config.plan in DERIVED:
        found = derive_judged(
            model,
            config.mesh.tp,
            options=derive_options(config.plan, config.loss, requests.keep_whole, requests.split),
            batch_size=config.train.micro_batch,
            seq_len=config.data.seq_len,
            say=lambda line: print(f"plan       {line}", flush=True),
        )
        plan, judgement = found.plan().made_for(model), found.judgement
    else:
        plan = named_plan(
            config.plan, model, config.mesh.tp, config.loss, keep_whole=requests.keep_whole, split=requests.split
        )
    if config.train.fp8 is None:
        return plan, judgement
    if config.mesh.tp == 1:
        raise ConfigError(
            "train.fp8 applies to the matmuls that tp splits, and mesh.tp is 1: raise it, or leave fp8 out"
        )
    return plan.with_fp8(config.train.fp8), None


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
    builders = [imported(each, "model") for each in (config.model.python, path) if each is not None]
    decision = decide(
        source.model,
        plan,
        config.mesh,
        *ids.shape,
        inputs=(ids.random_(source.vocab_size, generator=torch.Generator().manual_seed(config.run.seed)),),
        name=source.name,
        stop_on_errors=config.check,
        verify=config.verify,
        build_reduced=None if path is None else lambda: built(path, config.run.seed),
        proofs=KeptProof(config.run.dir, cache(lambda: dependencies(config, source.model, plan, *builders))),
        say=lambda line: print(f"verify     {line}", flush=True),
        meanwhile=meanwhile,
        judgement=judgement,
    )
    if not decision.accepted:
        raise PlanError(decision.refusal)
    warnings = [
        f"warning    {f.code} {f.slug} at {f.where}: {f.message}; {f.fix} ({f.page})" for f in decision.findings
    ]
    return warnings + split_lines(config, source, plan, decision.flops_split)


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


def require_sound(config: RunConfig, source: Source, plan: Plan, found: list[Finding]) -> None:
    """Raise a PlanError with every finding when one of them is an error."""
    if refusal := errors_found(found, f"plan {plan.name} for {source.name} at tp={config.mesh.tp}"):
        raise PlanError(refusal)


def check_checkpoint(checked: Checked, tokenizer: Tokenizer) -> None:
    """Raise a CheckpointError when the newest checkpoint is of another model or vocabulary."""
    if checked.newest is None:
        return
    path = checked.newest.path
    manifest = read_manifest(path)
    require_same_model(path, manifest, [signature(model_tensors(checked.source.model))])
    require_same_vocabulary(path, manifest, tokenizer.digest)


def resolve(config: RunConfig) -> RunConfig:
    """`config` with `model.implementation` resolved, the micro-batch that fits, and a Hugging Face folder's tokenizer.

    Raises:
        ConfigError: no micro-batch fits the global batch and the mesh.
    """
    config = fit_micro_batch(config)
    config = config.model_copy(update={"model": resolve_implementation(config.model)})
    tokenizer = config.data.tokenizer
    if config.model.huggingface is None or tokenizer.path is not None or tokenizer.vocab_size is not None:
        return config
    folder = Path(config.model.huggingface)
    if not (folder / "tokenizer.json").exists():
        return config
    own = tokenizer.model_copy(update={"path": folder})
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": own})})


def device_type(config: RunConfig) -> str:
    """`cpu` or `cuda`: as requested; `auto` is cuda where torch sees a GPU.

    Raises:
        ConfigError: cuda is requested and torch sees no GPU.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        reason = "no GPU is visible" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
        raise ConfigError(f"device: cuda is requested, but {reason}: use --device cpu, or install a torch with CUDA")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def require_devices(local_ranks: int, device_type: str) -> None:
    """Raise a ConfigError when this host has fewer GPUs than ranks."""
    if device_type != "cuda":
        return
    gpus = torch.cuda.device_count()
    if local_ranks > gpus:
        raise ConfigError(
            f"{local_ranks} ranks need {local_ranks} GPUs and this host has {gpus}: choose a mesh of {gpus} (such as "
            f"--mesh.tp {gpus}), use several hosts with torchrun, or --device cpu"
        )


def check_model(config: RunConfig, source: Source) -> None:
    """Raise a ConfigError when the sequence or the pipeline does not fit the model."""
    longest = getattr(getattr(source.model, "config", None), "max_position_embeddings", None)
    if isinstance(longest, int) and config.data.seq_len > longest:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is longer than the {longest} positions of {source.name}: "
            f"use {longest} or less"
        )
    if config.mesh.pp > 1:
        check_pipeline(config, len(require_parts(source.model)))


def require_heads(config: RunConfig, source: Source, plan: Plan) -> None:
    """Raise a ConfigError, with the degrees that the complete plan allows, when tp does not divide a preset's heads."""
    heads = heads_of(source.model)
    if heads is None or heads.query % config.mesh.tp == 0 or config.plan not in PRESETS:
        return
    raise ConfigError(
        f"n_heads={heads.query} of {source.name} is not divisible by mesh.tp={config.mesh.tp}: choose tp from "
        f"{', '.join(map(str, plan_degrees(source.model, plan)))}"
    )


def runs_on(mesh: Mesh, config: RunConfig, checked: Checked) -> bool:
    """Whether the checked model and plan, and the config's batch, run on another mesh."""
    other = config.model_copy(update={"mesh": mesh})
    try:
        check_model(fit_micro_batch(other), checked.source)
        check_sequence(other, checked.plan)
        return mesh.tp in plan_degrees(checked.source.model, checked.plan)
    except (ConfigError, PlanError):
        return False


def check_sequence(config: RunConfig, plan: Plan) -> None:
    """Raise a ConfigError when tp does not divide the sequence that the plan splits over it."""
    seq_len, tp = config.data.seq_len, config.mesh.tp
    if plan.sequence_parallel() and seq_len % tp:
        below = seq_len // tp * tp
        raise ConfigError(
            f"seq_len={seq_len} is not divisible by tp={tp} (sequence parallel splits dim 1): use "
            f"{f'{below} or ' if below else ''}{below + tp}"
        )


def threads_for(ranks: int) -> int:
    """CPU threads for each of `ranks` ranks on this host."""
    return max(1, usable_cores() // ranks)
