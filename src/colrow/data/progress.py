"""What a long preparation shows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

import rich.progress
from rich.console import Console
from rich.markup import escape

_LINE_SECONDS = 10.0


class Progress:
    """Stages of work measured in bytes of text. Goes to stderr, so that what a command prints stays parseable.

    Args:
        shown: False shows nothing at all.
        console: where to write; stderr unless given.
    """

    def __init__(self, shown: bool, console: Console | None = None) -> None:
        self._shown = shown
        self._console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)
        self._what, self._note = "", ""
        self._total: int | None = None
        self._done = 0
        self._next_line = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._close()

    def stage(self, what: str, total: int | None = None) -> None:
        """Begin the next stage; `total` is its bytes of text, None where nobody knows."""
        self._close()
        self._what, self._total, self._done, self._note = what, total, 0, ""
        self._next_line = time.monotonic() + _LINE_SECONDS
        if not self._shown:
            return
        if self._console.is_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(),
                rich.progress.TaskProgressColumn(),
                rich.progress.TextColumn("{task.fields[note]}"),
                rich.progress.TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(escape(what), total=total, note="")
        else:
            self.say(f"data: {what} ...")

    def advance(self, text_bytes: int, note: str = "") -> None:
        """`text_bytes` more of this stage are done; `note` stands beside the bar."""
        self._done += text_bytes
        self._note = note
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=escape(note))
        elif self._shown and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_SECONDS
            share = f"{min(self._done / self._total, 1.0):.0%}, " if self._total else ""
            self.say(f"data: {self._what}: {share}{self._done / 1e6:,.0f} MB{', ' + note if note else ''}")

    def say(self, line: str) -> None:
        """One line, beside the bar or alone."""
        if self._shown:
            self._console.print(line, markup=False, highlight=False)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
