"""`colrow plan MODEL --tp N`: what a plan does to a model."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from colrow.cli.flags import parse
from colrow.plans.dry_run import Collective
from colrow.plans.report import ParameterRow, PlanReport, collapse, report


@dataclass(frozen=True)
class Flags:
    """Show a plan: each parameter with placement and local shape, each collective of a layer."""

    model: tyro.conf.Positional[str]
    """A named shape (llama3-8b), a Hugging Face folder or config.json, or package.module:callable."""
    tp: int
    """Tensor-parallel degree."""
    plan: str = "llama"
    """A preset's name, huggingface, derive, or a file."""
    loss: str | None = None
    """For a preset: vocab_parallel or replicated."""
    batch_size: int = 1
    """Sequences on a rank, for the bytes of collectives."""
    seq_len: int | None = None
    """Tokens in a sequence; the model's context, at most 8192, unless given."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Write the plan to this file."""
    html: Path | None = None
    """Write a page with the same picture, the tables and the reasons to this file."""
    json: bool = False
    """Print JSON instead."""


def main(argv: list[str]) -> int:
    """Exit 0; 2 for bad usage."""
    flags = parse(Flags, "plan", argv)
    from colrow.cli.sources import load_model, load_plan

    model = load_model(flags.model)
    plan = load_plan(flags.plan, model, flags.tp, flags.loss)
    context = getattr(getattr(model, "config", None), "max_position_embeddings", 512)
    shown = report(model, plan, flags.tp, flags.batch_size, flags.seq_len or min(context, 8192))
    if flags.output is not None:
        plan.save(flags.output)
    if flags.html is not None:
        from colrow.plans.html import write_page

        write_page(shown, flags.model, flags.html)
    if flags.json:
        json.dump(shown.to_data(), sys.stdout, indent=1)
        print()
        return 0
    show(shown, Console(highlight=False))
    for what, path in (("plan", flags.output), ("page", flags.html)):
        if path is not None:
            print(f"{what} written to {path}")
    return 0


def show(shown: PlanReport, console: Console) -> None:
    """The whole report for a terminal."""
    console.print(
        f"plan [bold]{shown.plan.name}[/] at tp={shown.tp}, loss {shown.plan.loss}, "
        f"batch {shown.batch_size} × {shown.seq_len} tokens"
    )
    console.print(_parameters(shown.parameters))
    whole, part = sum(r.bytes for r in shown.parameters), sum(r.local_bytes for r in shown.parameters)
    console.print(f"parameters: {size(whole)} in all, {size(part)} on each rank")
    if shown.path:
        console.print(f"\none block, {shown.block} (× {shown.blocks}):")
        console.print(_block(shown))
    console.print(
        _collectives(f"collectives of one block ({shown.block})", shown.block_collectives) if shown.block else ""
    )
    console.print(_collectives("collectives outside the blocks", shown.other_collectives))
    reasons = {collapse(row.name): row.reason for row in shown.parameters if row.shape == row.local_shape}
    if reasons:
        console.print("whole on each rank:")
        for name, reason in reasons.items():
            console.print(f"  {name}: {reason}", soft_wrap=False)
    for note, text in shown.plan.notes.items():
        console.print(f"  {note}: {text}")


def _parameters(rows: list[ParameterRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("parameter", "shape", "placement", "on a rank"):
        table.add_column(title, overflow="fold", no_wrap=title != "parameter")
    groups: dict[tuple[str, str, str, str], int] = Counter()
    for row in rows:
        groups[(collapse(row.name), _shape(row.shape), row.placement, _shape(row.local_shape))] += 1
    for (name, shape, placement, local), _ in groups.items():
        table.add_row(name, shape, placement, local)
    return table


def _block(shown: PlanReport) -> Table:
    """The path of the activations: what each module does, what leaves it, and what is sent before and after."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("module", "style", "output on a rank", "forward", "backward"):
        table.add_column(title, overflow="fold")
    for step in shown.path:
        last = step.name.rpartition(".")[2]
        table.add_row(
            "  " * step.depth + (shown.block if step.depth == 0 else last),
            step.style,
            _shape(step.output) if step.output else "",
            _brief([*step.before, *step.after]),
            _brief(list(step.backward)),
        )
    return table


def _brief(collectives: list[Collective]) -> str:
    return "\n".join(f"{c.op.replace('_', '-')} {size(c.bytes)}" for c in collectives)


def _collectives(title: str, collectives: list[Collective]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left", title_style="")
    for column in ("pass", "operation", "number", "bytes", "cause"):
        table.add_column(column, overflow="fold", justify="right" if column in ("number", "bytes") else "left")
    kinds: dict[tuple[str, str, int, str], int] = Counter((c.pass_, c.op, c.bytes, c.cause) for c in collectives)
    for (pass_, op, bytes_, cause), number in kinds.items():
        table.add_row(pass_, op.replace("_", "-"), str(number), size(bytes_), cause)
    return table


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def size(number: float) -> str:
    """Bytes for people: 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024 or unit == "GiB":
            break
        number /= 1024
    return f"{number:.0f} {unit}" if number >= 100 or unit == "B" else f"{number:.1f} {unit}"
