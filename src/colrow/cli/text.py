"""Lines for a terminal."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

if TYPE_CHECKING:  # a wrong flag need not wait for torch
    from colrow.forecasting.forecast import Row
    from colrow.plans.split_share import SplitShare


class Terminal(Console):
    """What a verb prints to."""

    def on_broken_pipe(self) -> NoReturn:
        """Let the command end as it does for `print`. rich would exit with 1, which means findings."""
        raise BrokenPipeError


def wrapped(line: str, width: int, indent: int = 2) -> str:
    """`line` broken between words at `width` columns; what follows is indented. A name or path is never broken."""
    lead = len(line) - len(line.lstrip())
    return textwrap.fill(
        line,
        max(width, 40),
        subsequent_indent=" " * (lead + indent),
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_json(data: Any) -> None:
    """What a verb prints with `--json`."""
    json.dump(data, sys.stdout, indent=1)
    print()


def memory_parts(row: Row) -> dict[str, float]:
    """GiB of a rank, by part."""
    return {part.name: getattr(row.memory, part.name) / 2**30 for part in fields(row.memory)}


def time_parts(row: Row) -> dict[str, float]:
    """Milliseconds of a step, by part."""
    return {name: seconds * 1e3 for name, seconds in row.time.parts.items()}


def parts_text(parts: dict[str, float], unit: str) -> str:
    """The parts of a forecast, the largest first, without those that are nearly nothing."""
    shown = sorted(((name, value) for name, value in parts.items() if value >= 0.05), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.1f}" for name, value in shown) + f" {unit}"


def show_share(share: SplitShare, console: Console) -> None:
    """How much a plan splits, and the largest reasons for the rest."""
    style = "bold yellow" if share.is_small else None
    line = ("warning: " if share.is_small else "") + share.summary()
    console.print(wrapped(line, console.width), style=style, markup=False, soft_wrap=True)
    for line in share.reasons():
        console.print(wrapped(f"  {line}", console.width), markup=False, soft_wrap=True)
