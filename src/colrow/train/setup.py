"""From a model and a plan to a training: the one place that shows the order.

[Note: order of wrapping]

    stages -> plan (tp) -> random draws -> selective checkpointing -> compile -> full checkpointing -> FSDP2 (dp)
           -> memory -> weights -> optimizer

- Stages first, on the meta device, where a copy of the model costs nothing.
- The plan next: its styles look for the model's own modules, and what comes later has to repeat (recomputation) or
  trace (compile) the plan's collectives.
- Draws of random numbers on shards where the shards are known, and before what runs a forward again or traces it.
- Selective checkpointing before compile: it chooses among operations, so the compiler must trace the choice.
- Full checkpointing after compile: it runs the compiled block again. Inside a graph, torch 2.13 cannot order what
  backward needs when attention is recomputed.
- FSDP2 outside both: its hooks gather a block's parameters before the forward that is compiled or run again. Those of
  `mesh.data_engine: flat` are set last, on the final memory.
- Memory when every parameter has its final placements, so that no rank ever holds the unsharded model; then weights,
  each rank its own shards; then the optimizer, which takes the parameters' placements for its state.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from colrow.config import RunConfig
from colrow.dryrun.random_draws import RandomDraws, model_draws, random_draws
from colrow.errors import ConfigError
from colrow.mesh import MeshAxes
from colrow.models.build import Source
from colrow.ops.execution_record import clear
from colrow.parallel.activation_checkpoint import Mode, apply_activation_checkpoint
from colrow.parallel.compile import compile_forward
from colrow.parallel.compute_weights import ComputeWeights
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.data_shards import shard_over_data
from colrow.parallel.flat_weights import FlatWeights, check_data_engine
from colrow.parallel.initialize import fill_seeded, materialize
from colrow.parallel.parallelize import parallelize
from colrow.parallel.pipeline_split import first_layers
from colrow.parallel.pipeline_stage import Stage, split_stages
from colrow.parallel.precision import Precision, choose_precision
from colrow.parallel.random_draws import arrange_draws
from colrow.parallel.random_state import Generators, MicroBatchSeeds
from colrow.parallel.weight_copies import WeightCopies
from colrow.plans.plan import Plan
from colrow.torch_compat import fsdp_units, seed_dtensors
from colrow.train.buffers import WrittenBuffers
from colrow.train.corruption import CorruptionCheck, KeptState
from colrow.train.cuda_graph import (
    EAGER_STEPS,
    MEASURED_STEPS,
    GraphChoice,
    GraphedFunction,
    can_be_captured,
    check_cuda_graph,
    check_draws,
)
from colrow.train.forward_writes import refuse_forward_writes
from colrow.train.optimizer import build_optimizer
from colrow.train.replay import StepReplay
from colrow.train.step import ForwardBackward, PipelinedModel, SingleStageModel, Step, mean_cross_entropy
from colrow.train.weight_decay import ParameterCounts, count_parameters, decay_by_name, decaying_parameters


@dataclass(frozen=True)
class Training:
    """A model that is ready to train, as this rank holds it."""

    stages: list[Stage]
    source: Source
    plan: Plan
    mesh: DeviceMesh
    device: torch.device
    precision: Precision
    compiled: bool
    step: Step
    counts: ParameterCounts
    graphs: tuple[GraphedFunction, ...] = ()
    """With `train.cuda_graph`: forward and backward of a micro-batch, and the update."""
    draws: RandomDraws = field(default_factory=RandomDraws)
    eager_steps: int = EAGER_STEPS
    """Steps before the one that captures `graphs`, or does not."""

    @property
    def captured(self) -> bool:
        """Whether steps are replayed."""
        return bool(self.graphs) and all(graph.captured for graph in self.graphs)

    @property
    def modules(self) -> list[nn.Module]:
        """The model, or this rank's pipeline stages of it."""
        return [stage.module for stage in self.stages]

    @property
    def tied(self) -> dict[str, str]:
        """Parameters here that are copies of another stage's, to the original's name."""
        return {copy: original for stage in self.stages for copy, original in stage.copies.items()}

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.step.optimizer

    def close(self) -> None:
        """Call before the process group is destroyed, which would wait for the graphs."""
        for graph in self.graphs:
            graph.close()


def set_up(config: RunConfig, mesh: DeviceMesh, device: torch.device, source: Source, plan: Plan) -> Training:
    """The training of `config` on this rank, in the order of [Note: order of wrapping]. Collective over the mesh.

    Args:
        source: the model of `config.model`; it is changed.
        plan: the plan of `config.plan` for that model (`preflight.choose_plan`).

    Raises:
        ConfigError, PlanError: something does not fit; `preflight.check` finds the same without processes.
    """
    check_cuda_graph(config, device.type)
    check_data_engine(config)
    clear()
    chooses = config.train.cuda_graph == "auto"
    if chooses:
        config = config.with_values({"train.cuda_graph": can_be_captured(config, device.type)})
    draws = draws_of(config, source.model, plan)
    if chooses and draws.any:
        config = config.with_values({"train.cuda_graph": False})
    precision, compiled = choose_precision(config, device), compiles(config, device)
    decays = decay_by_name(source.model, config.train)
    counts = count_parameters(source.model, decays)
    check_draws(config, draws, type(source.model).__name__, compiled=compiled)
    stages = split_stages(source.model, mesh, first_layers(config, source.model))
    chosen = Chosen(config, mesh, device, source, plan, precision, draws, compiled)
    for stage in stages:
        prepare_stage(stage, chosen)
    seeds = micro_batch_seeds(stages, config, mesh, device)
    runner = make_runner(stages, chosen, seeds)
    modules = [stage.module for stage in stages]
    # where forward computes with the parameters themselves, what it writes stays
    if runner.weights is not None or any(fsdp_units(module) for module in modules):
        for stage in stages:
            refuse_forward_writes(stage.module, stage.blocks)
    step = build_step(runner, config, mesh, decaying_parameters(modules, decays), seeds, modules)
    step.buffers = WrittenBuffers(modules, MeshAxes(mesh).data_groups())
    if config.train.replay_every:
        step.corruption = corruption_check(stages, runner, step, config, mesh, compiled=compiled)
    eager_steps = MEASURED_STEPS if chooses else EAGER_STEPS
    graphs = enable_cuda_graphs(runner, step, config, eager_steps) if config.train.cuda_graph else ()
    if graphs and chooses:
        step.graph_choice = GraphChoice(graphs, device)
    return Training(stages, source, plan, mesh, device, precision, compiled, step, counts, graphs, draws, eager_steps)


def draws_of(config: RunConfig, model: nn.Module, plan: Plan) -> RandomDraws:
    """What the model draws in training. Where nobody needs to know, it is not run to find out."""
    batch, seq_len = config.train.micro_batch, config.data.seq_len
    if config.mesh.tp > 1:
        return random_draws(model, plan, config.mesh.tp, batch, seq_len)
    return RandomDraws(model_draws(model, batch, seq_len) if config.train.cuda_graph else None)


@dataclass(frozen=True)
class Chosen:
    """What is chosen before stages are prepared, and holds for all of this rank's."""

    config: RunConfig
    mesh: DeviceMesh
    device: torch.device
    source: Source
    plan: Plan
    precision: Precision
    draws: RandomDraws
    compiled: bool


def prepare_stage(stage: Stage, chosen: Chosen) -> None:
    """Wrap a stage, in place, and give it its memory and weights."""
    config, mesh, source = chosen.config, chosen.mesh, chosen.source
    if source.weights == "built":  # they exist already: `parallelize` shards them where they will stay
        materialize(stage.module, chosen.device)
    parallelize(stage.module, chosen.plan, mesh, absent=stage.absent)
    arrange_draws(stage.module, chosen.draws.modules, mesh, compiled=stage.blocks if chosen.compiled else ())
    train = config.train
    wrap_blocks(stage.blocks, train.activation_checkpoint, compiled=chosen.compiled, fused=train.fused_kernels)
    if config.mesh.is_flat:
        shard_over_data(stage.module, mesh)
    elif not chosen.precision.keeps_copies:
        apply_data_parallel(
            stage.module,
            mesh,
            stage.blocks,
            param_dtype=chosen.precision.fsdp_param_dtype,
            reshard_after_forward=config.fsdp.reshard_after_forward,
        )
    materialize(stage.module, chosen.device)
    fill(stage.module, source, config.run.seed)


def wrap_blocks(blocks: Sequence[nn.Module], mode: Mode, *, compiled: bool, fused: bool) -> None:
    """Recomputation and compile of each block, in place; why in this order: [Note: order of wrapping]."""
    if mode == "selective":
        apply_activation_checkpoint(blocks, mode, compiled=compiled)
    if compiled:
        for block in blocks:
            compile_forward(block, fused=fused)
    if mode == "full":
        apply_activation_checkpoint(blocks, mode)


def micro_batch_seeds(
    stages: list[Stage], config: RunConfig, mesh: DeviceMesh, device: torch.device
) -> MicroBatchSeeds:
    """The random numbers of a run: see [Note: random numbers]."""
    if device.type == "cuda":
        seed_dtensors(config.run.seed, mesh["tp"])
    generators = Generators((stage.module for stage in stages), device)
    return MicroBatchSeeds(generators, config.run.seed, MeshAxes(mesh).data_rank, config.mesh.dp)


def make_runner(stages: list[Stage], chosen: Chosen, seeds: MicroBatchSeeds) -> SingleStageModel | PipelinedModel:
    """What runs forward and backward of this rank's prepared stages; auxiliary losses have no pipeline."""
    config, mesh, device, plan = chosen.config, chosen.mesh, chosen.device, chosen.plan
    train, dtype = config.train, chosen.precision.compute_dtype
    if config.mesh.pp == 1:
        (stage,) = stages
        weights: WeightCopies | None = None
        if config.mesh.is_flat:
            weights = FlatWeights(stage.module, mesh, stage.blocks, dtype, config.fsdp, graphed=train.is_graphed)
        elif chosen.precision.keeps_copies:
            weights = ComputeWeights(stage.module, dtype, graphed=train.is_graphed)
        return SingleStageModel(stage.module, plan, mesh, device, weights, seeds, chosen.source.auxiliary)

    # torch's pipelining imports the compiler: seconds that other meshes need not wait
    from colrow.parallel.pipeline import PipelineOptions, PipelineRunner

    options = PipelineOptions(
        config.pipeline.schedule, config.micro_batches, train.micro_batch, config.data.seq_len, dtype=dtype
    )
    return PipelinedModel(PipelineRunner(stages, plan, mesh, mean_cross_entropy, options, seeds), device)


def build_step(
    runner: ForwardBackward,
    config: RunConfig,
    mesh: DeviceMesh,
    decaying: Container[nn.Parameter],
    seeds: MicroBatchSeeds | None = None,
    modules: Sequence[nn.Module] = (),
) -> Step:
    """The step around `runner`, with the optimizer over its trainable parameters."""
    trainable = [param for param in runner.parameters() if param.requires_grad]
    if not trainable:  # of a whole model preflight has looked
        raise ConfigError("every parameter of a pipeline stage is frozen: set mesh.pp to fewer stages, or to 1")
    return Step(
        forward_backward=runner,
        params=trainable,
        counted=[param for param in runner.counted_parameters() if param.requires_grad],
        optimizer=build_optimizer(trainable, config.train, decaying),
        norm_groups=MeshAxes(mesh).norm_groups(),
        section=config.train,
        seeds=seeds,
        modules=modules,
    )


def corruption_check(
    stages: list[Stage], runner: ForwardBackward, step: Step, config: RunConfig, mesh: DeviceMesh, *, compiled: bool
) -> CorruptionCheck:
    """What `train.replay_every` asks for."""
    axes, modules = MeshAxes(mesh), [stage.module for stage in stages]
    opaque = [block for stage in stages for block in stage.blocks] if compiled else []
    replay = StepReplay(config.train.replay_every, runner, modules, axes, opaque)
    named = {name: param for module in modules for name, param in module.named_parameters()}
    copies = runner.weights.copies if runner.weights else None
    return CorruptionCheck(replay, KeptState(named, step.optimizer, copies, axes))


def enable_cuda_graphs(
    runner: ForwardBackward, step: Step, config: RunConfig, eager_steps: int
) -> tuple[GraphedFunction, ...]:
    """Replay two CUDA graphs in each step after the first ones: see [Note: captured]."""
    assert isinstance(runner, SingleStageModel), "check_cuda_graph allows no pipelines"
    return runner.enable_cuda_graph(eager_steps * config.micro_batches), step.enable_cuda_graph(eager_steps)


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether blocks are compiled: `train.compile`, unless given on GPUs."""
    return device.type == "cuda" if config.train.compile is None else config.train.compile


def fill(model: nn.Module, source: Source, seed: int) -> None:
    """Give the model, or a stage of it, its weights: each rank its own shards."""
    if source.weights == "seeded":
        fill_seeded(model, seed)
    elif source.weights == "folder":
        from colrow.checkpoint.huggingface import load_weights

        assert source.folder is not None
        load_weights(model, source.folder)
