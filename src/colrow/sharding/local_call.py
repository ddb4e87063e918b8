"""An operator applied to local tensors, beside the same operator on the unsharded ones: what a rule judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from colrow.sharding.local_layout import Kind, Layout
from colrow.sharding.operators import Operator, operator
from colrow.torch_compat import tree_unflatten

Shape = tuple[int, ...]


class UnprovenError(Exception):
    """Nothing says that the operator on local tensors gives a part of the unsharded result; the text says why."""

    def __init__(self, reason: str, dim: int | None = None) -> None:
        super().__init__(reason)
        self.dim = dim


class TensorShape(NamedTuple):
    """An argument that is a tensor."""

    shape: Shape
    stride: Shape
    dtype: torch.dtype


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
        return str(self.func.name()).partition("::")[2].partition(".")[0]

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
    def same_results(self) -> bool:
        return self.wanted is None or self.results == self.wanted

    def argument(self, name: str) -> tuple[Any, Any]:
        """The argument of this name in the operator's schema, here and there."""
        declared = self.func._schema.arguments
        position = next(i for i, argument in enumerate(declared) if argument.name == name)
        found = []
        for leaves in (self.here, self.there):
            args, kwargs = tree_unflatten(list(leaves), self.tree)
            default = declared[position].default_value
            found.append(args[position] if position < len(args) else kwargs.get(name, default))
        return found[0], found[1]

    @property
    def sharded_dim(self) -> int | None:
        """The dim along which its first sharded argument is sharded."""
        return next((layout.dim for layout, _ in self.tensors if layout.kind is Kind.SHARDED), None)

    @property
    def layouts_text(self) -> str:
        """The layouts of the tensors, for a message."""
        return ", ".join(str(layout) for layout, _ in self.tensors)
