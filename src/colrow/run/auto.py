"""`mesh: auto` and `train.micro_batch: auto`: chosen once, by forecasts, before anything else of a run is decided.

The launcher gives its choice to the ranks as flags, and the run's config.yaml holds it from then on: a continued run
keeps it, on whatever GPUs it is continued.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from colrow.config import AUTO, AUTO_KEYS, RunConfig, load_config
from colrow.errors import ConfigError
from colrow.forecasting.choices import Choices, Table, loss_to
from colrow.forecasting.devices import CPU, Device, this_cpu
from colrow.forecasting.forecast import Row
from colrow.forecasting.memory import GIB
from colrow.mesh import AXES
from colrow.models.build import build_source, resolve_implementation
from colrow.run.forecast_line import gpus_here
from colrow.run.progress import labelled
from colrow.run.requirements import refusal, with_tried_advice
from colrow.run.run_folder import CONFIG

_SHOWN = 3  # other meshes that are printed


@dataclass(frozen=True)
class ChosenConfig:
    """A config without `auto`, what is printed of it, and the flags that make the ranks see it."""

    config: RunConfig
    lines: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


def choose(config: RunConfig, *, in_launcher: bool = True) -> ChosenConfig:
    """Put a value in the place of every `auto`: that of the run's folder, else what the forecast says is fastest.

    Plan, recomputation and everything else are as given; the data engine and its carriers come with the mesh.

    Raises:
        ConfigError: nothing fits, the GPU has no rates, or there is no launcher to choose for all ranks.
    """
    if not config.auto:
        return ChosenConfig(config)
    keys = " and ".join(f"{key}: {AUTO}" for key in AUTO_KEYS if key in config.auto)
    if (path := config.run.dir / CONFIG).exists():
        before = load_config(path)
        chosen = config.with_chosen(before.mesh, before.train.micro_batch, before.fsdp.gather, before.fsdp.exchange)
        line = labelled("chosen", f"{_words(config, chosen)}, when the run was started ({path})")
        return ChosenConfig(chosen, (line,), _flags(config, chosen))
    if not in_launcher:
        raise ConfigError(
            f"{keys} is chosen by colrow's own launcher, and torchrun has started these ranks: give values, such as "
            "those that `colrow forecast CONFIG` names"
        )
    device, gpus = _devices(config, keys)
    model = resolve_implementation(config.model)
    seen = config.model_copy(update={"model": model})
    source = build_source(model, config.run.seed)
    # a mesh that cannot run is an error of its own; the search below would say that nothing fits
    if "mesh" not in config.auto and isinstance(error := refusal(seen, source), ConfigError):
        raise with_tried_advice(error, seen)
    ranks = gpus if "mesh" in config.auto else config.mesh.world_size
    choices = Choices(seen, source.model, device, ranks, as_given=True)
    table = choices.table() if "mesh" in config.auto else Table([choices.best(config.mesh)], [])
    if table.chosen is None:
        raise ConfigError(f"{keys}: {_nothing_fits(table, Choices(seen, source.model, device, ranks))}")
    best = table.rows[table.chosen]
    chosen = config.with_chosen(best.mesh, best.options.micro_batch, best.options.gather, best.options.exchange)
    return ChosenConfig(chosen, tuple(_choice_lines(config, chosen, table)), _flags(config, chosen))


def _devices(config: RunConfig, keys: str) -> tuple[Device, int]:
    if config.device == "cpu" or not torch.cuda.is_available():
        return this_cpu(), 1  # ranks on one CPU share its cores: no mesh is faster than one process
    found = gpus_here(config.model_copy(update={"forecast": "stop"}))
    if found is None or isinstance(found, str):
        raise ConfigError(f"{keys}: no rates are known of {found}: give values")
    return found


def _nothing_fits(table: Table, free: Choices) -> str:
    """Why no mesh is chosen, and where settings may change, those with which one fits."""
    if not table.rows:
        mesh, why = table.left_out[0]
        return f"no mesh of these devices can run the config, such as {mesh}: {why}"
    smallest = table.rows[0]
    memory = f"{smallest.memory.device / GIB:.3g} of {smallest.device.memory / GIB:.3g} GiB"
    need = f"{smallest.mesh} needs least memory, {memory}"
    other = free.table()
    if other.chosen is None:
        return f"nothing fits ({need}): use more GPUs, shorter sequences, or a smaller model"
    row = other.rows[other.chosen]
    return (
        f"nothing fits ({need}): use train.activation_checkpoint {row.options.recompute} and plan {row.plan}, with "
        f"which {row.mesh} does"
    )


def _choice_lines(config: RunConfig, chosen: RunConfig, table: Table) -> list[str]:
    """The choice, and why the next ones lose."""
    best, *others = table.rows
    lines = [labelled("chosen", f"{_words(config, chosen)}: {_speed(best)}")]
    for row in others[:_SHOWN]:
        why = f"loses {loss_to(best, row)}" if row.fits else f"does not fit: {row.memory.device / GIB:.3g} GiB"
        lines.append(
            labelled("", f"{row.mesh}{' flat' * row.mesh.is_flat} with micro-batch {row.options.micro_batch} {why}")
        )
    return lines


def _speed(row: Row) -> str:
    if row.device.name == CPU:
        return "by a rough forecast, as no rates of CPUs are known"
    rate = row.tokens_per_second_per_gpu
    return f"{rate:,.0f} ± {rate * row.device.band:,.0f} tokens/s per GPU by the forecast"


def _words(config: RunConfig, chosen: RunConfig) -> str:
    engine = "".join(f", {key} {value}" for key, value in _engine(chosen).items()) if chosen.mesh.is_flat else ""
    values = {
        "mesh": f"mesh {chosen.mesh}{engine}",
        "train.micro_batch": f"train.micro_batch {chosen.train.micro_batch}",
    }
    return ", ".join(text for key, text in values.items() if key in config.auto)


def _engine(chosen: RunConfig) -> dict[str, str]:
    """What the mesh's choice sets beside its axes, by key."""
    fsdp = chosen.fsdp
    return {"mesh.data_engine": chosen.mesh.data_engine, "fsdp.gather": fsdp.gather, "fsdp.exchange": fsdp.exchange}


def _flags(config: RunConfig, chosen: RunConfig) -> tuple[str, ...]:
    flags: list[str] = []
    if "mesh" in config.auto:
        values = {f"mesh.{axis}": getattr(chosen.mesh, axis) for axis in AXES} | _engine(chosen)
        flags += [word for key, value in values.items() for word in (f"--{key}", str(value))]
    if "train.micro_batch" in config.auto:
        flags += ["--train.micro_batch", str(chosen.train.micro_batch)]
    return tuple(flags)
