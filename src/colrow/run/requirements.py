"""What a run requires of its config, alone, with its model, and with its plan; and advice that is tried against all."""

from __future__ import annotations

from dataclasses import replace

import torch

from colrow.checking.check import check_static
from colrow.checking.degrees import plan_degrees
from colrow.config import RunConfig
from colrow.dryrun.calls import most_positions
from colrow.errors import ColrowError, ConfigError, PlanError, advice
from colrow.mesh import Mesh
from colrow.models.build import Source, build_source
from colrow.parallel.data_parallel import refuse_scalars
from colrow.parallel.flat_weights import check_data_engine
from colrow.parallel.pipeline_split import check_pipeline, fit_micro_batch, require_parts
from colrow.plans.derive_options import DERIVED
from colrow.plans.named import derive_options, named_plan
from colrow.plans.plan import Plan
from colrow.plans.presets import PRESETS
from colrow.run.decision import errors_found
from colrow.styles.heads import heads_of
from colrow.train.cuda_graph import check_cuda_graph
from colrow.train.objective import auxiliary_weights
from colrow.train.schedule import check_schedule

_SHOWN = 8  # changes that one refusal names
_FAULTS = 9  # faults that are followed, each with the first change that was tried for the one before it


def check_alone(config: RunConfig, local_ranks: int | None = None) -> str:
    """Check what needs no model. Returns `cpu` or `cuda`.

    Args:
        local_ranks: ranks on this host; all of the mesh's unless given.

    Raises:
        ConfigError: what is wrong, and changes that end it.
    """
    _ = config.micro_batches  # raises where the global batch does not divide
    check_schedule(config.train)
    device = device_type(config)
    require_devices(config, config.mesh.world_size if local_ranks is None else local_ranks, device)
    check_cuda_graph(config, device)
    check_data_engine(config)
    carriers = [key for key in ("gather", "exchange") if getattr(config.fsdp, key) == "copy_engine"]
    if carriers and device == "cpu":
        raise ConfigError(
            f"fsdp.{carriers[0]}: copy_engine needs GPUs, and the device is cpu",
            {f"fsdp.{key}": "collectives" for key in carriers},
        )
    if config.loss == "linear" and config.plan == "derive":
        raise ConfigError(
            "loss linear is derived with fast styles only, and plan derive has plain ones",
            {"plan": "derive-fast"},
            {"plan": "llama-fast"},
            {"loss": None},
        )
    return device


def check_with_model(config: RunConfig, source: Source) -> None:
    """Raise a ConfigError where the model has nothing to train, or sequence, pipeline or data axes do not fit it."""
    if not any(param.requires_grad for param in source.model.parameters()):
        raise ConfigError(
            f"every parameter of {source.name} is frozen: call requires_grad_(True) where it is built, after a merge "
            "of adapters too"
        )
    longest = most_positions(source.model)
    if longest is not None and config.data.seq_len > longest:
        divided = longest // config.mesh.tp * config.mesh.tp
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is longer than the {longest} positions of {source.name}",
            *({"data.seq_len": n} for n in dict.fromkeys((longest, divided)) if n),
        )
    if config.mesh.pp > 1:
        check_pipeline(config, len(require_parts(source.model)))
        given = config.train.auxiliary_losses
        if losses := source.auxiliary if given is None else given:
            raise ConfigError(
                f"{source.name} returns losses that are trained ({', '.join(losses)}), which a pipeline does "
                "not pass on",
                {"mesh.pp": 1},
                {"train.auxiliary_losses": {}},
            )
    if config.mesh.dp > 1 and not config.mesh.is_flat:
        refuse_scalars(source.model)


def check_with_plan(config: RunConfig, source: Source, plan: Plan) -> None:
    """Check names, sizes, loss and sequence of a plan, without running anything.

    Raises:
        ConfigError: a preset, and tp does not divide the heads; the degrees are those that the complete plan allows.
        PlanError: every finding, when one of them is an error.
    """
    tp = config.mesh.tp
    heads = heads_of(source.model)
    if heads is not None and heads.query % tp and config.plan in PRESETS:
        degrees = plan_degrees(source.model, plan)
        if tp not in degrees:  # a preset may replicate attention
            raise ConfigError(
                f"n_heads={heads.query} of {source.name} is not divisible by mesh.tp={tp}",
                *({"mesh.tp": n} for n in degrees),
            )
    if config.check:
        found = check_static(source.model, plan, tp, config.data.seq_len)
        if refusal := errors_found(found, f"plan {plan.name} for {source.name} at tp={tp}"):
            raise PlanError(refusal)
    else:
        plan.check_shapes(source.model, tp)
        check_sequence(config, plan)


def check_sequence(config: RunConfig, plan: Plan) -> None:
    """Raise a ConfigError when tp does not divide the sequence that the plan splits over it."""
    tp, seq_len = config.mesh.tp, config.data.seq_len
    if (misfit := plan.sequence_misfit(tp, seq_len)) is not None:
        below = seq_len // tp * tp
        raise ConfigError(misfit[0], *({"data.seq_len": n} for n in (below, below + tp) if n))


def with_fp8(config: RunConfig, plan: Plan) -> Plan:
    """The plan with `train.fp8` applied. Raises a ConfigError where nothing of the run can compute so."""
    if config.train.fp8 is None:
        return plan
    if config.mesh.tp == 1 and config.mesh.dp == 1:
        raise ConfigError(
            f"train.fp8 is for meshes with tp or data axes, and the mesh is {config.mesh}",
            {"mesh.tp": 2},
            {"train.fp8": None},
        )
    try:
        return plan.with_fp8(config.train.fp8)
    except PlanError as error:
        fast = {"plan": "llama-fast"} if config.plan in PRESETS else {"plan": "derive-fast"}
        raise ConfigError(f"plan {plan.name} has no style with the option fp8", fast, {"train.fp8": None}) from error


def with_tried_advice(error: ConfigError, config: RunConfig, local_ranks: int | None = None) -> ConfigError:
    """The error with only those of its changes that make the config run, as far as can be known without a process.

    Where none does, because something else is wrong too: the error with its first change, and the next fault with the
    changes that end it once the first change is made.
    """
    if not error.changes:
        return error
    try:
        source = build_source(config.model, config.run.seed)
        # pipelines alone are refused for them, and to know them takes a forward of a reduced model
        source = replace(source, auxiliary=auxiliary_weights(source, None) if config.mesh.pp > 1 else {})
    except Exception:  # the model cannot be built: a start with this error corrected will say so
        return error
    return _tried(error, config, source, local_ranks, _FAULTS)


def _tried(error: ConfigError, config: RunConfig, source: Source, local_ranks: int | None, faults: int) -> ConfigError:
    """`with_tried_advice` for a model that is built; `faults`: how many faults may still be followed."""
    running, refused = [], []
    for change in error.changes:
        changed = config.with_values(change)
        if (next_error := refusal(changed, source, local_ranks=local_ranks)) is None:
            running.append(change)
        else:
            refused.append((change, changed, next_error))
    if running or not refused:
        return ConfigError(error.message, *running[:_SHOWN])
    change, changed, further = refused[0]
    if isinstance(further, ConfigError) and faults > 1:
        further = _tried(further, changed, source, local_ranks, faults - 1)
        alone = [c for c in further.changes if refusal(config.with_values(c), source, local_ranks=local_ranks) is None]
        if alone:  # changes for the second fault that end the first one too: no need to name that
            return ConfigError(further.message, *alone)
    return ConfigError(f"{error.message}: {advice([change])}\n{further}")


def refusal(
    config: RunConfig, source: Source, plan: Plan | None = None, *, local_ranks: int | None = None
) -> ColrowError | None:
    """Why the config cannot run, as far as can be known without a process; None where nothing is wrong.

    Args:
        plan: of the run; without, the one that the config names. One that is to be derived is taken to fit.
    """
    try:
        config = fit_micro_batch(config)
        check_alone(config, local_ranks)
        check_with_model(config, source)
        if plan is None and config.plan in DERIVED:
            derive_options(config.plan, config.loss).check()
            return None
        if plan is None:
            plan = named_plan(config.plan, source.model, config.mesh.tp, config.loss, config.derive)
        check_with_plan(config, source, with_fp8(config, plan))
    except ColrowError as error:
        return error
    return None


def runs_on(source: Source, plan: Plan, config: RunConfig, mesh: Mesh) -> bool:
    """Whether the model and the plan, and the config's batch, run on another mesh."""
    return refusal(config.model_copy(update={"mesh": mesh}), source, plan, local_ranks=1) is None


def device_type(config: RunConfig) -> str:
    """`cpu` or `cuda`: as requested; `auto` is cuda where torch sees a GPU.

    Raises:
        ConfigError: cuda is requested and torch sees no GPU.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        reason = "no GPU is visible" if torch.version.cuda or torch.version.hip else "this torch is built without CUDA"
        raise ConfigError(f"device: cuda is requested, but {reason}: use --device cpu, or install a torch with CUDA")
    return "cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu"


def require_devices(config: RunConfig, local_ranks: int, device_type: str) -> None:
    """Raise a ConfigError when this host has fewer GPUs than ranks."""
    if device_type != "cuda":
        return
    gpus = torch.cuda.device_count()
    if local_ranks > gpus:
        smaller = [
            {f"mesh.{axis}": n}
            for axis, degree in config.mesh.by_axis.items()
            for n in range(degree - 1, 0, -1)
            if config.mesh.world_size // degree * n <= gpus
        ]
        raise ConfigError(
            f"{local_ranks} ranks need {local_ranks} GPUs and this host has {gpus} (several hosts: start colrow with "
            "torchrun)",
            *smaller,
            {"device": "cpu"},
        )
