"""The cells that a config allows on a number of GPUs, the best of each mesh, and how long a sequence fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import nn

from colrow.checking.degrees import plan_degrees
from colrow.config import RunConfig
from colrow.dryrun.calls import most_positions
from colrow.errors import ConfigError, PlanError, first_line
from colrow.forecasting.devices import CPU, Device
from colrow.forecasting.forecast import MARGIN, Forecaster, Options, Row
from colrow.mesh import Mesh, divisors
from colrow.models.blocks import block_stacks
from colrow.parallel.data_parallel import head_unit
from colrow.parallel.flat_weights import check_data_engine
from colrow.parallel.pipeline_split import check_pipeline, fit_micro_batch, require_parts
from colrow.plans.named import named_plan
from colrow.plans.plan import Plan
from colrow.plans.presets import FAST, PRESETS
from colrow.sharding.parameter_state import refuse_hooks

_RECOMPUTE = ("none", "selective", "full")
_WORTH = 1.01  # a larger micro-batch must be faster by this factor
_GROWS = 1.02  # twice the tokens take more memory by this factor, where they hold the peak
_STEP = 256  # tokens: lengths that `longest` tries are multiples of it


@dataclass(frozen=True)
class Table:
    """The best cell of each mesh.

    Attributes:
        rows: those that fit first, by tokens/s.
        left_out: meshes that cannot run, with the reason.
    """

    rows: list[Row]
    left_out: list[tuple[Mesh, str]]

    @property
    def chosen(self) -> int | None:
        """The row to take; None where nothing fits."""
        return 0 if self.rows and self.rows[0].fits else None


@dataclass(frozen=True)
class Longest:
    """What fits on a mesh: tokens of one sequence, and sequences of the config's length in a micro-batch."""

    row: Row
    seq_len: int
    micro_batch: int


class Choices:
    """The cells of a config's model. Where its micro-batch is `auto`, each that the global batch allows.

    Args:
        config: its mesh is not used.
        model: of the config, on the meta device.
        as_given: plan, recomputation and CUDA graph are the config's, and the data engine, but with `mesh: auto`.
    """

    def __init__(
        self,
        config: RunConfig,
        model: nn.Module,
        device: Device,
        gpus: int,
        hosts: int = 1,
        *,
        as_given: bool = False,
    ) -> None:
        if gpus % hosts:
            raise ConfigError(f"--gpus {gpus} is not divisible by --hosts {hosts}: give the number of all hosts' GPUs")
        self._config, self._model, self._gpus, self._per_host = config, model, gpus, gpus // hosts
        self._as_given = as_given
        self._engine_is_given = as_given and "mesh" not in config.auto
        self._forecaster = Forecaster(model, device, self._per_host)
        self._plans: dict[tuple[str, int], Plan] = {}

    def table(self) -> Table:
        """Every mesh of the GPUs, each with its best plan, data engine, recomputation and micro-batch."""
        rows, left_out = [], []
        for mesh in self.meshes():
            try:
                rows.append(self.best(mesh))
            except (ConfigError, PlanError) as error:
                left_out.append((mesh, first_line(error)))
        rows.sort(key=lambda row: (not row.fits, -row.tokens_per_second_per_gpu if row.fits else row.memory.needed))
        return Table(rows, left_out)

    def meshes(self) -> Iterator[Mesh]:
        """All meshes whose tp the plan allows and stays inside a host."""
        degrees = plan_degrees(self._model, self._plan(self._config.plan, 1))
        for tp in (n for n in divisors(self._gpus) if n in degrees and n <= self._per_host):
            for pp in divisors(self._gpus // tp):
                for shard in divisors(self._gpus // tp // pp):
                    yield Mesh(pp=pp, dp_replicate=self._gpus // tp // pp // shard, dp_shard=shard, tp=tp)

    def best(self, mesh: Mesh) -> Row:
        """The fastest cell of a mesh that fits; the smallest where none does.

        Raises:
            ConfigError, PlanError: the config cannot run on the mesh.
        """
        configs = list(self._sizes(mesh))
        given = configs[0].train.activation_checkpoint
        smallest: Row | None = None
        for recompute in (given,) if self._as_given else _RECOMPUTE[_RECOMPUTE.index(given) :]:
            best: Row | None = None
            for config in configs:
                rows = [
                    row
                    for each in self._engines(config)
                    for name in self._plan_names(mesh)
                    for row in self._rows(each, name, recompute)
                ]
                smallest = min([*rows, *([smallest] if smallest else [])], key=lambda row: row.memory.needed)
                fitting = max((row for row in rows if row.fits), key=_rate, default=None)
                if fitting is None or (best is not None and _rate(fitting) < _WORTH * _rate(best)):
                    break  # nor will a larger one
                best = fitting
            if best is not None:
                return best
        assert smallest is not None
        return smallest

    def longest(self, mesh: Mesh) -> Longest:
        """The longest sequence and the largest micro-batch that fit on a mesh.

        Memory is nearly linear in the tokens of a micro-batch: two walks give a guess, a third one proves it.
        """
        config = self._on(mesh)
        row = self.best(mesh)
        mesh = row.mesh  # with its data engine
        plan, tp = self._plan(row.plan, mesh.tp), mesh.tp
        unit = _STEP * tp if plan.sequence_parallel() else _STEP
        one = replace(row.options, micro_batch=1, micro_batches=mesh.pp)  # one for each stage of a pipeline
        limit = most_positions(self._model) or 2**20

        def row_of(changed: Options) -> Row:
            return self._forecaster.row(plan, mesh, changed)

        length = largest_that_fits(lambda n: row_of(replace(one, seq_len=n)), min(unit * 4, limit), unit, limit)
        of_run = replace(one, seq_len=config.data.seq_len)
        return Longest(row, length, largest_that_fits(lambda n: row_of(replace(of_run, micro_batch=n)), 1, 1, 4096))

    def _rows(self, config: RunConfig, name: str, recompute: str) -> Iterator[Row]:
        """The cells of one plan and recomputation: and, where the CPU would set the pace, with a CUDA graph."""
        mesh = config.mesh
        plan = self._plan(name, mesh.tp)
        if plan.sequence_parallel() and config.data.seq_len % mesh.tp:
            raise PlanError(f"seq_len={config.data.seq_len} is not divisible by tp={mesh.tp}")
        if config.train.fp8 is not None and mesh.tp == mesh.dp == 1:
            raise ConfigError("train.fp8 is for meshes with tp or data axes")
        options = replace(options_of(config, on_gpus=self._forecaster.device.name != CPU), recompute=recompute)  # type: ignore[arg-type]
        row = self._forecaster.row(plan, mesh, options)
        if (
            row.mesh.is_flat
            and not self._engine_is_given
            and not self._forecaster.runs_blocks_in_order(plan, mesh, options)
        ):
            return
        yield row
        if self._as_given:
            return
        if (
            (mesh.tp_alone or row.mesh.is_flat)
            and row.time.parts["cpu"] > 0
            and options.compiled
            and not options.cuda_graph
        ):
            yield self._forecaster.row(plan, mesh, replace(options, cuda_graph=True))

    def _engines(self, config: RunConfig) -> list[RunConfig]:
        """The config with each data engine that can run it, FSDP2's first; its own alone where that is given. The flat
        one only where the ranks of dp_shard are on one host.

        Raises:
            ConfigError: none can.
        """
        candidates = [config]
        one_host = config.mesh.tp * config.mesh.dp_shard <= self._per_host  # between hosts it was never measured
        if not self._engine_is_given and config.mesh.dp > 1 and one_host and self._model_can_be_flat:
            candidates.append(self._on_flat(config))
        found, obstacle = [], None
        for candidate in candidates:
            try:
                check_data_engine(candidate)
            except ConfigError as error:
                obstacle = obstacle or error
            else:
                found.append(candidate)
        if not found and obstacle is not None:
            raise obstacle
        return found

    def _on_flat(self, config: RunConfig) -> RunConfig:
        """The config on the flat data engine, with copy engines where GPUs reach each other's memory."""
        mesh, fsdp = config.mesh.model_copy(update={"data_engine": "flat"}), config.fsdp
        if self._forecaster.device.rates.peer_copy > 0 and mesh.dp_shard > 1 and fsdp.keep_shards:
            fsdp = fsdp.model_copy(update={"gather": "copy_engine", "exchange": "copy_engine"})
        return config.model_copy(update={"mesh": mesh, "fsdp": fsdp})

    @cached_property
    def _model_can_be_flat(self) -> bool:
        """Whether the flat engine takes the model, as far as its parameters show: `FlatWeights` has the rules."""
        params, stacks = list(self._model.parameters()), block_stacks(self._model)
        try:
            refuse_hooks(self._model, "mesh.data_engine: flat")
            head_unit(self._model, [block for stack in stacks for block in stack.blocks.values()])
        except ConfigError:
            return False
        alike = len({param.dtype for param in params}) == 1
        return alike and all(x.is_floating_point() and x.dim() > 0 and x.is_contiguous() for x in params)

    def _plan_names(self, mesh: Mesh) -> Sequence[str]:
        name = self._config.plan
        overlaps = name in PRESETS and name not in FAST and mesh.tp > 1 and self._forecaster.device.rates.peer_copy > 0
        return [name, "llama-overlap"] if overlaps and not self._as_given else [name]

    def _plan(self, name: str, tp: int) -> Plan:
        if (name, tp) not in self._plans:
            loss = "linear" if name in FAST and name != self._config.plan else self._config.loss
            plan, recipe = named_plan(name, self._model, tp, loss), self._config.train.fp8
            self._plans[name, tp] = plan if recipe is None else plan.with_fp8(recipe)
        return self._plans[name, tp]

    def _sizes(self, mesh: Mesh) -> Iterator[RunConfig]:
        """The config on the mesh; with `train.micro_batch: auto` with each micro-batch, the smallest first, each
        at least half as large again as the one before."""
        if "train.micro_batch" not in self._config.auto:
            yield self._on(mesh)
            return
        share, last = max(1, self._config.train.global_batch // mesh.dp), 0
        for size in divisors(share):
            config = self._on(mesh, size)  # raises where not even one sequence fits the batch
            if config.train.micro_batch == size and size >= 1.5 * last:
                last = size
                yield config

    def _on(self, mesh: Mesh, micro_batch: int | None = None) -> RunConfig:
        train = self._config.train
        if micro_batch is not None:
            train = train.model_copy(update={"micro_batch": micro_batch})
        config = fit_micro_batch(self._config.model_copy(update={"mesh": mesh, "train": train}))
        if mesh.pp > 1:
            check_pipeline(config.model_copy(update={"device": "cpu"}), len(require_parts(self._model)))
        return config


def largest_that_fits(row: Callable[[int], Row], start: int, unit: int, limit: int) -> int:
    """The largest value whose row fits, a multiple of `unit` and at most `limit`; 0 where `start` does not fit.

    Each row is a walk through the model, so few are made. Memory is linear in tokens where activations make the peak:
    two points give the slope, and the room that is left gives the value.
    """
    first, second = row(start), row(2 * start)
    if not first.fits:
        return 0
    while second.fits and second.memory.needed <= _GROWS * first.memory.needed and 2 * start < limit:
        start *= 2  # the peak of so few tokens is elsewhere, such as in a large table's gradient
        first, second = second, row(2 * start)
    slope = (second.memory.needed - first.memory.needed) / start
    if slope <= 0:
        return limit if row(limit).fits else start
    value = start
    for _ in range(3):  # each time from the point that was reached: the line may bend, at a workspace or a reserve
        room = row(value).free - MARGIN * first.device.memory
        value = min(limit, max(start, int((value + room / slope) // unit * unit)))
        if row(value).fits and (value == limit or not row(value + unit).fits):
            return value
    if row(value).fits:
        return value
    # No line through the points leads to the limit, so halve the distance: `start` fits and `value` does not.
    while value - start > unit:
        middle = max(start + unit, (start + value) // 2 // unit * unit)
        start, value = (middle, value) if row(middle).fits else (start, middle)
    return start


def loss_to(best: Row, row: Row) -> str:
    """How much slower for a token than the best a row is, and the part of its step that takes most of the difference,
    with its milliseconds: `5%, mostly to tp (38 ms)`."""
    share = _rate(best) / _rate(row) - 1
    names = {*best.time.parts, *row.time.parts}

    def per_token(of: Row, name: str) -> float:
        return of.time.parts.get(name, 0.0) / of.time.seconds / _rate(of)

    worst = max(names, key=lambda name: per_token(row, name) - per_token(best, name))
    return f"{share:.0%}, mostly to {worst} ({row.time.parts.get(worst, 0.0) * 1e3:.0f} ms)"


def _rate(row: Row) -> float:
    return row.tokens_per_second_per_gpu


def options_of(config: RunConfig, *, on_gpus: bool = True) -> Options:
    """How a config's step is run."""
    train, pipeline, flat = config.train, config.pipeline, config.mesh.is_flat
    return Options(
        train.micro_batch,
        config.micro_batches,
        config.data.seq_len,
        train.activation_checkpoint,
        compiled=on_gpus if train.compile is None else train.compile,
        cuda_graph=train.is_graphed and (config.mesh.tp_alone or flat),
        reshard=config.fsdp.reshard_after_forward,
        gather=config.fsdp.gather if flat else "collectives",
        exchange=config.fsdp.exchange if flat else "collectives",
        gather_fp8=flat and config.fsdp.gather_fp8,
        schedule=pipeline.schedule,
        split=pipeline.split,
        dtype=torch.bfloat16 if train.precision == "bf16" or (on_gpus and train.precision == "auto") else torch.float32,
    )
