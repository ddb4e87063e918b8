"""A choice on a graph with the blocks that it makes, and the flow between ranks: what is written as styles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from torch.fx import Node

from colrow.derive.axes import Atom
from colrow.derive.blocks import BlockFinder, SplitBlock, SplitError
from colrow.derive.flow import Flow, Flows
from colrow.derive.infer import shape_of
from colrow.plans.patterns import is_within, with_stars


@dataclass
class Split:
    """A choice on a graph with the blocks that it makes, and the flow of the complete graph: they fit together."""

    finder: BlockFinder
    blocks: list[SplitBlock]
    flow: Flow

    @classmethod
    def of(cls, flows: Flows, column_blocks: bool = False) -> Split:
        """Raises SplitError where a component has no sound block, or the blocks do not fit together."""
        finder = BlockFinder(flows, column_blocks)
        try:
            return cls._found(finder)
        except SplitError as error:
            if column_blocks or not finder.use_inner_sums():
                raise
            with contextlib.suppress(SplitError):
                return cls._found(finder)
            raise error from None

    @classmethod
    def _found(cls, finder: BlockFinder) -> Split:
        blocks = finder.find()
        return cls(finder, blocks, finder.complete_graph(blocks))

    @property
    def flows(self) -> Flows:
        return self.finder.flows

    def atoms_at(self, module: str) -> set[Atom]:
        """Chosen classes in the parameters of a module and of those at its place in other blocks, which have the same
        shapes: a neighbour in one nn.Sequential has like names, too."""
        params = self.flows.inference.params.items()
        at_place = [name for name in self.finder.boundaries if with_stars(name) == with_stars(module)]
        inside = {m: [(node, f.removeprefix(m)) for node, f in params if is_within(f, m)] for m in (module, *at_place)}
        shapes = {m: [(name, shape_of(node)) for node, name in found] for m, found in inside.items()}
        alike = [m for m in inside if shapes[m] == shapes[module]]
        return self.finder.atoms_of({node for m in alike for node, _ in inside[m]})

    def borders(self) -> tuple[set[Node], set[Node]]:
        return self.finder.borders(self.blocks)
