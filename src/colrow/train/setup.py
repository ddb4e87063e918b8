"""From a config to a model that trains: the one place that shows the order.

    config -> model on the meta device -> plan -> checks
           -> tensor parallelism -> activation checkpointing -> compile, block by block -> data parallelism
           -> memory -> weights -> optimizer

Each comes before the next for a reason. The plan goes first because styles look for the model's own modules.
Checkpointing wraps a block whose collectives are in place, so that recomputation repeats them; compile traces what
checkpointing wraps; FSDP2's hooks stay outside the compiled graph. Memory is taken when every parameter has its final
placement, so that no rank ever holds the whole model; and the optimizer sees the parameters that training changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.checkpoint.weights import fill_seeded, materialize
from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.plans.presets import PRESETS
from colrow.train.optimizer import build_optimizer
from colrow.train.source import Source, build_source
from colrow.train.step import ForwardBackward, Step, WholeModel

NORM_AXES = ("pp", "dp_shard", "tp")


@dataclass(frozen=True)
class Training:
    """A model that is ready to train, on this rank's part of the mesh."""

    model: nn.Module
    source: Source
    plan: Plan
    mesh: DeviceMesh
    device: torch.device
    precision: str
    compiled: bool
    step: Step
    optimizer: torch.optim.Optimizer

    @property
    def forward_backward(self) -> ForwardBackward:
        return self.step.forward_backward


def set_up(config: RunConfig, mesh: DeviceMesh, device: torch.device) -> Training:
    """The training of `config` on this rank. Collective over the mesh.

    Raises:
        ConfigError, PlanError: something does not fit; `preflight.check` finds the same without processes.
    """
    source = build_source(config.model, config.run.seed)
    model, plan = source.model, choose_plan(config, source.model)
    compute = compute_dtype(config, device)
    compiled = compiles(config, device)

    if source.weights == "built":
        materialize(model, device)
    parallelize(model, plan, mesh)
    blocks = blocks_of(model)
    if config.train.activation_checkpoint != "none":
        from colrow.parallel.activation_checkpoint import apply_activation_checkpoint

        apply_activation_checkpoint(model, config.train.activation_checkpoint)
        blocks = blocks_of(model)
    if compiled:
        for block in blocks:
            compile_forward(block)
    apply_data_parallel(
        model,
        mesh,
        blocks,
        param_dtype=None if compute == torch.float32 else compute,
        reshard_after_forward=reshards(config),
    )
    materialize(model, device)
    fill(source, config.run.seed)

    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = build_optimizer(params, config.train)
    step = Step(
        forward_backward=WholeModel(model, plan, mesh, device),
        params=params,
        optimizer=optimizer,
        norm_groups=[mesh[axis].get_group() for axis in NORM_AXES if mesh[axis].size() > 1],
        section=config.train,
    )
    return Training(model, source, plan, mesh, device, precision_name(compute), compiled, step, optimizer)


def choose_plan(config: RunConfig, model: nn.Module) -> Plan:
    """The plan that `config.plan` names: a preset, `huggingface`, `derive`, or a file."""
    if config.plan in PRESETS:
        return Plan.preset(config.plan, config.loss or "vocab_parallel")
    if config.plan in ("huggingface", "derive"):
        make = getattr(Plan, {"huggingface": "from_huggingface", "derive": "derive"}[config.plan], None)
        if make is None:
            raise ConfigError(f"plan: {config.plan} is not there yet: choose from {', '.join(PRESETS)}, or a file")
        plan: Plan = make(model) if config.plan == "huggingface" else make(model, tp=config.mesh.tp)
        return plan
    if not Path(config.plan).exists():
        raise ConfigError(
            f"plan: there is no preset and no file {config.plan!r}: choose from {', '.join(PRESETS)}, huggingface, "
            "derive, or give the path of a plan's YAML"
        )
    plan = Plan.load(config.plan)
    if config.loss is not None and config.loss != plan.loss:
        raise ConfigError(
            f"loss: {config.loss} is asked for, but the plan {config.plan} says {plan.loss}, which its head's style "
            "belongs to: leave loss out, or change both in the plan"
        )
    return plan


def compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What the model computes in; weights, gradients' reduction and the optimizer are fp32 always."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def precision_name(compute: torch.dtype) -> str:
    return "fp32" if compute == torch.float32 else "bf16 compute, fp32 weights and gradient reduction"


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: as asked, else on GPUs."""
    return device.type == "cuda" if config.train.compile is None else config.train.compile


def reshards(config: RunConfig) -> bool:
    """Whether FSDP frees gathered parameters after a block's forward: as asked, else where they are sharded and no
    pipeline would gather them again for each micro-batch."""
    asked = config.fsdp.reshard_after_forward
    return config.mesh.dp_shard > 1 and config.mesh.pp == 1 if asked is None else asked


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers whose parameters are gathered together: the entries of the longest ModuleList."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=None)
    return [] if longest is None else [block for block in longest if block is not None]


def compile_forward(block: nn.Module) -> None:
    """Compile a block's forward in place: its name in the model stays, and hooks on the block run outside."""
    block.forward = torch.compile(block.forward, fullgraph=True)  # type: ignore[method-assign]


def fill(source: Source, seed: int) -> None:
    """Bring the weights in, each rank its own part."""
    if source.weights == "seeded":
        fill_seeded(source.model, seed)
    elif source.weights == "folder":
        from colrow.checkpoint.huggingface import load_weights

        assert source.folder is not None
        load_weights(source.model, source.folder)
