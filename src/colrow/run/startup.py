"""Where the time goes from the command to the second step, by part: what a run prints and leaves in `startup.json`.

One clock a process: each `mark` gives the time since the one before to a part. The launcher's orders to its ranks carry
its clock, so that the parts add up to what a user waits; what ranks do meanwhile is no part.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from colrow.data.disk import atomic_write

FILE = "startup.json"

_parts: dict[str, float] = {}
_last: float | None = None


def begin(other: Mapping[str, Any] | None = None) -> None:
    """Start the clock, or continue from the reading of another process."""
    global _last
    _parts.clear()
    _parts.update(other["parts"] if other else {})
    _last = other["last"] if other else time.time()


def mark(part: str) -> None:
    """The time since the last mark was this part's. Nothing where no clock runs."""
    global _last
    if _last is not None:
        now = time.time()
        _parts[part] = _parts.get(part, 0.0) + now - _last
        _last = now


def reading() -> dict[str, Any] | None:
    """What `begin` continues from; None where no clock runs."""
    return None if _last is None else {"parts": dict(_parts), "last": _last}


def finish(folder: Path) -> str | None:
    """Stop the clock, write its parts, and return them as text; None where it does not run."""
    global _last
    if _last is None:
        return None
    mark("steps")
    _last, total = None, sum(_parts.values())
    rounded = {part: round(seconds, 2) for part, seconds in _parts.items()}
    text = json.dumps({"seconds": round(total, 2), "parts": rounded}, indent=1)
    atomic_write(folder / FILE, text + "\n")
    shown = ", ".join(f"{part} {seconds:.1f}" for part, seconds in _parts.items() if seconds >= 0.05)
    return f"{total:.1f} s from the command to here: {shown}"
