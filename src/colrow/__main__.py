"""`python -m colrow`, and the `colrow` command."""

from __future__ import annotations

import contextlib
import gc
import io
import signal
import sys
from types import FrameType

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
    interrupts = _Interrupts()
    try:
        sys.exit(interrupts.status(main()))
    finally:
        gc.freeze()


class _Interrupts:
    """Counts Ctrl-C: a KeyboardInterrupt that comes while a library is imported may be lost in its C code."""

    def __init__(self) -> None:
        self._count = 0
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not `nohup`, nor a shell's `&`
            signal.signal(signal.SIGINT, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._count += 1
        raise KeyboardInterrupt

    def status(self, status: int) -> int:
        """The exit status of a command that has ended with `status`; from here on nothing is left to interrupt."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return 128 + signal.SIGINT if self._count and status == 0 else status


if __name__ == "__main__":
    run()
