"""Lines for a terminal."""

from __future__ import annotations

import textwrap


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
