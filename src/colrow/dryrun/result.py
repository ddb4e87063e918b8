"""What a dry run observed, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from colrow.dryrun.recorded_calls import RecordedCall
from colrow.dryrun.unproven import Unproven

Pass = Literal["forward", "backward"]
Shape = tuple[int, ...]
Problem = Literal[
    "varying_as_replicate",
    "equal_as_shard",
    "equal_as_partial",
    "equal_summed",
    "addend_summed",
]


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
        op: all_gather, reduce_scatter, all_reduce, all_to_all or broadcast.
        where: the module that it belongs to, `loss` for the loss.
        pass_: forward or backward.
        bytes: of the larger side, on one rank: an all-gather's output, a reduce-scatter's input.
        dtype: of the tensor that is sent.
        cause: the style and the change of placement behind it.
        implicit: DTensor moved the data because an operation needed it; no style declared it.
        repeated: the same tensor was gathered before in this pass.
        times: how many modules of the model it stands for; of equal blocks, only the first one or two are run.
    """

    op: str
    where: str
    pass_: Pass
    bytes: int
    dtype: str
    cause: str
    implicit: bool = False
    repeated: bool = False
    times: int = 1

    def to_data(self) -> dict[str, Any]:
        """The collective as `colrow plan --json` prints it."""
        return {"op": self.op, "where": self.where, "pass": self.pass_, "bytes": self.bytes, "dtype": self.dtype,
                "cause": self.cause, "axis": "tp", "times": self.times}  # fmt: skip


@dataclass(frozen=True)
class PlacementMismatch:
    """A declaration or a sum that does not fit its tensor: see [Note: equal and varying] in `values.py`.

    Attributes:
        problem: the first three are declarations; `equal_summed` and `addend_summed` are sums over ranks that count a
            value tp times.
        param: the name of the parameter whose gradient it is; empty for an activation.
        dim: the sharded dim, for `equal_as_shard`.
    """

    problem: Problem
    where: str
    backward: bool
    param: str = ""
    dim: int | None = None


@dataclass(frozen=True)
class Output:
    """A module's output, if it is a tensor: the global shape of a DTensor, the local shape of a plain one."""

    shape: Shape
    is_dtensor: bool


@dataclass(frozen=True)
class Failure:
    """The run ended with an exception in this module."""

    error: Exception
    where: str
    backward: bool


@dataclass
class DryRun:
    """What a step showed.

    Attributes:
        collectives: in order, for the blocks that were run (see `Collective.times`).
        mismatches: placements that do not fit their tensors, in order.
        outputs, reference_outputs: each module's outputs in the sharded and in the unsharded run, one entry a call.
        calls, reference_calls: reshapes, splits, reductions and attentions in the model's own code, by module.
        failure: the sharded run's exception, if any.
        reference_failure: the unsharded run's; then nothing else is known.
        no_gradient: parameters that got a gradient in the unsharded run alone.
        logits, reference_logits: the model's output, sharded and not.
        unmatched_log_softmaxes: log-softmaxes of sharded logits that no cross entropy took.
        varying_buffers: buffers into which forward wrote values that differ between ranks.
        flops, reference_flops: of matrix products, convolutions and attentions in forward, on one rank and unsharded.
        dtype: of floating-point parameters, where it was another than the model's own.
        async_inputs: blocks whose input is the result of a collective, with nothing but views between.
        unproven: as of `lockstep.unproven_operators`; None where nobody looked.
    """

    collectives: list[Collective] = field(default_factory=list)
    mismatches: list[PlacementMismatch] = field(default_factory=list)
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    reference_outputs: dict[str, list[Output]] = field(default_factory=dict)
    calls: dict[str, list[RecordedCall]] = field(default_factory=dict)
    reference_calls: dict[str, list[RecordedCall]] = field(default_factory=dict)
    failure: Failure | None = None
    reference_failure: Failure | None = None
    no_gradient: list[str] = field(default_factory=list)
    logits: Output | None = None
    reference_logits: Output | None = None
    unmatched_log_softmaxes: int = 0
    async_inputs: list[str] = field(default_factory=list)
    varying_buffers: list[str] = field(default_factory=list)
    flops: int = 0
    reference_flops: int = 0
    dtype: torch.dtype | None = None
    unproven: list[Unproven] | None = None

    def flops_split(self, tp: int) -> float | None:
        """The share of the forward's floating-point operations that is split over tp; None where it is not known."""
        if self.failure is not None or not self.reference_flops or tp == 1:
            return None
        left = self.flops / self.reference_flops  # (1 - share) + share / tp
        return min(1.0, max(0.0, (1 - left) / (1 - 1 / tp)))
