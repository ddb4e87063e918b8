"""Finds out whether a run is CPU-bound, its GPU idle between kernels: nothing but the speed would show it."""

from __future__ import annotations

from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.run.progress import labelled
from colrow.train.cuda_graph import check_cuda_graph

STEPS = 10
"""Steps that are looked at, after compilation and capture."""
_SETTLING = 2  # steps before these, in which the allocator and the clocks settle
_REQUIRED = 8  # of STEPS: one slow step of the host does not make a run CPU-bound


class CpuBoundDetector:
    """Compares how long the host waits for the end of a step, with the next step queued on the GPU already.

    A GPU that is behind makes the host wait for most of a step. A host that never waits keeps the GPU waiting.

    Args:
        after: steps that do not count.
    """

    def __init__(self, after: int) -> None:
        self._skip = after + _SETTLING
        self._without_wait: list[bool] = []

    def add(self, waited: float, step: float) -> bool:
        """Take the seconds that the host waited for a step, and those of the step. True once: the run is CPU-bound."""
        if self._skip > 0:
            self._skip -= 1
            return False
        if len(self._without_wait) == STEPS:
            return False
        self._without_wait.append(waited < 0.02 * step)
        return len(self._without_wait) == STEPS and sum(self._without_wait) >= _REQUIRED


def hint_line(config: RunConfig) -> str:
    """What a user can change, within 80 columns."""
    fixes = ["a larger train.micro_batch"]
    if not config.train.cuda_graph and _can_be_captured(config):
        fixes.insert(0, "train.cuda_graph: true")
    return labelled("hint", f"GPU idle between kernels (CPU-bound): try {' or '.join(fixes)}")


def _can_be_captured(config: RunConfig) -> bool:
    captured = config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": True})})
    try:
        check_cuda_graph(captured, "cuda")
    except ConfigError:
        return False
    return True
