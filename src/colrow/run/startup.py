"""Where the time goes from the command to the second step, by part: what a run prints and leaves in `startup.json`.

One clock a process: each `mark` gives the time since the one before to a part. The launcher hands its clock to its
ranks in an environment variable, so that the parts add up to what a user waits.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from colrow.data.disk import atomic_write

VARIABLE = "COLROW_STARTUP"
FILE = "startup.json"

_parts: dict[str, float] = {}
_last: float | None = None


def begin() -> None:
    """Start the clock, or continue the launcher's."""
    global _last
    _parts.clear()
    tree = json.loads(os.environ.pop(VARIABLE, "null"))
    _parts.update(tree["parts"] if tree else {})
    _last = tree["last"] if tree else time.time()


def mark(part: str) -> None:
    """The time since the last mark was this part's. Nothing where no clock runs."""
    global _last
    if _last is not None:
        now = time.time()
        _parts[part] = _parts.get(part, 0.0) + now - _last
        _last = now


def hand_over() -> None:
    """Leave the clock to the processes that are started from here."""
    if _last is not None:
        os.environ[VARIABLE] = json.dumps({"parts": _parts, "last": _last})


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
