"""A log of each host in the run's folder, `logs/HOST.log`: what its ranks have written to stderr, and how they ended.

A child process of each rank, forked before the rank has threads, copies the rank's stderr to where it went before and
into the log, with the rank's number before each line. So the lines of a rank that is killed, or that aborts in C++, are
there too, and can be shown.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

FOLDER = "logs"
_STDERR = 2
_LINES = 12
"""How many lines of a rank that failed are shown."""
_LONGEST_LINE, _MOST_FILES = 4096, 4096  # bytes after which a line is broken; file descriptors that are closed
_COPIED_SECONDS = 2.0  # for the child to copy what is left when the rank ends
_LINE = re.compile(r"rank (\d+)\| (.*)")
_BEGINS = "begins "
_FAILED = re.compile(r"failed at ([\d.]+)")


class HostLog:
    """This rank's part of its host's log. Where the run's folder cannot be written, nothing is kept.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self.run, self._prefix, self._file, self._child = run, f"rank {rank}| ", -1, 0
        with suppress(OSError):
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            # appended to by several processes, each line or block of lines by one write
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK  # no link to another file, no pipe that nobody reads
            self._file = os.open(run / FOLDER / f"{socket.gethostname()}.log", flags, 0o644)
        self.write(f"{_BEGINS}{time.strftime('%Y-%m-%d %H:%M:%S')}, process {os.getpid()}")

    def write(self, text: str) -> None:
        """Add lines of this rank."""
        if self._file >= 0:
            lines = "".join(f"{self._prefix}{line}\n" for line in text.splitlines())
            with suppress(OSError):  # a full disk is an error of what the run needs, not of its log
                os.write(self._file, lines.encode())

    def write_failure(self, when: float, text: str) -> None:
        """Say how this rank fails. `when`: seconds of the epoch."""
        self.write(f"failed at {when:.1f}\n{text}")

    def copy_stderr(self) -> None:
        """Copy what this process and its children write to stderr from now on. Forks: before there are threads."""
        if self._file < 0:
            return
        reading, writing = os.pipe()
        terminal = os.dup(_STDERR)
        self._child = os.fork()
        # The child leaves the rank's process group, which the launcher kills: it has to outlive the rank, to copy its
        # last lines. Both processes call this (0 means oneself), so that neither goes on before it is done.
        with suppress(PermissionError):
            os.setpgid(self._child, self._child)
        if self._child == 0:
            os.close(writing)
            self._copy(reading, terminal)
        os.dup2(writing, _STDERR)
        for fd in (reading, writing, terminal):
            os.close(fd)

    def close(self) -> None:
        """Wait until what was written is copied; not for longer than two seconds, for a child may hold stderr open."""
        if not self._child:
            return
        os.close(_STDERR)
        end = time.monotonic() + _COPIED_SECONDS
        with suppress(ChildProcessError):
            while os.waitpid(self._child, os.WNOHANG)[0] == 0 and time.monotonic() < end:
                time.sleep(0.005)

    def _copy(self, reading: int, terminal: int) -> NoReturn:
        """What the child does: copy until no process has this stderr open. Signals that the rank gets do not end it."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
                signal.signal(number, signal.SIG_IGN)
            kept = sorted({reading, terminal, self._file})
            for fd, next_fd in pairwise([_STDERR, *kept, _MOST_FILES]):
                os.closerange(fd + 1, next_fd)  # a pipe kept open here would not end for its reader when the rank does
            null = os.open(os.devnull, os.O_RDWR)
            for fd in range(_STDERR + 1):
                os.dup2(null, fd)
            rest = b""
            while data := os.read(reading, 65536):
                with suppress(OSError):
                    os.write(terminal, data)
                *lines, rest = (rest + data).split(b"\n")
                if len(rest) > _LONGEST_LINE:
                    lines, rest = [*lines, rest], b""
                if lines:
                    self.write(b"\n".join(lines).decode(errors="replace"))
            if rest:
                self.write(rest.decode(errors="replace"))
        finally:
            os._exit(0)


def last_lines(run: Path, rank: int) -> list[str]:
    """The last lines of a rank since it began, on whichever host it began last; empty where it has written none."""
    lines: deque[str] = deque(maxlen=_LINES)
    for path in sorted(_logs(run), key=lambda path: path.stat().st_mtime):
        for _, text in _lines(path, rank):
            if text.startswith(_BEGINS):
                lines.clear()
            else:
                lines.append(text)
    return list(lines)


def failed_rank(run: Path, since: float) -> tuple[int, str] | None:
    """The rank that has failed first, and its host; None where none has since a time, in seconds of the epoch.

    Times are of the hosts' own clocks.
    """
    found: list[tuple[float, int, str]] = []
    for path in _logs(run):
        for rank, text in _lines(path):
            if match := _FAILED.match(text):
                found.append((float(match[1]), rank, path.stem))
    first = min((each for each in found if each[0] >= since), default=None)
    return None if first is None else first[1:]


def _logs(run: Path) -> list[Path]:
    return sorted(path for path in (run / FOLDER).glob("*.log") if path.is_file())


def _lines(path: Path, rank: int | None = None) -> Iterator[tuple[int, str]]:
    """The ranks' lines, or those of one rank."""
    with suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            match = _LINE.match(line)
            if match is not None and rank in (None, int(match[1])):
                yield int(match[1]), match[2]
