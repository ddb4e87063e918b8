"""An operator applied to local tensors, beside the same operator on the unsharded ones: what a rule judges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch

from colrow.sharding.local_layout import Kind, Layout
from colrow.sharding.operators import Operator, argument_of, operator, operator_name
from colrow.torch_compat import tree_unflatten

Shape = tuple[int, ...]
Piece = tuple[tuple[int, int], tuple[int, int]]
"""First and end of consecutive elements of a dim, on a rank and in the unsharded run."""


class UnprovenError(Exception):
    """Nothing says that the operator on local tensors gives a part of the unsharded result; the text says why."""

    def __init__(self, reason: str, dim: int | None = None) -> None:
        super().__init__(reason)
        self.dim = dim


class TensorShape(NamedTuple):
    """An argument that is a tensor; `constant`: of an index of one element, its value where code wrote it down."""

    shape: Shape
    stride: Shape
    dtype: torch.dtype
    constant: int | None = None


@dataclass(frozen=True)
class LocalCall:
    """An operator applied to local tensors, beside the same operator of the unsharded run.

    Attributes:
        tree: how the flat arguments are nested: (args, kwargs).
        here, there: the flat arguments on this rank and in the unsharded run, tensors as `TensorShape`.
        layouts: of each argument that is a tensor; None for the others.
        results, wanted: shapes of the results on this rank and in the unsharded run, where that has a counterpart.
        zeros: positions of arguments that hold zeros.
        forward: in backward, the layout of the first input of the operator that is differentiated.
    """

    func: Any
    tree: Any
    here: tuple[Any, ...]
    there: tuple[Any, ...]
    layouts: tuple[Layout | None, ...]
    results: tuple[Shape, ...]
    wanted: tuple[Shape, ...] | None
    ranks: int
    zeros: frozenset[int] = frozenset()
    forward: Layout | None = None

    @property
    def name(self) -> str:
        return operator_name(self.func)

    @property
    def facts(self) -> Operator:
        return operator(self.name)

    @property
    def tensors(self) -> list[tuple[Layout, TensorShape]]:
        """Layout and unsharded shape of each tensor argument."""
        return [(layout, there) for layout, there in zip(self.layouts, self.there, strict=True) if layout is not None]

    @property
    def differing(self) -> list[tuple[Any, Any]]:
        """Arguments that are no tensors and differ between the runs."""
        pairs = zip(self.here, self.there, self.layouts, strict=True)
        return [(here, there) for here, there, layout in pairs if layout is None and here != there]

    @property
    def differing_values(self) -> list[tuple[Any, Any]]:
        """Arguments that are numbers to compute with, not sizes or positions, and differ between the runs."""
        if not self.differing:
            return []
        names = [argument.name for argument in self.func._schema.arguments if _is_value(argument.type)]
        return [(here, there) for here, there in map(self.argument, names) if here != there]

    @property
    def same_results(self) -> bool:
        return self.wanted is None or self.results == self.wanted

    def argument(self, name: str) -> tuple[Any, Any]:
        """The argument of this name in the operator's schema, here and there."""
        here, there = (
            argument_of(self.func, name, *tree_unflatten(list(leaves), self.tree)) for leaves in (self.here, self.there)
        )
        return here, there

    def pieces(self, dim: int) -> list[Piece] | None:
        """The pieces of `dim` that a split, a slice or an index by constants takes, or whose gradients it joins;
        None where it takes them along another dim."""
        extents = self.here[0].shape, self.there[0].shape
        if self.name in PIECES_BACKWARD and self.wanted:
            extents = self.results[0], self.wanted[0]  # in forward it takes from what is the result in backward
        if self.name in INDEXES:
            found = [_index_of(self.argument("indices")[i], dim, extents[i][dim]) for i in (0, 1)]
            return [(found[0], found[1])] if found[0] and found[1] else None
        if self.name not in ("slice", "slice_backward", "split", "split_with_sizes", "cat"):
            return None
        if self.argument("dim")[0] % len(extents[0]) != dim:
            return None
        if not self.name.startswith("slice"):
            parts: list[Sequence[Shape]] = [self.results, self.wanted or ()]
            if self.name == "cat":
                parts = [
                    [leaf.shape for leaf in run if isinstance(leaf, TensorShape)] for run in (self.here, self.there)
                ]
            # bounds of the parts one after another, on the rank and unsharded
            ends = [[0, *accumulate(shape[dim] for shape in shapes)] for shapes in parts]
            return list(zip(pairwise(ends[0]), pairwise(ends[1]), strict=True))
        ranges = self.slices(extents[0][dim], extents[1][dim])
        if any(step != 1 for _, _, step in ranges):
            raise UnprovenError("a slice with a step", dim)
        return [(ranges[0][:2], ranges[1][:2])]

    def slices(self, here: int, there: int) -> list[tuple[int, int, int]]:
        """First, end and step of what a `slice` takes of a dim of these extents, on this rank and in the unsharded
        run."""
        names = ("start", "end", "step")
        return [slice(*(self.argument(name)[i] for name in names)).indices(n) for i, n in enumerate((here, there))]

    @property
    def sharded_dim(self) -> int | None:
        """The dim along which its first sharded argument is sharded."""
        return next((layout.dim for layout, _ in self.tensors if layout.kind is Kind.SHARDED), None)

    @property
    def layouts_text(self) -> str:
        """The layouts of the tensors, for a message."""
        return ", ".join(str(layout) for layout, _ in self.tensors)


def _is_value(kind: Any) -> bool:
    """Whether a schema's type is that of a number to compute with: `Scalar`, `float` or `bool`, or one that may be
    None. Sizes and positions are integers."""
    kind = kind.getElementType() if kind.kind() == "OptionalType" else kind
    return kind.kind() in ("NumberType", "FloatType", "BoolType")


INDEXES = ("index", "index_put", "_index_put_impl", "_unsafe_index_put")
PIECES_BACKWARD = ("slice_backward", "cat", *INDEXES[1:])
"""Operators that make the gradient of pieces: a split's puts them together, an index's writes one into zeros."""


def _index_of(indices: Sequence[Any], dim: int, extent: int) -> tuple[int, int] | None:
    """First and end of the one element of `dim` that indices take, if it is a constant and they take of no other."""
    given = [(d, index) for d, index in enumerate(indices) if index is not None]
    if len(given) != 1 or given[0][0] != dim or given[0][1].constant is None:
        return None
    place = given[0][1].constant % extent
    return place, place + 1
