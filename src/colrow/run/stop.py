"""SIGINT and SIGTERM: a request to finish the step and save, or the end when another rank has failed.

The launcher ends the remaining ranks of a failed run with the same SIGTERM that a user sends to stop a good one. A
rank tells the two apart by the other ranks of its host: each writes its process id beside the error file that the
launcher gave it. When one of them has written an error, or its process is gone, this rank's collectives would wait for
it forever.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path
from types import FrameType, TracebackType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PID_FILE = "pid"


class StopRequest:
    """A context manager whose `requested` is True after the first SIGINT or SIGTERM.

    Args:
        rank_folder: this rank's folder, beside those of the other ranks of this host; None without a launcher.
    """

    def __init__(self, rank_folder: Path | None) -> None:
        self.requested = False
        self._folder = rank_folder

    def __enter__(self) -> StopRequest:
        # The main thread may be inside a collective, where no Python handler runs. The interpreter's C handler writes
        # to this socket at once, and the thread that reads it can end the process.
        reader, writer = socket.socketpair()
        writer.setblocking(False)  # required by set_wakeup_fd: a signal handler must not block
        self._sockets = (reader, writer)
        self._previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._previous = {number: signal.signal(number, self._request) for number in SIGNALS}
        threading.Thread(target=self._watch, args=(reader,), name="signals", daemon=True).start()
        if self._folder is not None:  # last: the launcher signals the ranks that have this file
            (self._folder / PID_FILE).write_text(str(os.getpid()), encoding="ascii")
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        for end in self._sockets:
            end.close()
        if self._folder is not None and error is None:
            (self._folder / PID_FILE).unlink(missing_ok=True)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _watch(self, wakeups: socket.socket) -> None:
        while True:
            try:
                numbers = wakeups.recv(16)
            except OSError:
                return
            if not numbers:
                return
            self.requested = self.requested or any(number in SIGNALS for number in numbers)
            if self._folder is not None and another_rank_failed(self._folder):
                os._exit(1)  # the main thread may never return from its collective


def another_rank_failed(rank_folder: Path) -> bool:
    """Whether another rank of this host has written an error, or has ended without removing its process id."""
    for folder in rank_folder.parent.iterdir():
        if folder == rank_folder:
            continue
        if any(folder.glob("error*.json")):
            return True
        try:
            os.kill(int((folder / PID_FILE).read_text(encoding="ascii")), 0)  # signal 0: only asks whether it exists
        except (FileNotFoundError, ValueError):  # not started, ended well, or still writing the file
            continue
        except ProcessLookupError:
            return True
    return False
