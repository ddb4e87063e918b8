"""`python -m colrow`, and the `colrow` command."""

from __future__ import annotations

import contextlib
import gc
import io
import signal
import sys
from types import FrameType

from colrow.cli import main
from colrow.cli.ranks import is_rank


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
        try:
            status = main()
        except Exception:  # a library made another error of an interrupt, as numpy does in its import
            if (status := interrupts.status(0)) == 0:
                raise
            print(f"colrow: stopped by {signal.Signals(status - 128).name}", file=sys.stderr)
        sys.exit(interrupts.status(status))
    finally:
        gc.freeze()


class _Interrupted(KeyboardInterrupt):
    """Not KeyboardInterrupt itself: where Python has seen that class leave `exec`, it ends the process by SIGINT."""


class _Interrupts:
    """Ctrl-C and SIGTERM as a KeyboardInterrupt, so that a verb ends what it has started. The signal is kept, for a
    KeyboardInterrupt that comes while a library is imported may be lost in its C code."""

    def __init__(self) -> None:
        self._last: int | None = None
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not `nohup`, nor a shell's `&`
            signal.signal(signal.SIGINT, self._take)
        # A rank that waits in a collective runs no handler: its launcher's SIGTERM must end it at once.
        if not is_rank() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._take)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._last = number
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)  # the second one ends a process that does not come to an end
        raise _Interrupted(number)

    def status(self, status: int) -> int:
        """The exit status of a command that has ended with `status`; from here on nothing is left to interrupt."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if not is_rank():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return status if self._last is None else 128 + self._last


if __name__ == "__main__":
    run()
