"""A choice on a graph with the blocks that it makes, and the flow between ranks: what is written as styles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from torch.fx import Node

from colrow.derive.blocks import Block, BlockFinder, SplitError
from colrow.derive.flow import Flow, Flows


@dataclass
class Split:
    """A choice on a graph with the blocks that it makes, and the flow of the complete graph: they fit together."""

    finder: BlockFinder
    blocks: list[Block]
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

    def borders(self) -> tuple[set[Node], set[Node]]:
        return self.finder.borders(self.blocks)
