"""The forecast of one cell: a model, a plan, a mesh, a micro-batch. `choices.py` compares cells."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn

from colrow.dryrun.block_kinds import BlockTraces
from colrow.errors import ConfigError
from colrow.forecasting.devices import Device, device_named
from colrow.forecasting.memory import GIB, Memory, Setting, peak_memory
from colrow.forecasting.timing import Machine, Program, StepTime, step_time
from colrow.forecasting.walk import Cell, Walk, applies_on_data_axes, block_traces, walk
from colrow.mesh import Mesh
from colrow.models.shapes import flops_per_token
from colrow.parallel.activation_checkpoint import Mode
from colrow.parallel.pipeline_split import layer_costs, require_parts, split_layers
from colrow.plans.plan import Plan

MARGIN = 0.03
"""The share of the device's memory that a cell must leave free to be called fitting: the forecast's own error."""


@dataclass(frozen=True)
class Options:
    """How a step is run, beside plan and mesh; the defaults are a config's.

    Args:
        micro_batch: sequences of a forward on a data-parallel rank; micro_batches: of them in a step.
        recompute: `train.activation_checkpoint`.
        compiled: blocks are compiled, as on GPUs.
        reshard: `fsdp.reshard_after_forward`.
        gather, exchange, gather_fp8: of `fsdp`, of the flat data engine.
        schedule, split: of a pipeline, as `pipeline.schedule` and `pipeline.split`.
    """

    micro_batch: int = 1
    micro_batches: int = 1
    seq_len: int = 2048
    recompute: Mode = "none"
    compiled: bool = True
    cuda_graph: bool = False
    reshard: bool | None = None
    gather: str = "collectives"
    exchange: str = "collectives"
    gather_fp8: bool = False
    schedule: str = "1f1b"
    split: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Row:
    """What a step costs on a mesh.

    Attributes:
        memory: of the rank that needs most, in bytes, by part.
        time: of a step, in seconds, by part.
        mfu: by the causal count; None for models without a LlamaConfig.
        fits: on the device, with `MARGIN` left.
    """

    mesh: Mesh
    plan: str
    options: Options
    memory: Memory
    time: StepTime
    tokens_per_second_per_gpu: float
    mfu: float | None
    device: Device

    @property
    def fits(self) -> bool:
        return self.memory.needed <= (1 - MARGIN) * self.device.memory

    @property
    def cannot_fit(self) -> bool:
        """Whether it runs out of memory even if the forecast is too high by `MARGIN`: what the allocator keeps in
        reserve it gives back before that."""
        return (1 - MARGIN) * (self.memory.device - self.memory.reserve) > self.device.memory

    @property
    def free(self) -> float:
        """Bytes of the device that nothing needs; negative where it does not fit."""
        return self.device.memory - self.memory.needed

    @property
    def style(self) -> str:
        """The plan, and in words what else makes a step of it: `llama flat`, `llama-overlap graph`."""
        return self.plan + " graph" * self.options.cuda_graph + " flat" * self.mesh.is_flat

    @property
    def bottleneck(self) -> str:
        if not self.fits:
            return f"memory: {self.memory.needed / GIB:.1f} of {self.device.memory / GIB:.1f} GiB"
        return self.time.bottleneck

    @property
    def parts_ms(self) -> dict[str, float]:
        """Milliseconds of a step, by part."""
        return {name: seconds * 1e3 for name, seconds in self.time.parts.items()}

    def to_data(self) -> dict[str, Any]:
        """The row as `colrow forecast --json` prints it."""
        return {
            "mesh": self.mesh.by_axis,
            "plan": self.style,
            "data_engine": self.mesh.data_engine,
            "gather": self.options.gather,
            "exchange": self.options.exchange,
            "micro_batch": self.options.micro_batch,
            "activation_checkpoint": self.options.recompute,
            "allocated_gib": self.memory.allocated / GIB,
            "device_gib": self.memory.device / GIB,
            "parts_gib": {part.name: getattr(self.memory, part.name) / GIB for part in fields(self.memory)},
            "step_ms": self.time.seconds * 1e3,
            "band_ms": self.time.band * 1e3,
            "parts_ms": self.parts_ms,
            "tokens_per_second_per_gpu": self.tokens_per_second_per_gpu,
            "fits": self.fits,
            "bottleneck": self.bottleneck,
        }


def forecast(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh,
    *,
    batch_size: int = 1,
    seq_len: int = 2048,
    micro_batches: int = 1,
    gpu: str = "h100-sxm",
    gpus_per_host: int = 8,
    **options: Any,
) -> Row:
    """What a step of `model` under `plan` on `mesh` costs: memory of a rank, time, tokens/s. No GPU is needed.

    For one's own loop: compute in bf16 over fp32 weights with AdamW, as `colrow train` does. The model may lie on the
    meta device, and is not changed.

    Args:
        batch_size: sequences of a micro-batch on a data-parallel rank.
        micro_batches: of them in an optimizer step.
        gpu: `h100-sxm`, `h200`, ...: see `devices.py`.
        options: more of `Options`: recompute, compiled, cuda_graph, reshard,
            gather, exchange, gather_fp8, schedule, split, dtype.

    Raises:
        PlanError: the plan does not fit the model or the degree.
        ConfigError: an unknown GPU, or a pipeline that the model cannot have.
    """
    chosen = Options(batch_size, micro_batches, seq_len, **options)
    return Forecaster(model, device_named(gpu), gpus_per_host).row(plan, mesh, chosen)


def cost(walked: Walk, setting: Setting, program: Program, machine: Machine) -> tuple[Memory, StepTime]:
    """The memory and the time of a step, on a device whose size may take the allocator's reserve away."""
    memory, time = peak_memory(walked, setting), step_time(walked, setting, program, machine)
    on_device = memory.on(machine.device.memory)
    return on_device, time.at_memorys_edge() if on_device.reserve < memory.reserve else time


class Forecaster:
    """Forecasts cells of one model, and walks each of them once.

    Args:
        per_host: GPUs of a host.
    """

    def __init__(self, model: nn.Module, device: Device, per_host: int = 8) -> None:
        self._model, self.device = model, device
        self._machine = Machine(device, per_host)
        self._walks: dict[Any, Walk] = {}
        self._traces: BlockTraces | None = None

    def row(self, plan: Plan, mesh: Mesh, options: Options) -> Row:
        """The forecast of a cell. Raises as `forecast` does."""
        walked = self._walk(plan, mesh, options)
        program = Program.of(plan, compiled=options.compiled, cuda_graph=options.cuda_graph)
        setting = self._setting(walked, mesh, options, program)
        if setting.copies_between_gpus and not self.device.rates.peer_copy:
            raise ConfigError(
                f"copy engines: no rate of copies between GPUs is known of {self.device.name}: use collectives, or a "
                "table of colrow calibrate"
            )
        memory, time = cost(walked, setting, program, self._machine)
        tokens = options.micro_batch * options.micro_batches * options.seq_len * mesh.dp
        rate = tokens / time.seconds / mesh.world_size
        return Row(mesh, plan.name, options, memory, time, rate, self._mfu(rate, options.seq_len), self.device)

    def runs_blocks_in_order(self, plan: Plan, mesh: Mesh, options: Options) -> bool:
        """Whether each block runs once, in the order of the modules, as the flat data engine wants it."""
        walked = self._walk(plan, mesh, options)
        return list(walked.order) == list(walked.repeats)

    def _walk(self, plan: Plan, mesh: Mesh, options: Options) -> Walk:
        """The walk of a cell: each is made once."""
        cell = Cell(
            mesh.tp,
            options.micro_batch,
            options.seq_len,
            options.recompute,
            options.compiled,
            options.dtype,
            applies_on_data_axes(plan, mesh),
        )
        key = (plan.name, plan.loss, repr(plan.modules), cell)
        if key not in self._walks:
            if self._traces is None:
                self._traces = block_traces(self._model, cell)
            self._walks[key] = walk(self._model, plan, cell, self._traces)
        return self._walks[key]

    def _setting(self, walked: Walk, mesh: Mesh, options: Options, program: Program) -> Setting:
        """What memory, traffic and time depend on beside the walk."""
        stages: tuple[int, ...] = (walked.layers,)
        if mesh.pp > 1:
            layers, config = len(require_parts(self._model)), self._model.config
            costs = layer_costs(cast(Any, config), options.seq_len, options.micro_batch)
            # the same balance as the run's pipeline: the head counts as several layers
            firsts = options.split or split_layers(costs, mesh.pp)
            stages = tuple(b - a for a, b in pairwise((0, *firsts, layers)))
            if len(stages) != mesh.pp:
                raise ConfigError(f"pipeline.split has {len(stages)} stages, and pp={mesh.pp} ranks run one each here")
        reshard = options.reshard
        if reshard is None:
            reshard = mesh.dp_shard > 1 and mesh.pp == 1
        low = options.dtype != torch.float32  # compute dtype below that of the weights
        return Setting(
            mesh,
            options.micro_batches,
            stages,
            options.schedule,
            copies=mesh.tp_alone and (options.cuda_graph or low),
            reshard=reshard,
            cuda_graph=options.cuda_graph,
            copy_engine=program.overlap == "copy_engine" and mesh.tp > 1,
            gather=options.gather,
            exchange=options.exchange,
            gather_fp8=options.gather_fp8,
        )

    def _mfu(self, rate: float, seq_len: int) -> float | None:
        config = getattr(self._model, "config", None)
        try:
            return rate * flops_per_token(config, seq_len, causal=True) / self.device.peak_flops  # type: ignore[arg-type]
        except AttributeError:
            return None
