"""What a command shows while it works: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import os
import time
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.markup import escape

_LINE_SECONDS = 10.0


class ProgressBar:
    """A bar while the console is a terminal, and lines above it. Lines alone elsewhere.

    Args:
        shown: False shows nothing at all.
    """

    def __init__(self, shown: bool, console: Console) -> None:
        self.shown, self._console = shown, console
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)

    def say(self, text: str) -> None:
        """Lines for people."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            return
        try:
            print(text, file=self._console.file, flush=True)
        except BrokenPipeError:  # `colrow train ... | head`: the run goes on
            self._console.file = open(os.devnull, "w")  # noqa: SIM115

    def stop(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _start_bar(
        self, *columns: rich.progress.ProgressColumn, what: str = "", total: int | None, completed: int = 0
    ) -> None:
        if not self.shown or not self._console.is_terminal:
            return
        self._bar = rich.progress.Progress(*columns, console=self._console, transient=True)
        self._task = self._bar.add_task(escape(what), total=total, completed=completed, note="")
        self._bar.start()

    def _move_bar(self, completed: int, note: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, note=escape(note))

    def __exit__(
        self, exc_type: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()


class PreparationProgress(ProgressBar):
    """Stages of work measured in bytes of text. Goes to stderr, so that what a command prints stays parseable.

    Args:
        console: where to write; stderr unless given.
    """

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        super().__init__(shown, console or Console(stderr=True, soft_wrap=True, highlight=False))
        self._what = ""
        self._total: int | None = None
        self._done = 0
        self._next_line = 0.0

    def __enter__(self) -> PreparationProgress:
        return self

    def stage(self, what: str, total: int | None = None) -> None:
        """Begin the next stage; `total` is its bytes of text, None where that is not known."""
        self.stop()
        self._what, self._total, self._done = what, total, 0
        self._next_line = time.monotonic() + _LINE_SECONDS
        self._start_bar(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(),
            rich.progress.TaskProgressColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeElapsedColumn(),
            what=what,
            total=total,
        )
        if self._bar is None:
            self.say(f"data: {what} ...")

    def advance(self, text_bytes: int, note: str = "") -> None:
        """`text_bytes` more of this stage are done; `note` stands beside the bar."""
        self._done += text_bytes
        self._move_bar(self._done, note)
        if self._bar is None and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            share = f"{min(self._done / self._total, 1.0):.0%}, " if self._total else ""
            self.say(f"data: {self._what}: {share}{self._done / 1e6:,.0f} MB{', ' + note if note else ''}")
