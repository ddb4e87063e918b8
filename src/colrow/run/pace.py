"""Whether the CPU sets a run's pace: the GPU waits for its next kernel, and nothing but the speed would tell."""

from __future__ import annotations

import textwrap

from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.train.cuda_graph import check_cuda_graph

STEPS = 10
"""Looked at, after compilation and capture."""
_SKIPPED = 2  # steps in which allocator and clocks settle
_MOST = 8  # of STEPS: a hiccup of the host is no pace


class Pace:
    """Compares how long the host waits for a step's end, with the next step given to the GPU already.

    Where the GPU is behind, the host waits for most of a step. A host that never waits is what the GPU waits for.

    Args:
        after: steps that do not count.
    """

    def __init__(self, after: int) -> None:
        self._left = after + _SKIPPED
        self._seen: list[bool] = []

    def add(self, waited: float, step: float) -> bool:
        """Seconds of a step that the host waited, and the step's own. True once: the CPU sets the pace."""
        if self._left > 0:
            self._left -= 1
            return False
        if len(self._seen) == STEPS:
            return False
        self._seen.append(waited < 0.02 * step)
        return len(self._seen) == STEPS and sum(self._seen) >= _MOST


def pace_line(config: RunConfig) -> str:
    """What a user can do about it, within 80 columns."""
    mends = ["a larger train.micro_batch"]
    if not config.train.cuda_graph and _could_be_captured(config):
        mends.insert(0, "train.cuda_graph: true")
    said = f"pace       the CPU sets it, and the GPU waits for its next kernel: try {' or '.join(mends)}"
    return textwrap.fill(said, 80, subsequent_indent=" " * 11, break_on_hyphens=False)


def _could_be_captured(config: RunConfig) -> bool:
    asked = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": True})})
    try:
        check_cuda_graph(asked, "cuda")
    except ConfigError:
        return False
    return True
