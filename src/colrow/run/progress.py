"""What a run shows while it trains: a bar on a terminal, a line now and then elsewhere. Fits 80 columns."""

from __future__ import annotations

import os
import sys
from types import TracebackType
from typing import TextIO

import rich.progress
from rich.console import Console
from rich.markup import escape

from colrow.train.metrics import Record


class Progress:
    """Shows steps and lines on the first rank, nothing on the others.

    Args:
        shown: whether this is the rank that speaks.
        steps: of the whole run.
        log_every: steps between lines where there is no terminal.
    """

    def __init__(self, shown: bool, steps: int, log_every: int, file: TextIO | None = None) -> None:
        self.shown, self._steps, self._log_every = shown, steps, log_every
        self._file = file or sys.stdout
        self._console = Console(file=self._file, highlight=False)
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)

    def start(self, step: int) -> None:
        """Begin to show steps, after `step` of them."""
        if not self.shown or not self._console.is_terminal:
            return
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=self._steps, completed=step, note="")
        self._bar.start()

    def step(self, record: Record) -> None:
        """Show a step's record; one that was evaluated, and on a terminal every `log_every`th, leaves a line."""
        if not self.shown:
            return
        step = record["step"]
        if self._bar is not None:
            note = f"loss {record['loss']:.3f}  {_rate(record['tokens_per_second'])} tok/s"
            self._bar.update(self._task, completed=step, note=escape(note))
        if step % self._log_every == 0 or step in (1, self._steps) or "val_loss" in record:
            self.say(step_line(record, self._steps))

    def say(self, text: str) -> None:
        """Lines for people, above the bar."""
        if not self.shown:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, soft_wrap=True)
            return
        try:
            print(text, file=self._file, flush=True)
        except BrokenPipeError:  # `colrow train ... | head`: the run goes on
            self._file = open(os.devnull, "w")  # noqa: SIM115

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()


def step_line(record: Record, steps: int) -> str:
    """A step as a line of less than 80 columns."""
    width = len(str(steps))
    line = (
        f"step {record['step']:{width}}/{steps}  loss {record['loss']:.4f}  norm {record['grad_norm']:.3g}  "
        f"lr {record['lr']:.1e}  {_rate(record['tokens_per_second'])} tok/s"
    )
    if "mfu_causal" in record:
        line += f"  MFU {record['mfu_causal']:.0%}"
    if "val_loss" in record:
        line += (
            f"\n     {'':{2 * width}}   validation loss {record['val_loss']:.4f}  perplexity {record['perplexity']:.1f}"
        )
    return line


def _rate(tokens_per_second: float) -> str:
    return f"{tokens_per_second:,.0f}"
