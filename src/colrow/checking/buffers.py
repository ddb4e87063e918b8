"""Buffers that forward writes: running statistics, moving averages, a router's bias."""

from __future__ import annotations

from collections.abc import Iterator

from colrow.checking.finding import Finding, finding
from colrow.dryrun.result import DryRun


def check_buffers(run: DryRun) -> Iterator[Finding]:
    """Findings for buffers that each rank writes from its own shard of the activations."""
    if run.failure is not None:
        return
    for name in run.varying_buffers:
        message = (
            "forward writes it from this rank's shard, so each rank has values of its own, and a checkpoint keeps one "
            "rank's"
        )
        fix = "sum what it writes over tp in forward, or write it in a module of its own that gets the complete tensor"
        yield finding("CR415", name, message, fix)
