"""A process that kills itself in the middle of a write, for tests of what is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, NoReturn


class KillableFile:
    """An open file. A write at which `reached()` is true is the last thing that this process does: half of it."""

    def __init__(self, file: Any, reached: Callable[[], bool]) -> None:
        self._file, self._reached = file, reached

    def __enter__(self) -> KillableFile:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> Any:
        if self._reached():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            kill()
        return self._file.write(data)


def kill() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("killed")
