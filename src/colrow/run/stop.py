"""SIGINT and SIGTERM: a request to finish the step and save, or the end when another rank is lost.

The launcher ends the remaining ranks of a failed run with the same SIGTERM that a user sends to stop a good one. A
rank tells the two apart by its neighbours: each writes its process id beside the error file that the launcher gave
it. When a neighbour has left an error, or is gone without a word, this rank's collectives would wait for it forever.
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
    """`requested` turns true at the first SIGINT or SIGTERM.

    Args:
        rank_folder: this rank's folder, beside those of the other ranks of this host; None when there is no launcher.
    """

    def __init__(self, rank_folder: Path | None) -> None:
        self.requested = False
        self._folder = rank_folder

    def __enter__(self) -> StopRequest:
        if self._folder is not None:
            (self._folder / PID_FILE).write_text(str(os.getpid()), encoding="ascii")
        # The main thread may be inside a collective, where no Python handler runs. The interpreter's C handler writes
        # to this socket at once, and the thread that reads it can end the process.
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._sockets = (ours, theirs)
        self._former_fd = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, self._request) for number in SIGNALS}
        threading.Thread(target=self._watch, args=(ours,), name="signals", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        for end in self._sockets:
            end.close()
        if self._folder is not None and error is None:
            (self._folder / PID_FILE).unlink(missing_ok=True)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True

    def _watch(self, wakeups: socket.socket) -> None:
        while True:
            try:
                if not wakeups.recv(16):
                    return
            except OSError:
                return
            if self._folder is not None and lost_neighbour(self._folder):
                os._exit(1)


def lost_neighbour(rank_folder: Path) -> bool:
    """Whether a rank beside this one has written an error or has ended without taking its process id away."""
    for folder in rank_folder.parent.iterdir():
        if folder == rank_folder:
            continue
        if any(folder.glob("error*.json")):
            return True
        try:
            os.kill(int((folder / PID_FILE).read_text(encoding="ascii")), 0)
        except (FileNotFoundError, ValueError):
            continue
        except ProcessLookupError:
            return True
    return False
