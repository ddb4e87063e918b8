"""A line for a user who waits: what a derivation is doing, once it has taken some seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

FIRST, NEXT = 5.0, 30.0
"""Seconds before the first line, and between the following ones."""


class Progress:
    """Within: says from a thread of its own what goes on, when it takes long. A thread, because one export of a large
    model takes longer than a user waits."""

    def __init__(self, what: str, say: Callable[[str], None] | None, first: float = FIRST, then: float = NEXT) -> None:
        self._what, self._say, self._waits = what, say, (first, then)
        self._phase = ""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True) if say is not None else None

    def at(self, phase: str) -> None:
        """What begins now."""
        self._phase = phase

    def __enter__(self) -> Progress:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()  # who forks later counts threads

    def _run(self) -> None:
        assert self._say is not None
        start, (wait, then) = time.monotonic(), self._waits
        while not self._ended.wait(wait):
            self._say(f"{self._what}: {self._phase}, {time.monotonic() - start:.0f} s so far")
            wait = then
