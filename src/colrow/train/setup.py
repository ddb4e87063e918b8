"""From a config to a model that trains: the one place that shows the order.

    config -> model on the meta device -> plan -> pipeline stages
           -> tensor parallelism -> activation checkpointing and compile, block by block -> data parallelism
           -> memory -> weights -> optimizer

Each comes before the next for a reason. Stages are cut while a copy costs nothing. The plan goes next because styles
look for the model's own modules, and what follows has to repeat, or trace, the plan's collectives. Selective
checkpointing chooses among operations, so compile traces it; full checkpointing runs the compiled block again. FSDP2's
hooks stay outside both. Memory is taken when every parameter has its final placement, so that no rank ever holds the
whole model; and the optimizer sees the parameters that training changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.config import RunConfig
from colrow.data.loader import check_batch
from colrow.models.blocks import blocks_of
from colrow.models.build import Source
from colrow.ops.ran import forget
from colrow.parallel.activation_checkpoint import apply_activation_checkpoint
from colrow.parallel.compute_weights import ComputeWeights
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.initialize import fill_seeded, materialize
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import norm_groups
from colrow.train.compile import compile_forward
from colrow.train.cuda_graph import EAGER_STEPS, Replayed, check_cuda_graph
from colrow.train.optimizer import build_optimizer
from colrow.train.step import PipelinedModel, Step, WholeModel, mean_cross_entropy


@dataclass(frozen=True)
class Training:
    """A model that is ready to train, on this rank's part of the mesh."""

    modules: list[nn.Module]
    """The model, or this rank's pipeline stages of it."""
    source: Source
    plan: Plan
    mesh: DeviceMesh
    device: torch.device
    compute: torch.dtype
    compiled: bool
    step: Step
    parameters: int
    """Of the whole model."""
    tied: dict[str, str] = field(default_factory=dict)
    """Parameters here that are copies of another stage's, by the original's name."""
    graphs: tuple[Replayed, ...] = ()
    """With `train.cuda_graph`: forward and backward of a micro-batch, and the update."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.step.optimizer

    def close(self) -> None:
        """Before the process group ends, which would wait for the graphs."""
        for graph in self.graphs:
            graph.close()


def set_up(config: RunConfig, mesh: DeviceMesh, device: torch.device, source: Source, plan: Plan) -> Training:
    """The training of `config` on this rank. Collective over the mesh.

    Args:
        source: the model of `config.model`; it is changed.
        plan: the plan of `config.plan` for that model (`preflight.choose_plan`).

    Raises:
        ConfigError, PlanError: something does not fit; `preflight.check` finds the same without processes.
    """
    check_cuda_graph(config, device.type)
    forget()
    compute, compiled = compute_dtype(config, device), compiles(config, device)
    copies = computes_with_copies(config, compute)
    parameters = sum(param.numel() for param in source.model.parameters())

    def prepare(model: nn.Module, blocks: list[nn.Module], absent: Iterable[str] = ()) -> None:
        if source.weights == "built":
            materialize(model, device)
        parallelize(model, plan, mesh, absent=absent)
        recompute = config.train.activation_checkpoint
        if recompute == "selective":
            apply_activation_checkpoint(blocks, recompute)
        if compiled:
            for block in blocks:
                compile_forward(block)
        if recompute == "full":
            apply_activation_checkpoint(blocks, recompute)
        if not copies:
            apply_data_parallel(
                model,
                mesh,
                blocks,
                param_dtype=None if compute == torch.float32 else compute,
                reshard_after_forward=config.fsdp.reshard_after_forward,
            )
        materialize(model, device)
        fill(model, source, config.run.seed)

    if config.mesh.pp == 1:
        prepare(source.model, blocks_of(source.model))
        weights = ComputeWeights(source.model, compute, replayed=config.train.cuda_graph) if copies else None
        whole = WholeModel(source.model, plan, mesh, device, weights)
        params = list(source.model.parameters())
        step = build_step(config, mesh, whole, params, params, weights)
        graphs = capture(config, whole, step) if config.train.cuda_graph else ()
        return Training([source.model], source, plan, mesh, device, compute, compiled, step, parameters, graphs=graphs)

    # torch's pipelining imports the compiler, which takes seconds that other meshes need not wait
    from colrow.parallel.pipeline import build_pipeline
    from colrow.parallel.pipeline_stage import Stage

    def prepare_stage(stage: Stage) -> None:
        prepare(stage.module, stage.blocks, stage.absent)

    train = config.train
    runner = build_pipeline(
        source.model,
        plan,
        mesh,
        mean_cross_entropy,
        config.pipeline,
        prepare_stage,
        micro_batches=check_batch(train.global_batch, train.micro_batch, config.mesh.dp),
        micro_batch=train.micro_batch,
        seq_len=config.data.seq_len,
        dtype=compute,
    )
    stages = [stage.module for stage in runner.stages]
    tied = {copy: original for stage in runner.stages for copy, original in stage.copies.items()}
    pipeline = PipelinedModel(runner, stages, device)
    step = build_step(config, mesh, pipeline, list(runner.parameters()), list(runner.counted_parameters()))
    return Training(stages, source, plan, mesh, device, compute, compiled, step, parameters, tied)


def build_step(
    config: RunConfig,
    mesh: DeviceMesh,
    forward_backward: WholeModel | PipelinedModel,
    params: list[nn.Parameter],
    counted: list[nn.Parameter],
    weights: ComputeWeights | None = None,
) -> Step:
    """The optimizer over `params`, and the step that runs it; `counted` are those that the gradient's norm sums."""
    trainable = [param for param in params if param.requires_grad]
    return Step(
        forward_backward=forward_backward,
        params=trainable,
        counted=[param for param in counted if param.requires_grad],
        optimizer=build_optimizer(trainable, config.train),
        norm_groups=norm_groups(mesh),
        section=config.train,
        weights=weights,
    )


def capture(config: RunConfig, whole: WholeModel, step: Step) -> tuple[Replayed, ...]:
    """Let two CUDA graphs do the work of a step, once its first runs are over: see [Note: captured]."""
    train = config.train
    accumulate = check_batch(train.global_batch, train.micro_batch, config.mesh.dp)
    whole.micro_batch = forward_backward = Replayed(whole.micro_batch, EAGER_STEPS * accumulate)
    step.update = update = Replayed(step.update, EAGER_STEPS)
    return forward_backward, update


def compute_dtype(config: RunConfig, device: torch.device) -> torch.dtype:
    """What the model computes in; weights, gradients' reduction and the optimizer are fp32 always."""
    if config.train.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.train.precision == "bf16" else torch.float32


def computes_with_copies(config: RunConfig, compute: torch.dtype) -> bool:
    """Whether the compute precision is `ComputeWeights`' affair, and not FSDP2's: where there is nothing to shard."""
    return config.train.cuda_graph or (compute != torch.float32 and config.mesh.world_size == config.mesh.tp)


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: as asked, else on GPUs."""
    return device.type == "cuda" if config.train.compile is None else config.train.compile


def fill(model: nn.Module, source: Source, seed: int) -> None:
    """Bring the weights of the model, or of a stage of it, in: each rank its own part."""
    if source.weights == "seeded":
        fill_seeded(model, seed)
    elif source.weights == "folder":
        from colrow.checkpoint.huggingface import load_weights

        assert source.folder is not None
        load_weights(model, source.folder)
