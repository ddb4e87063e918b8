"""Losses, gradients and parameters of all ranks, collected in one process, and their errors against one process."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf, isnan

import torch
from torch import Tensor
from torch.distributed.tensor.placement_types import Placement

from colrow.sharding.layout import Packed, regions_at
from colrow.verifying.counters import Counts, Course
from colrow.verifying.kept_values import Path

Shards = dict[int, Tensor]
"""The local tensor of each rank."""


@dataclass
class Sharded:
    """A tensor over tp ranks: its global shape, how it is placed, and the local tensors."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    packed: Packed | None
    shards: Shards

    def error(self, complete: Tensor, tp: int, scale: float) -> float:
        """The largest difference of any rank's shard from its place in the `complete` tensor, divided by `scale`."""
        worst = 0.0
        for rank, shard in self.shards.items():
            regions = regions_at(self.shape, self.placements, (tp,), (rank,), self.packed)
            for region, place in regions.items():
                got, want = shard[place.slices], complete[region.slices]
                if got.dtype != want.dtype or not (got.is_floating_point() or got.is_complex()):  # buffers that count
                    exact = torch.promote_types(want.dtype, torch.float64)  # a complex one keeps its imaginary part
                    got, want = got.to(exact), want.to(exact)
                difference = (got - want).abs().max().item() if got.shape == want.shape else inf
                # max() drops a nan that comes second
                worst = max(worst, inf if isnan(difference) else difference)
        return worst / scale

    def disagreement(self) -> bool:
        """Whether ranks hold different values of a replicated tensor."""
        if not all(placement.is_replicate() for placement in self.placements):
            return False
        first, *others = self.shards.values()
        # fp64 sums in another order differ by 1e-15; a missing reduction by the size of a term
        limit = 1e-12 * first.abs().max().item()
        return any((other - first).abs().max().item() > limit for other in others)

    def ratio(self, complete: Tensor) -> float:
        """How many times too large rank 0's copy is, by least squares; 0 unless the tensor is replicated."""
        if not all(placement.is_replicate() for placement in self.placements):
            return 0.0
        copy = self.shards[min(self.shards)]
        # the r that minimises |copy - r complete|^2: tp where a reduction was done twice
        return ((copy * complete).sum() / complete.square().sum().clamp_min(1e-300)).item()


@dataclass
class Observed:
    """One forward, backward and optimizer step of the sharded model, on all ranks that were run.

    Attributes:
        next_losses: of another forward after the step; empty where that was not run.
    """

    losses: dict[int, float] = field(default_factory=dict)
    next_losses: dict[int, float] = field(default_factory=dict)
    gradients: dict[str, Sharded] = field(default_factory=dict)
    parameters: dict[str, Sharded] = field(default_factory=dict)
    buffers: dict[str, Sharded] = field(default_factory=dict)

    def ranks_differ(self, name: str) -> bool:
        """Whether ranks hold different gradients of a replicated parameter."""
        return name in self.gradients and self.gradients[name].disagreement()

    def merge(self, other: Observed) -> None:
        """Add another rank's observations."""
        self.losses |= other.losses
        self.next_losses |= other.next_losses
        kinds = ((self.gradients, other.gradients), (self.parameters, other.parameters), (self.buffers, other.buffers))
        for mine, theirs in kinds:
            for name, sharded in theirs.items():
                if name in mine:
                    mine[name].shards |= sharded.shards
                else:
                    mine[name] = sharded


@dataclass
class Reference:
    """Loss, gradients, updated parameters and the buffers that forward writes, of the unsharded model.

    Attributes:
        buffers: each after forward and after the step, by its name and when.
        written: the names of those buffers.
        dropout_off: the model would have dropped something.
        drew: it drew random numbers.
        decided: its code drew random numbers on the host ([Note: deciding draws]).
        clocks: that its code read, and sources of random numbers that no seed reaches.
        bounds: of integers that it drew so, how many there were to draw from.
        rounds: the model rounds to fp32.
        next_loss: of another forward after the step.
        training_failure: its exception in training mode, where the step is one in evaluation mode for that.
        outside: the numbers kept outside of the model that the step changed, as they were before it.
        counters: how each forward changes what the model counts ([Note: counters]).
        starts: the counters' numbers before the step; where `late`, behind one more forward, which made one of them.
        grows: each forward makes something longer that the model keeps.
    """

    loss: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    dropout_off: bool = False
    drew: bool = False
    decided: bool = False
    clocks: tuple[str, ...] = ()
    bounds: frozenset[int] = frozenset()
    rounds: bool = False
    next_loss: float = 0.0
    training_failure: str = ""
    outside: Counts = field(default_factory=dict)
    counters: dict[Path, Course] = field(default_factory=dict)
    starts: Counts = field(default_factory=dict)
    late: bool = False
    grows: bool = False

    def equals(self, other: Reference) -> bool:
        """Whether every number is the same, bit for bit."""
        kinds = ((self.gradients, other.gradients), (self.parameters, other.parameters), (self.buffers, other.buffers))
        return self.loss == other.loss and all(
            mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
            for mine, theirs in kinds
        )

    @property
    def scale(self) -> float:
        """The largest gradient of all: a gradient that is zero by mathematics is compared with it."""
        return max([g.abs().max().item() for g in self.gradients.values()] or [1.0])

    def size(self, name: str) -> float:
        """The size that errors of this gradient are relative to. Below 1e-5 of the largest gradient it would be
        rounding noise: a key's bias before softmax, a convolution's before a batch norm (1e-15 of it was seen). Of a
        model that rounds to fp32 below 1e-3: the tolerance is larger then, and so is the noise (1e-9 was seen)."""
        least = 1e-3 if self.rounds else 1e-5
        return max(self.gradients[name].abs().max().item(), least * self.scale, 1e-300)


@dataclass
class Errors:
    """Relative errors against the reference."""

    loss: float
    gradients: dict[str, float]
    parameters: dict[str, float]
    buffers: dict[str, float] = field(default_factory=dict)
    next_loss: float = 0.0

    @property
    def of_step(self) -> float:
        """The largest of the step, the next forward left out."""
        return max([self.loss, *self.gradients.values(), *self.parameters.values(), *self.buffers.values()])

    @property
    def worst(self) -> float:
        return max(self.of_step, self.next_loss)


def compare(observed: Observed, reference: Reference, tp: int) -> Errors:
    """Relative errors of all ranks against the unsharded model."""
    gradients = {}
    for name in reference.gradients.keys() | observed.gradients.keys():
        want, got = reference.gradients.get(name), observed.gradients.get(name)
        if want is None or got is None:
            # one of the models has no gradient: a weight is frozen, or cut off
            gradients[name] = inf
        else:
            gradients[name] = got.error(want, tp, reference.size(name))
    # 1e-300: a tensor of zeros has no scale, and any difference from it is an error
    parameters, buffers = (
        {name: got[name].error(want, tp, max(_largest(want), 1e-300)) for name, want in wanted.items()}
        for got, wanted in ((observed.parameters, reference.parameters), (observed.buffers, reference.buffers))
    )
    loss = _error_of_loss(observed.losses, reference.loss)
    return Errors(loss, gradients, parameters, buffers, _error_of_loss(observed.next_losses, reference.next_loss))


def _largest(tensor: Tensor) -> float:
    """Its largest element, by size; a boolean one has no abs."""
    largest: float = (tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor).abs().max().item()
    return largest


def _error_of_loss(losses: dict[int, float], want: float) -> float:
    error = max((abs(value - want) for value in losses.values()), default=0.0) / max(abs(want), 1e-300)
    return inf if isnan(error) else error
