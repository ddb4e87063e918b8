"""`colrow plan MODEL --tp N`: what a plan does to a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from torch import nn

from colrow.cli.flags import PlanFlags, default_seq_len, parse
from colrow.cli.text import Terminal, parts_text, print_json, require_writable, show_share
from colrow.dryrun.picture import in_units, write_page
from colrow.dryrun.report import ParameterRow, PlanReport, report
from colrow.dryrun.result import Collective, Output
from colrow.errors import first_line
from colrow.forecasting.devices import Device, device_named
from colrow.forecasting.forecast import Forecaster, Options, Row
from colrow.forecasting.memory import GIB
from colrow.mesh import Mesh
from colrow.plans.patterns import with_stars
from colrow.plans.plan import Plan
from colrow.plans.split_share import SplitShare


@dataclass(frozen=True)
class Flags(PlanFlags):
    """Show a plan: each parameter with placement and local shape, each collective of a layer."""

    batch_size: int = 1
    """Sequences on a rank, for the bytes of collectives and the forecast."""
    seq_len: int | None = None
    """Tokens in a sequence; by default the model's context, at most 8192."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write the plan to this file."""
    gpu: str = "h100-sxm"
    """GPU of the forecast of a step's memory and time, as for `colrow forecast`; none leaves it out."""
    html: Path | None = None
    """Write an HTML page with the same picture, the tables and the reasons to this file."""


def main(argv: list[str]) -> int:
    """Exit 0; 2 for bad usage."""
    flags = parse(Flags, "plan", argv)
    flags.positive("batch_size", "seq_len")
    require_writable(flags.output, flags.html)
    model = flags.load_model()
    device = None if flags.gpu == "none" else device_named(flags.gpu)
    plan = flags.load_plan(model)
    seq_len = flags.seq_len or default_seq_len(model, flags.tp, 8192)
    shown = report(model, plan, flags.tp, flags.batch_size, seq_len, inputs=flags.load_inputs())
    if flags.output is not None:
        plan.made_for(model).save(flags.output)
    if flags.html is not None:
        write_page(shown, flags.model, flags.html)
    share = SplitShare.of(model, plan, flags.tp, shown.run.flops_split(flags.tp))
    row = None if device is None else _forecast(model, plan, flags.tp, device, flags.batch_size, seq_len)
    if flags.json:
        forecast = row.to_data() if isinstance(row, Row) else row
        print_json(shown.to_data() | {"split": share.to_data(), "forecast": forecast})
        return 0
    console = Terminal(highlight=False)
    show(shown, share, console)
    if row is not None:
        _show_forecast(row, console)
    for what, path in (("plan", flags.output), ("page", flags.html)):
        if path is not None:
            print(f"{what} written to {path}")
    return 0


def _forecast(model: nn.Module, plan: Plan, tp: int, device: Device, batch_size: int, seq_len: int) -> Row | str:
    """A step of one micro-batch on a mesh of tp alone; where there is no forecast of the model, the reason."""
    try:
        return Forecaster(model, device).row(plan, Mesh(tp=tp), Options(batch_size, seq_len=seq_len))
    except Exception as error:  # what a plan does to the model can be shown all the same
        return first_line(error)


def _show_forecast(row: Row | str, console: Terminal) -> None:
    if isinstance(row, str):
        console.print()
        console.say(f"no forecast: {row}")
        return
    device, memory, time = row.device, row.memory, row.time
    lines = (
        f"a step of one micro-batch on {row.mesh} of {device.name}, compiled bf16:",
        f"memory {memory.device / GIB:.1f} GiB of {device.memory / GIB:.0f}: {parts_text(memory.gib_by_part, 'GiB')}",
        f"time {time.seconds * 1e3:.1f} ± {time.band * 1e3:.1f} ms: {parts_text(row.parts_ms, 'ms')}",
        f"{row.tokens_per_second_per_gpu:,.0f} tokens/s per GPU, limited by {row.bottleneck}",
        f"rates: {device.source}",
    )
    console.print()
    for line in lines:
        console.say(line)


def show(shown: PlanReport, share: SplitShare, console: Terminal) -> None:
    """The report for a terminal."""
    console.print(
        f"plan [bold]{shown.plan.name}[/] at tp={shown.tp}, loss {shown.plan.loss}, "
        f"batch {shown.batch_size} × {shown.seq_len} tokens"
    )
    console.print(_parameters(shown.parameters))
    total, local = sum(r.bytes for r in shown.parameters), sum(r.local_bytes for r in shown.parameters)
    console.print(f"parameters: {in_units(total)} in total, {in_units(local)} on each rank")
    show_share(share, console)
    if shown.path:
        console.print(
            f"\none block, {shown.block} (× {shown.blocks}); ▼ forward, ▲ backward; global: shape of a DTensor"
        )
        for line in _drawing(shown):
            console.print(line, soft_wrap=True)
    console.print()
    if shown.block:
        console.print(_collectives(f"collectives of one block, {shown.block}", shown.block_collectives))
    console.print(_collectives("collectives outside the blocks", shown.other_collectives))
    reasons: dict[str, list[str]] = {}
    for row in shown.parameters:
        if row.shape == row.local_shape and (name := with_stars(row.name)) not in reasons.setdefault(row.reason, []):
            reasons[row.reason].append(name)
    for reason, names in reasons.items():
        console.print(f"\nreplicated ({reason}):")
        for name in names:
            console.print(f"  {name}")
    if shown.notes:
        console.print("\nwhy, dim by dim:")
    for note in shown.notes:
        console.say(f"  {note}")


def _parameters(rows: list[ParameterRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("parameter", "shape", "placement", "on a rank"):
        table.add_column(title, overflow="fold", no_wrap=title != "parameter")
    shown = ((with_stars(row.name), _shape(row.shape), row.placement, _shape(row.local_shape)) for row in rows)
    for cells in dict.fromkeys(shown):  # equal layers are one row
        table.add_row(*cells)
    return table


def _drawing(shown: PlanReport) -> list[str]:
    """The path of the activations through one block: modules, local shapes, collectives where the layout changes."""
    first, *steps = shown.path
    lines = [f"  in  {_output(first.output)}"]
    for step in steps:
        stem = "  " + "│ " * step.depth
        branch = "  " + "│ " * (step.depth - 1) + "├ "
        output = f"out {_output(step.output)}" if step.output else ""
        sent = [f"{stem}{_edge(forward, step.backward)}" for forward in step.before]
        head = f"{branch}{step.name.rpartition('.')[2]:<{32 - len(branch)}}{step.style:<14} {output}".rstrip()
        # prepare_input sends for the modules inside, so its collectives stand below its own line
        lines += [head, *sent] if step.style.startswith("prepare") else [*sent, head]
        lines += [f"{stem}{_edge(forward, step.backward)}" for forward in step.after]
    return [*lines, f"  out {_output(first.output)}"]


def _output(output: Output | None) -> str:
    if output is None:
        return ""
    return _shape(output.shape) + (" global" if output.is_dtensor else "")


def _edge(forward: Collective, backward: Sequence[Collective]) -> str:
    dual = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather", "all_reduce": "all_reduce"}
    # the collective of backward at the same module that undoes this one's change of layout
    back = next((c for c in backward if c.op == dual.get(forward.op)), None)
    change = forward.cause.partition(": ")[2]
    return f"▼ {_op(forward.op)} {in_units(forward.bytes)}  {change}" + (
        f"  ▲ {_op(back.op)} {in_units(back.bytes)}" if back else ""
    )


def _op(name: str) -> str:
    return name.replace("_", "-")


def _collectives(title: str, collectives: list[Collective]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="")
    for column in ("pass", "operation", "number", "bytes", "cause"):
        table.add_column(column, overflow="fold", justify="right" if column in ("number", "bytes") else "left")
    numbers: dict[tuple[str, str, int, str], int] = Counter((c.pass_, c.op, c.bytes, c.cause) for c in collectives)
    for (pass_, op, bytes_, cause), number in numbers.items():
        table.add_row(pass_, _op(op), str(number), in_units(bytes_), cause)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"
