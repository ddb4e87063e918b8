"""What a local tensor is of the tensor that one process would hold: equal to it, a shard of it, or a term of a sum."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from colrow.torch_compat import StridedShard


class Kind(Enum):
    """The relation of a local tensor to the unsharded one."""

    REPLICATED = auto()
    SHARDED = auto()
    PARTIAL = auto()
    """The sum over ranks is the unsharded tensor."""
    POSITIONS = auto()
    """Positions along `dim` that are counted on a shard from 0; see `sharding.positions`."""
    STYLE = auto()
    """An intermediate result of a style's own arithmetic, which the style's tests prove."""
    UNKNOWN = auto()
    """Reported already: what follows from it is not reported again."""


@dataclass(frozen=True)
class Layout:
    """A relation; of a shard also the dim and `segments`, the sizes of which that dim is made and each of which is
    sharded on its own (see [Note: segments]). No segments: the dim is sharded as one.

    [Note: repeated heads]
    Where the kv heads do not divide by the ranks, a rank holds those that its query heads need, and neighbours hold
    some of the same. What the ranks hold together is the unsharded tensor with heads repeated, so that every query
    head still meets its own; its shards are plain ones. Then `segments` are the sizes with the repeats, and `repeated`
    the sizes in the unsharded tensor.
    """

    kind: Kind
    dim: int = -1
    segments: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()
    complete: tuple[int, ...] = ()

    def sizes(self, extent: int) -> tuple[int, ...]:
        """The segments of a sharded dim with this extent."""
        return self.segments or (extent,)

    def placement(self) -> Placement | None:
        """DTensor's name for it; None where it has none."""
        if self.kind is Kind.REPLICATED:
            return Replicate()
        if self.kind is Kind.PARTIAL:
            return Partial()
        if self.kind is not Kind.SHARDED or len(set(self.segments)) > 1:
            return None
        # equal segments are what a view gives that merges a replicated dim with a sharded one: torch knows the rules
        return StridedShard(self.dim, split_factor=len(self.segments)) if self.segments else Shard(self.dim)

    def __str__(self) -> str:
        if self.kind is not Kind.SHARDED:
            return self.kind.name.lower()
        if self.repeated:
            return f"shard({self.dim}) with repeated heads"
        return f"shard({self.dim})" + (f" of each of {list(self.segments)}" if self.segments else "")


REPLICATED, PARTIAL, STYLE, UNKNOWN = (
    Layout(kind) for kind in (Kind.REPLICATED, Kind.PARTIAL, Kind.STYLE, Kind.UNKNOWN)
)


def sharded(dim: int, segments: tuple[int, ...] = ()) -> Layout:
    """The layout of shards along `dim`."""
    return Layout(Kind.SHARDED, dim, segments if len(segments) > 1 else ())


def repeating(
    dim: int, segments: tuple[int, ...], unrepeated: tuple[int, ...], complete: tuple[int, ...] = ()
) -> Layout:
    """The layout of shards along `dim` of segments with heads repeated; see [Note: repeated heads]."""
    if segments == unrepeated:
        return sharded(dim, segments)
    return Layout(Kind.SHARDED, dim, segments, unrepeated, complete)


def layout_of(placement: Any, shape: tuple[int, ...]) -> Layout | None:
    """The layout of a placement of a tensor with this unsharded shape; None for sums of masked or of normed values."""
    if type(placement) is Replicate:
        return REPLICATED
    if type(placement) is Partial and placement.reduce_op == "sum":
        return PARTIAL
    if not isinstance(placement, Shard | StridedShard):
        return None
    dim = placement.dim % max(1, len(shape))
    parts = getattr(placement, "split_factor", 1)
    return sharded(dim, getattr(placement, "segments", None) or (shape[dim] // parts,) * parts)


def after_collective(collective: str, layout: Layout, sums: bool) -> Layout | None:
    """What a collective along dim 0 makes of a tensor; None where it gives no part of the unsharded tensor."""
    if layout in (STYLE, UNKNOWN):
        return layout
    if layout == PARTIAL and sums:
        return {"all_reduce": REPLICATED, "reduce_scatter": sharded(0)}.get(collective)
    gives_all = (collective, layout) in (("all_gather", sharded(0)), ("broadcast", REPLICATED))
    return REPLICATED if gives_all else None
