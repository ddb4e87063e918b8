"""What can be found to be wrong before any process starts; and the model and plan that a run is going to use."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from colrow.checking.check import Finding, check_static
from colrow.checking.degrees import plan_degrees
from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.folder import CheckpointInfo
from colrow.checkpoint.huggingface import require_weights
from colrow.checkpoint.loading import require_same_model, require_same_vocabulary, signature
from colrow.checkpoint.manifest import read_manifest
from colrow.checkpoint.state import model_tensors, require_storable
from colrow.config import RunConfig
from colrow.data.encode import usable_cores
from colrow.data.tokenizer import Tokenizer
from colrow.derive.judged import Judgement, derive_judged
from colrow.errors import ConfigError, PlanError
from colrow.mesh import Mesh
from colrow.models.build import Source, build_source, resolve_implementation
from colrow.parallel.data_parallel import refuse_scalars
from colrow.parallel.flat_weights import check_data_engine
from colrow.parallel.pipeline_split import check_pipeline, fit_micro_batch, require_parts
from colrow.plans.derive_options import DERIVED
from colrow.plans.named import derive_options, named_plan
from colrow.plans.plan import Plan
from colrow.plans.presets import PRESETS
from colrow.run.decision import errors_found
from colrow.run.kept_proof import builders_of, dependencies
from colrow.run.kept_start import FILE, KeptStart
from colrow.run.run_folder import CHECKPOINTS, changed_keys
from colrow.styles.heads import heads_of
from colrow.train.cuda_graph import check_cuda_graph
from colrow.train.metrics import require_sinks
from colrow.train.objective import auxiliary_weights
from colrow.train.schedule import check_schedule
from colrow.train.weight_decay import decay_by_name


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
    """What check and verify found in a plan that was derived here, at the run's batch and sequence length."""

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
    if source.weights == "folder" and source.folder is not None:
        require_weights(source.model, source.folder)
    require_storable(source.model)
    decay_by_name(source.model, config.train)  # raises where a pattern of no_decay matches nothing
    source = replace(source, auxiliary=auxiliary_weights(source, config.train.auxiliary_losses))
    if source.auxiliary and config.mesh.pp > 1:
        raise ConfigError(
            f"{source.name} returns losses that are trained ({', '.join(source.auxiliary)}), which a pipeline does not "
            "pass on: set mesh.pp to 1, or train.auxiliary_losses to {}"
        )
    if config.mesh.dp > 1 and not config.mesh.is_flat:
        refuse_scalars(source.model)
    judgement = None
    if plan is None:
        plan, judgement = _judged_plan(config, source.model, keep=True)
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


def _judged_plan(config: RunConfig, model: nn.Module, *, keep: bool = False) -> tuple[Plan, Judgement | None]:
    """`choose_plan`, and what a derivation found of its plan: the check need not run again before the ranks start.

    Args:
        keep: leave a derived plan in the run's folder, for the next start.
    """
    requests, judgement = config.derive, None
    if config.plan in DERIVED and (text := kept_plan(config, model).find()) is not None:
        print("plan       derived at an earlier start: nothing that it depends on has changed", flush=True)
        plan = Plan.from_yaml(text, FILE)
    elif config.plan in DERIVED:
        found = derive_judged(
            model,
            config.mesh.tp,
            options=derive_options(config.plan, config.loss, requests.keep_whole, requests.split),
            batch_size=config.train.micro_batch,
            seq_len=config.data.seq_len,
            say=lambda line: print(f"plan       {line}", flush=True),
        )
        plan, judgement = found.plan().made_for(model), found.judgement
        if keep:
            kept_plan(config, model).keep(plan.to_yaml())
    else:
        plan = named_plan(
            config.plan, model, config.mesh.tp, config.loss, keep_whole=requests.keep_whole, split=requests.split
        )
    if config.train.fp8 is None:
        return plan, judgement
    if config.mesh.tp == 1 and config.mesh.dp == 1:
        raise ConfigError(
            f"train.fp8 is for meshes with tp or data axes, and the mesh is {config.mesh}: add ranks, or leave fp8 out"
        )
    return plan.with_fp8(config.train.fp8), None


def kept_plan(config: RunConfig, model: nn.Module) -> KeptStart:
    """The place of a derived plan, as it is before `train.fp8`."""
    return KeptStart(config.run.dir, "plan", lambda: dependencies(config, model, None, *builders_of(config)))


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
    if (misfit := plan.sequence_misfit(config.mesh.tp, config.data.seq_len)) is not None:
        raise ConfigError(": ".join(misfit))


def threads_for(ranks: int) -> int:
    """CPU threads for each of `ranks` ranks on this host."""
    return max(1, usable_cores() // ranks)
