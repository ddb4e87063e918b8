"""Lines for a terminal."""

from __future__ import annotations

import json
import sys
import textwrap
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

if TYPE_CHECKING:  # a wrong flag need not wait for torch
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


def show_share(share: SplitShare, console: Console) -> None:
    """How much a plan splits, and the largest reasons for the rest."""
    style = "bold yellow" if share.is_small else None
    line = ("warning: " if share.is_small else "") + share.summary()
    console.print(wrapped(line, console.width), style=style, markup=False, soft_wrap=True)
    for line in share.reasons():
        console.print(wrapped(f"  {line}", console.width), markup=False, soft_wrap=True)
