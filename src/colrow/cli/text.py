"""Lines for a terminal."""

from __future__ import annotations

import json
import os
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console

from colrow.errors import ConfigError

if TYPE_CHECKING:  # a wrong flag need not wait for torch
    from colrow.plans.split_share import SplitShare


class Terminal(Console):
    """What a verb prints to."""

    def on_broken_pipe(self) -> NoReturn:
        """Let the command end as it does for `print`. rich would exit with 1, which means findings."""
        raise BrokenPipeError

    def say(self, text: str, indent: int = 2, style: str | None = None) -> None:
        """Print a text without rich's markup, broken between words at the terminal's width; further lines are indented.
        A name or path is never broken."""
        lead = len(text) - len(text.lstrip())
        broken = textwrap.fill(
            text,
            max(self.width, 40),
            subsequent_indent=" " * (lead + indent),
            break_long_words=False,
            break_on_hyphens=False,
        )
        self.print(broken, style=style, markup=False, soft_wrap=True)


def require_writable(*paths: Path | None) -> None:
    """Refuse files that cannot be written, before the work whose result they are to hold.

    Raises:
        ConfigError: one is a folder, or its folder is missing or read-only.
    """
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(f"{path} is a folder: give a file")
        if not path.parent.is_dir():
            raise ConfigError(f"the folder of {path} is not there: make {path.parent}")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{path} cannot be written: give another file")


def print_json(data: Any) -> None:
    """What a verb prints with `--json`."""
    json.dump(data, sys.stdout, indent=1)
    print()


def parts_text(parts: dict[str, float], unit: str) -> str:
    """The parts of a forecast, the largest first, without those that are nearly nothing."""
    shown = sorted(((name, value) for name, value in parts.items() if value >= 0.05), key=lambda item: -item[1])
    return ", ".join(f"{name} {value:.1f}" for name, value in shown) + f" {unit}"


def show_share(share: SplitShare, console: Terminal) -> None:
    """How much a plan splits, and the largest reasons for the rest."""
    if share.is_small:
        console.say(f"warning: {share.summary()}", style="bold yellow")
    else:
        console.say(share.summary())
    for reason in share.reasons():
        console.say(f"  {reason}")
