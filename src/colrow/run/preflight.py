"""What can be found to be wrong before any process starts; and the model and plan that a run is going to use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.folder import CheckpointInfo, newest_complete
from colrow.checkpoint.huggingface import require_weights
from colrow.checkpoint.loading import require_same_model, require_same_vocabulary, signature
from colrow.checkpoint.manifest import EXTRA, JSON, read_json, read_manifest
from colrow.checkpoint.state import model_tensors, require_storable
from colrow.config import RunConfig
from colrow.data.encode import usable_cores
from colrow.data.tokenizer import Tokenizer, holds_tokenizer
from colrow.derive.judged import Judgement, derive_judged
from colrow.errors import CheckpointError, ConfigError, DataError
from colrow.models.build import Source, build_source, built, resolve_implementation
from colrow.parallel.pipeline_split import fit_micro_batch
from colrow.plans.derive_options import DERIVED
from colrow.plans.named import derive_options, named_plan
from colrow.plans.plan import Plan
from colrow.run.decision import is_own
from colrow.run.kept_proof import builders_of, dependencies
from colrow.run.kept_start import FILE, KeptStart
from colrow.run.requirements import check_alone, check_with_model, check_with_plan, with_fp8, with_tried_advice
from colrow.run.run_folder import CHECKPOINTS, TOKENIZER, changed_keys
from colrow.train.causality import require_causal
from colrow.train.metrics import require_sinks
from colrow.train.objective import auxiliary_weights
from colrow.train.weight_decay import decay_by_name
from colrow.verifying.stages import refuse_unequal_stages


@dataclass(frozen=True)
class Checked:
    """What the checks have built and read, for the run to use."""

    source: Source
    plan: Plan
    device_type: str
    changes: list[str]
    """What changed since the run's previous start, `key: before -> now`, and what follows from it."""
    stored: list[CheckpointInfo]
    """The checkpoints in the run's folder, the oldest first."""
    judgement: Judgement | None = None
    """What check and verify found in a plan that was derived here, at the run's batch and sequence length."""

    @property
    def newest(self) -> CheckpointInfo | None:
        """The newest complete checkpoint."""
        return newest_complete(self.stored)

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
    require_sinks(config.log)
    try:
        return _checked(config, local_ranks, plan)
    except ConfigError as error:
        raise with_tried_advice(error, config, local_ranks) from error


def _checked(config: RunConfig, local_ranks: int | None, plan: Plan | None) -> Checked:
    """`check`, with errors whose advice has not been tried."""
    device = check_alone(config, local_ranks)
    stored = Checkpoints(config.run.dir / CHECKPOINTS).list()
    newest = _newest_checkpoint(config, stored)
    changes = changed_keys(config, newest.step if newest else 0)
    source = build_source(config.model, config.run.seed)
    source = replace(source, auxiliary=auxiliary_weights(source, config.train.auxiliary_losses))
    check_with_model(config, source)
    if source.weights == "folder" and source.folder is not None:
        require_weights(source.model, source.folder)
    require_storable(source.model)
    if newest is not None:
        require_same_model(newest.path, read_manifest(newest.path), [signature(model_tensors(source.model))])
    decay_by_name(source.model, config.train)  # raises where a pattern of no_decay matches nothing
    judgement = None
    if plan is None:
        # A launcher that hands over a plan has looked at both: whether the model is causal, and its pipeline stages.
        require_causal(source)
        plan, judgement = _judged_plan(config, source.model, keep=True)
        _check_stages(config, source)
    check_with_plan(config, source, plan)
    return Checked(source, plan, device, changes, stored, judgement)


def _newest_checkpoint(config: RunConfig, stored: list[CheckpointInfo]) -> CheckpointInfo | None:
    """Raises CheckpointError where there are only damaged ones: the run would begin again, and save over them."""
    newest = newest_complete(stored)
    if newest is None and (damaged := [info for info in stored if info.state == "damaged"]):
        raise CheckpointError(
            f"{config.run.dir} has no complete checkpoint, and {damaged[-1].path.name} is damaged "
            f"({damaged[-1].reason}): set run.dir to another folder, or move {config.run.dir / CHECKPOINTS} away to "
            "start again"
        )
    return newest


def _check_stages(config: RunConfig, source: Source) -> None:
    """Raise a ConfigError where the stages of a model that is not the project's own do not compute the model."""
    if config.mesh.pp > 1 and config.verify != "never" and not is_own(source.model):
        path = config.model.reduced
        refuse_unequal_stages(source.model if path is None else built(path, config.run.seed), seed=config.run.seed)


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
    judgement = None
    if config.plan in DERIVED and (text := kept_plan(config, model).find()) is not None:
        print("plan       derived at an earlier start: nothing that it depends on has changed", flush=True)
        plan = Plan.from_yaml(text, FILE)
    elif config.plan in DERIVED:
        found = derive_judged(
            model,
            config.mesh.tp,
            options=derive_options(config.plan, config.loss, config.derive),
            batch_size=config.train.micro_batch,
            seq_len=config.data.seq_len,
            say=lambda line: print(f"plan       {line}", flush=True),
        )
        plan, judgement = found.plan().made_for(model), found.judgement
        if keep:
            kept_plan(config, model).keep(plan.to_yaml())
    else:
        plan = named_plan(config.plan, model, config.mesh.tp, config.loss, config.derive)
    # a judgement is of the plan without fp8, which computes something else
    return with_fp8(config, plan), None if config.train.fp8 else judgement


def kept_plan(config: RunConfig, model: nn.Module) -> KeptStart:
    """The place of a derived plan, as it is before `train.fp8`."""
    return KeptStart(config.run.dir, "plan", lambda: dependencies(config, model, None, *builders_of(config)))


def require_same_text(config: RunConfig, extra: Mapping[str, JSON], fingerprint: str) -> None:
    """Raise a DataError when a checkpoint with this `extra` was trained on a corpus with another fingerprint."""
    if extra.get("corpus") != fingerprint:
        raise DataError(
            f"corpus {config.data.corpus!r} holds other text than when the run in {config.run.dir} began: restore the "
            "previous text, or set run.dir to another folder to start a new run"
        )


def require_text_of(checked: Checked, config: RunConfig, fingerprint: str) -> None:
    """`require_same_text` for the newest checkpoint, before that text is tokenized."""
    if checked.newest is not None and isinstance(extra := read_json(checked.newest.path / EXTRA), dict):
        require_same_text(config, extra, fingerprint)


def require_vocabulary_of(checked: Checked, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise a CheckpointError when the newest checkpoint is of another vocabulary."""
    if checked.newest is not None:
        path, kept = checked.newest.path, config.run.dir / TOKENIZER
        fix = f"set data.tokenizer.path to {kept} and data.tokenizer.vocab_size to null" if kept.exists() else None
        require_same_vocabulary(path, read_manifest(path), tokenizer.digest, fix)


def resolve(config: RunConfig) -> RunConfig:
    """`config` with `model.implementation` resolved, the micro-batch that fits, and a Hugging Face folder's tokenizer.

    Raises:
        ConfigError: no micro-batch fits the global batch and the mesh.
    """
    try:
        config = fit_micro_batch(config)
    except ConfigError as error:
        raise with_tried_advice(error, config) from error
    config = config.model_copy(update={"model": resolve_implementation(config.model)})
    tokenizer = config.data.tokenizer
    if config.model.huggingface is None or tokenizer.path is not None or tokenizer.vocab_size is not None:
        return config
    folder = Path(config.model.huggingface)
    if not holds_tokenizer(folder):
        return config
    own = tokenizer.model_copy(update={"path": folder})
    return config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": own})})


def threads_for(ranks: int) -> int:
    """CPU threads for each of `ranks` ranks on this host."""
    return max(1, usable_cores() // ranks)
