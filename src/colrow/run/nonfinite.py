"""Steps whose loss or gradient is NaN or infinite, or jumps: what is kept of them, and when they end the run.

`train/step.py` leaves the update of a step that is not finite out where `train.on_nonfinite` is skip; here is its
record. A jump (jumps.py) is recorded alone: clipping has bounded its update.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable

from colrow.checkpoint.distributed import Checkpoints
from colrow.config import RunConfig
from colrow.data.disk import writing
from colrow.errors import ColrowError
from colrow.run.jumps import Jumps
from colrow.train.metrics import Record, truncate

FILE = "nonfinite.jsonl"
"""In the run's folder: one object for each such step, with the position of its batch (resume.py, [Note: position])."""

MOST_IN_A_ROW = 10
"""Skipped steps that end the run: their batches differ, so it is the weights that give no finite loss any more."""

MOST_LINES = 10
"""Jumps that are printed; the file has all."""

_KEPT = ("step", "loss", "grad_norm", "lr", "tokens", "position")


class DivergedError(ColrowError):
    """The loss or the gradient is NaN or infinite."""


class NonfiniteSteps:
    """Looks at each step's record, and keeps those that are not finite, or jump.

    Args:
        skipped: steps that the run has skipped so far.
        writes: whether this rank writes the file.
        say: prints a line.

    Attributes:
        skipped: steps that the run has skipped, those before a resume included.
        jumped: jumps since this start.
        last_finite: the newest record of a finite step; None before the first.
    """

    def __init__(
        self, config: RunConfig, checkpoints: Checkpoints, skipped: int, writes: bool, say: Callable[[str], None]
    ) -> None:
        self._config, self._checkpoints, self._writes, self._say = config, checkpoints, writes, say
        self._in_a_row = 0
        self._jumps = Jumps()
        self.skipped, self.jumped = skipped, 0
        self.last_finite: Record | None = None

    def go_on_after(self, step: int) -> None:
        """Remove the lines of steps after `step`, which will be run again, as `Metrics` does. Those of a stop stay."""
        path = self._config.run.dir / FILE
        if self._writes and path.exists():
            with writing(path):
                truncate(path, step, lambda line: line.get("action") == "stop")

    def examine(self, record: Record, position: int) -> Record:
        """The record to write: with `skipped` in a run that skips, with `position` where the step was not finite or
        jumped, and then with `jump`, what jumped.

        Args:
            position: sequences that were consumed before the step's batch.

        Raises:
            DivergedError: the step is not finite, and the run stops.
        """
        skips = self._config.train.on_nonfinite == "skip"
        if math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]):
            self._in_a_row, self.last_finite = 0, record
            if what := self._jumps.examine(record):
                record = self._jumped(record | {"position": position, "jump": what})
            return record | {"skipped": self.skipped} if skips else record
        record = record | {"position": position}
        self._in_a_row += 1
        stops = not skips or self._in_a_row == MOST_IN_A_ROW
        if self._writes:
            self._keep(record, "stop" if stops else "skip")
        if stops:
            raise self.diverged(record)
        self.skipped += 1
        self._say(f"skipped    {_figures(record)}: the batch after {position:,} sequences")
        return record | {"skipped": self.skipped}

    def _jumped(self, record: Record) -> Record:
        self.jumped += 1
        if self._writes:
            self._keep(record, "jump")
        if self.jumped <= MOST_LINES:
            self._say(
                f"jump       step {record['step']}: {record['jump']};\n"
                f"           its batch is the one after {record['position']:,} sequences"
            )
        return record

    def diverged(self, record: Record) -> DivergedError:
        """The error that ends the run at a step."""
        good, kept, run = self.last_finite, self._checkpoints.latest(), self._config.run.dir
        last = f"the last finite loss was {good['loss']:.4f} at step {good['step']}" if good else "no step was finite"
        keeps = f"{kept.path} is kept" if kept else "there is no checkpoint yet"
        skipped = f" after {self._in_a_row - 1} skipped steps" if self._in_a_row > 1 else ""
        batch = (
            f"; its batch is the one after {record['position']:,} sequences ({run / FILE})" if self._in_a_row else ""
        )
        return DivergedError(
            f"{_figures(record)}: the run has diverged and stops{skipped}; {last}; {keeps}{batch}. "
            "Try a lower train.lr, a longer train.warmup_steps, or a smaller train.grad_clip"
        )

    def _keep(self, record: Record, action: str) -> None:
        """NaN and infinite values stand in the file as Python's json writes them."""
        entry = {key: record[key] for key in _KEPT} | {"action": action}
        path = self._config.run.dir / FILE
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def _figures(record: Record) -> str:
    return f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}"
