"""`colrow forecast CONFIG`: what each mesh will cost in memory and time, before a GPU is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table as Grid

from colrow.cli.flags import parse
from colrow.cli.text import Terminal, parts_text, print_json, require_writable
from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.mesh import AXES

if TYPE_CHECKING:  # a wrong flag need not wait for torch
    from colrow.forecasting.choices import Choices, Table
    from colrow.forecasting.forecast import Row

_DISK = 1.7e9
"""bytes/s that the ranks of a host wrote together (docs/guide/performance.md)."""
_SHORT = {"dp_replicate": "repl", "dp_shard": "shard"}
"""Titles of columns, where an axis' name is wide."""
_SHOWN = 12
_MOST_GPUS = 100_000
"""Each way to write it as a product is a row."""


@dataclass(frozen=True)
class Flags:
    """Forecast memory, step time and tokens/s of every mesh that a config's plan and sizes allow."""

    config: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="CONFIG.yaml")]
    """A run's config. Its corpus is not read; of its mesh only the number of GPUs counts."""
    gpus: int | None = None
    """GPUs of all hosts together; the config's number unless given."""
    gpu: str = "h100-sxm"
    """h100-sxm, h100-pcie, h200, h800, b200, a100-80gb, a100-40gb, l40s."""
    hosts: int = 1
    """Hosts that the GPUs are spread over."""
    table: Path | None = None
    """Rates that `colrow calibrate` wrote; those shipped with colrow, or the data sheet's, unless given."""
    longest: bool = False
    """The longest sequence and the largest micro-batch that fit on each mesh."""
    json: bool = False
    """Print JSON instead."""
    html: Path | None = None
    """Write an HTML page with bars of memory and of time to this file."""
    trust_code: bool = False
    """Run the Python code that the config of a run made by somebody else names for its model."""


def main(argv: list[str]) -> int:
    """Exit 0; 1 where no mesh fits; 2 for bad usage."""
    flags = parse(Flags, "forecast", argv)
    for name in ("gpus", "hosts"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give 1 or more")
    if (flags.gpus or 0) > _MOST_GPUS:
        raise ConfigError(f"--gpus {flags.gpus}: give at most {_MOST_GPUS:,}")
    if flags.longest and flags.html is not None:
        raise ConfigError("--html draws the table of meshes, which --longest does not print: give one of them")
    require_writable(flags.html)
    from colrow.run.run_folder import load_trusted

    config = load_trusted(flags.config, auto=True, trust_code=flags.trust_code)
    choices = _choices(flags, config)
    if flags.longest:
        return _show_longest(choices, flags)
    table = choices.table()
    if not table.rows:
        reasons = "\n".join(f"  {mesh}: {why}" for mesh, why in table.left_out[:4])
        raise ConfigError(f"no mesh of these GPUs can run the config:\n{reasons}")
    if flags.html is not None:
        from colrow.forecasting.page import write_page

        write_page(table, str(flags.config), flags.html)
    if flags.json:
        print_json({"rows": [row.to_data() for row in table.rows], "chosen": table.chosen})
    else:
        show(table, config, Terminal(highlight=False))
        if flags.html is not None:
            print(f"page written to {flags.html}")
    return 0 if table.chosen is not None else 1


def _choices(flags: Flags, config: RunConfig) -> Choices:
    from colrow.forecasting.choices import Choices
    from colrow.forecasting.devices import device_named
    from colrow.models.build import build_source

    device = device_named(flags.gpu, flags.table)
    model = build_source(config.model, config.run.seed).model
    return Choices(config, model, device, flags.gpus or config.mesh.world_size, flags.hosts)


def show(table: Table, config: RunConfig, console: Terminal) -> None:
    """The table, the parts of the chosen row, and what the run would take."""
    from colrow.forecasting.choices import loss_to
    from colrow.forecasting.memory import GIB

    first = table.rows[0]
    console.print(
        f"{first.mesh.world_size} × {first.device.name}, {first.device.memory / GIB:.0f} GiB each; global batch "
        f"{config.train.global_batch} × {config.data.seq_len} tokens"
    )
    console.say(f"rates: {first.device.source}; band ± {first.device.band:.0%}")
    console.print()
    console.print(_grid(table.rows[:_SHOWN]))
    if (more := len(table.rows) - _SHOWN) > 0:
        console.print(f"{more} more rows: --json prints all")
    for mesh, why in table.left_out[:3]:
        console.say(f"left out: {mesh}: {why}")
    if table.chosen is None:
        console.print()
        needed, limit = first.memory.needed / GIB, first.device.memory / GIB
        console.say(
            f"nothing fits: the smallest needs {needed:,.0f} GiB of {limit:.0f}: take more GPUs, "
            "shorter sequences, or a smaller model"
        )
        return
    console.print()
    console.say(f"chosen: {first.mesh}, plan {first.style.removesuffix(' flat')}, {_choice(first)}")
    band = first.time.band / first.time.seconds * first.tokens_per_second_per_gpu
    console.say(
        f"  {first.tokens_per_second_per_gpu:,.0f} ± {band:,.0f} tokens/s per GPU, limited by {first.bottleneck}"
    )
    console.say(f"  memory {parts_text(first.memory.gib_by_part, 'GiB')}", 7)
    console.say(f"  time   {parts_text(first.parts_ms, 'ms')}", 7)
    for row in table.rows[1:3]:
        if row.fits:
            console.say(f"  {row.mesh}, {row.style}, loses {loss_to(first, row)}")
    console.say(_totals(first, config))


def _grid(rows: list[Row]) -> Grid:
    grid = _empty_grid("plan", "batch", "recompute", "GiB", "step ms", "tok/s", "MFU")
    for row in rows:
        options, speed = row.options, ["no", "fit", ""]
        if row.fits:
            mfu = f"{row.mfu:.0%}" if row.mfu else ""
            speed = [f"{row.time.seconds * 1e3:,.0f}", f"{row.tokens_per_second_per_gpu:,.0f}", mfu]
        batch = f"{options.micro_batches}×{options.micro_batch}"
        gib = f"{row.memory.device / 2**30:.1f}"
        grid.add_row(*map(str, row.mesh.degrees), row.style, batch, options.recompute, gib, *speed)
    return grid


def _empty_grid(*titles: str) -> Grid:
    """A column for each axis of the mesh, in the order of `Mesh.degrees`, and these; 80 columns wide."""
    grid = Grid(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for title in (*(_SHORT.get(axis, axis) for axis in AXES), *titles):
        grid.add_column(title, justify="left" if title in ("plan", "recompute") else "right", no_wrap=title != "plan")
    return grid


def _show_longest(choices: Choices, flags: Flags) -> int:
    """Print what fits on each mesh. Returns the exit status."""
    from colrow.errors import PlanError

    found: list[dict[str, Any]] = []
    grid = _empty_grid("plan", "recompute", "longest sequence", "largest micro-batch")
    for mesh in choices.meshes():
        try:
            longest = choices.longest(mesh)
        except (ConfigError, PlanError):
            continue
        plan, recompute = longest.row.style, longest.row.options.recompute
        values = {"seq_len": longest.seq_len, "micro_batch": longest.micro_batch}
        found.append({"mesh": mesh.by_axis, "plan": plan, "activation_checkpoint": recompute, **values})
        grid.add_row(*map(str, mesh.degrees), plan, recompute, f"{longest.seq_len:,}", str(longest.micro_batch))
    if flags.json:
        print_json({"rows": found})
    else:
        console = Terminal(highlight=False)
        console.print(grid)
        if not any(entry["seq_len"] for entry in found):
            console.print("\nno sequence fits: take more GPUs, or a smaller model")
    return 0 if any(entry["seq_len"] for entry in found) else 1


def _choice(row: Row) -> str:
    options, engine = row.options, ""
    if row.mesh.is_flat:
        engine = f"mesh.data_engine flat, fsdp.gather {options.gather}, fsdp.exchange {options.exchange}, "
        engine += "fsdp.gather_fp8 true, " if options.gather_fp8 else ""
    return f"{engine}train.micro_batch {options.micro_batch}, train.activation_checkpoint {options.recompute}"


def _totals(row: Row, config: RunConfig) -> str:
    tokens = config.train.steps * config.tokens_per_step
    seconds = tokens / (row.tokens_per_second_per_gpu * row.mesh.world_size)
    states = (row.memory.masters + row.memory.optimizer) * row.mesh.tp * row.mesh.dp_shard * row.mesh.pp
    return (
        f"  {tokens:,} tokens: {_duration(seconds)}, {seconds / 3600 * row.mesh.world_size:,.1f} GPU-hours; a "
        f"checkpoint {states / 2**30:.0f} GiB, {states / _DISK:.0f} s on a disk of {_DISK / 1e9:.1f} GB/s"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} seconds"
