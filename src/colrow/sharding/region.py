"""A rectangular block of a tensor's elements."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Region:
    """`size` elements from `offset`, in each dim of a tensor. An empty tuple each: the element of a scalar."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index: `tensor[region.slices]`."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))

    @property
    def numel(self) -> int:
        return prod(self.size)
