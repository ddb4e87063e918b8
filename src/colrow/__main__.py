"""`python -m colrow`, and the `colrow` command."""

from __future__ import annotations

import contextlib
import gc
import io
import sys

from colrow.cli import main


def run() -> None:
    """Run the command in a process that has nothing else to do.

    Importing torch makes a million objects, and nothing of them is garbage: at Python's own thresholds a fifth of the
    start goes into collections, and most of the end into the last ones.
    """
    gc.set_threshold(100_000, 20, 100)
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding does not have is no error
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # one that cannot be flushed
                stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    finally:
        gc.freeze()


if __name__ == "__main__":
    run()
