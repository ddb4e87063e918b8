"""What ranks hold, collected in one process: losses, gradients, parameters; and how far it is from the whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor
from torch.distributed.tensor.placement_types import Placement

from colrow.sharding.layout import Packed, boxes_at

Parts = dict[int, Tensor]
"""A local tensor for each rank."""


@dataclass
class Sharded:
    """A tensor that is spread over tp ranks."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    packed: Packed | None
    parts: Parts

    def error(self, whole: Tensor, tp: int, scale: float) -> float:
        """The largest difference of any rank's part from its place in `whole`, over `scale`."""
        worst = 0.0
        for rank, part in self.parts.items():
            for box in boxes_at(self.shape, self.placements, (tp,), (rank,), self.packed):
                got, want = part[box.local_slices], whole[box.global_slices]
                difference = (got - want).abs().max().item() if got.shape == want.shape else float("inf")
                worst = max(worst, difference if difference == difference else float("inf"))
        return worst / scale

    def disagreement(self) -> bool:
        """Whether ranks hold different values of what is declared whole on each."""
        if not all(placement.is_replicate() for placement in self.placements):
            return False
        first, *others = self.parts.values()
        limit = 1e-12 * first.abs().max().item()
        return any((other - first).abs().max().item() > limit for other in others)

    def ratio(self, whole: Tensor) -> float:
        """How many times too large rank 0's copy is; 0 unless it is a copy."""
        if not all(placement.is_replicate() for placement in self.placements):
            return 0.0
        part = self.parts[min(self.parts)]
        return ((part * whole).sum() / whole.square().sum().clamp_min(1e-300)).item()


@dataclass
class Observed:
    """One forward, backward and optimizer step of the sharded model, on all ranks that were run."""

    losses: dict[int, float] = field(default_factory=dict)
    gradients: dict[str, Sharded] = field(default_factory=dict)
    parameters: dict[str, Sharded] = field(default_factory=dict)

    def merge(self, other: Observed) -> None:
        """Add what another rank saw."""
        self.losses |= other.losses
        for mine, theirs in ((self.gradients, other.gradients), (self.parameters, other.parameters)):
            for name, sharded in theirs.items():
                if name in mine:
                    mine[name].parts |= sharded.parts
                else:
                    mine[name] = sharded


@dataclass
class Reference:
    """The same of the unsharded model."""

    loss: float
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]

    @property
    def scale(self) -> float:
        """The largest gradient of all: what a gradient that is zero by mathematics is compared with."""
        return max([g.abs().max().item() for g in self.gradients.values()] or [1.0])

    def size(self, name: str) -> float:
        """What an error of this gradient is relative to: below a millionth of the largest one it is rounding, such as
        that of a key's bias before softmax."""
        return max(self.gradients[name].abs().max().item(), 1e-6 * self.scale)


@dataclass
class Errors:
    """Relative errors against the reference."""

    loss: float
    gradients: dict[str, float]
    parameters: dict[str, float]

    @property
    def worst(self) -> float:
        return max([self.loss, *self.gradients.values(), *self.parameters.values()])


def compare(observed: Observed, reference: Reference, tp: int) -> Errors:
    """How far the ranks are from the unsharded model."""
    gradients = {}
    for name in reference.gradients.keys() | observed.gradients.keys():
        want, got = reference.gradients.get(name), observed.gradients.get(name)
        if want is None or got is None:
            gradients[name] = float("inf")
        else:
            gradients[name] = got.error(want, tp, reference.size(name))
    parameters = {
        name: observed.parameters[name].error(want, tp, max(want.abs().max().item(), 1e-300))
        for name, want in reference.parameters.items()
    }
    losses = observed.losses.values()
    loss = max(abs(value - reference.loss) for value in losses) / max(abs(reference.loss), 1e-300)
    return Errors(loss if loss == loss else float("inf"), gradients, parameters)
