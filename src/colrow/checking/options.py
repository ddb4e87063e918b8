"""What a dry run shows beside the options of a training loop: mixed precision, and blocks that are compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from colrow.checking.finding import Finding, finding
from colrow.dryrun.module_tracker import LOSS
from colrow.dryrun.result import DryRun

_SUMS = ("all_reduce", "reduce_scatter")
COMPILED_BLOCKS_WAIT = torch.__version__.startswith("2.11.")
"""Whether a compiled block waits for a collective that fills its input: in torch 2.11 it does, in 2.13 not."""


def check_options(run: DryRun, reduce_dtype: torch.dtype | None, compiled: bool) -> list[Finding]:
    """Findings for a caller who passes the dtype in which sums are expected, or compiles the blocks."""
    if run.reference_failure is not None or run.failure is not None:
        return []
    return [*_sums(run, reduce_dtype), *(_inputs(run) if compiled else ())]


def _sums(run: DryRun, wanted: torch.dtype | None) -> Iterator[Finding]:
    """Sums over tp keep the type that the model computes in; `reduce_dtype` is for the data axes."""
    if wanted is None:
        return
    rounded = [
        c
        for c in run.collectives
        if c.op in _SUMS and c.where != LOSS and getattr(torch, c.dtype).itemsize < wanted.itemsize
    ]
    if rounded:
        number, size = sum(c.times for c in rounded), sum(c.times * c.bytes for c in rounded)
        message = (
            f"{number} sums over tp in a step ({size} bytes) are made in {rounded[0].dtype}: reduce_dtype="
            f"{str(wanted).removeprefix('torch.')} applies to the sums over the data axes alone"
        )
        fix = "expect it (tensor-parallel training mostly does so), or compute the modules that need it in that type"
        yield finding("CR411", "tp", message, fix)


def _inputs(run: DryRun) -> Iterator[Finding]:
    if COMPILED_BLOCKS_WAIT:
        return
    for block in run.async_inputs:
        message = (
            "its input is the result of a collective that nothing has waited for; a compiled block takes it without "
            "the node of `to_local`, and backward raises: 'Tensor' object has no attribute '_local_tensor'"
        )
        fix = (
            "wait for the collective before the block (a norm, a dropout, an addition do), or compile the model at once"
        )
        yield finding("CR412", block, message, fix)
