"""Steps that are finite and far from those before them: the usual sign of a bad batch or a rate that is too high."""

from __future__ import annotations

from collections import deque
from statistics import median

from colrow.train.metrics import Record

WINDOW, LEAST = 32, 16
"""Steps that a step is compared with; before there are `LEAST`, as in warm-up, none is a jump."""

NORM_FACTOR, LOSS_FACTOR, LOSS_RISE = 10.0, 1.5, 0.5
"""A jump: the gradient norm is above 10 medians; or the loss is above 1.5 medians, and 0.5 above the median, since a
loss near zero doubles by chance."""


class Jumps:
    """Compares each finite step with the medians of those before it. A level that lasts becomes the usual one."""

    def __init__(self) -> None:
        self._losses, self._norms = deque[float](maxlen=WINDOW), deque[float](maxlen=WINDOW)

    def examine(self, record: Record) -> str:
        """What jumped, with the median; empty where nothing did."""
        loss, norm, found = record["loss"], record["grad_norm"], []
        if len(self._losses) >= LEAST:
            usual_loss, usual_norm = median(self._losses), median(self._norms)
            if loss > max(LOSS_FACTOR * usual_loss, usual_loss + LOSS_RISE):
                found.append(f"loss {loss:.4g} after a median of {usual_loss:.4g}")
            if norm > NORM_FACTOR * usual_norm:
                found.append(f"gradient norm {norm:.4g} after a median of {usual_norm:.4g}")
        self._losses.append(loss)
        self._norms.append(norm)
        return ", ".join(found)
