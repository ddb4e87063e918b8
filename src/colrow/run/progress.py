"""What a run shows while it trains. Fits 80 columns."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import TextIO

import rich.progress
from rich.console import Console

from colrow.data.progress import ProgressBar
from colrow.train.metrics import Record


def labelled(label: str, text: str) -> str:
    """A printed line of a run, `label      text`, broken between words at 80 columns."""
    line = f"{label:<10} {text}"
    return textwrap.fill(line, 80, subsequent_indent=" " * 11, break_on_hyphens=False, break_long_words=False)


class TrainingProgress(ProgressBar):
    """Shows steps and lines on the first rank, nothing on the others.

    Args:
        shown: whether this is the rank that prints.
        steps: of the complete run.
        log_every: steps between lines.
        log: gets the lines that are shown, too.
    """

    def __init__(
        self,
        shown: bool,
        steps: int,
        log_every: int,
        file: TextIO | None = None,
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        super().__init__(shown, Console(file=file or sys.stdout, highlight=False))
        self._steps, self._log_every, self._log = steps, log_every, log

    def __enter__(self) -> TrainingProgress:
        return self

    def say(self, text: str) -> None:
        if self.shown:
            self._log(text)
        super().say(text)

    def start(self, step: int) -> None:
        """Begin to show steps, after `step` of them."""
        self._start_bar(
            rich.progress.TextColumn("step {task.completed}/{task.total}"),
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TextColumn("{task.fields[note]}"),
            rich.progress.TimeRemainingColumn(),
            total=self._steps,
            completed=step,
        )

    def step(self, record: Record) -> None:
        """Show a step's record: in the bar; and as a line, if it was evaluated and every `log_every` steps."""
        step = record["step"]
        self._move_bar(step, f"loss {record['loss']:.3f}  {_rate(record['tokens_per_second'])} tok/s")
        if step % self._log_every == 0 or step in (1, self._steps) or "val_loss" in record:
            self.say(step_line(record, self._steps))


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
