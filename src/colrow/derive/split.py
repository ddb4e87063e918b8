"""A choice on a graph with the blocks that it makes, and the flow between ranks: what is written as styles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from torch.fx import Node

from colrow.derive.axes import Atom
from colrow.derive.blocks import BlockFinder, SplitBlock, SplitError
from colrow.derive.flow import Flow, Flows, SpmdType
from colrow.derive.infer import op_name, shape_of
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
        return cls(finder, blocks, _flow_of_graph(finder, blocks))

    @property
    def flows(self) -> Flows:
        return self.finder.flows

    def atoms_at(self, module: str) -> set[Atom]:
        """Chosen classes in the parameters of a module and of those at its place in other blocks, which have the same
        shapes, sharded along the same dims: a neighbour in one nn.Sequential has like names, too."""
        params = self.flows.inference.params.items()
        at_place = [name for name in self.finder.boundaries if with_stars(name) == with_stars(module)]
        inside = {m: [(node, f.removeprefix(m)) for node, f in params if is_within(f, m)] for m in (module, *at_place)}
        sharded = self.flows.choice.sharded
        shapes = {
            m: [(name, shape_of(node), [*map(sharded, self.flows.inference.of(node))]) for node, name in found]
            for m, found in inside.items()
        }
        alike = [m for m in inside if shapes[m] == shapes[module]]
        return self.finder.atoms_of({node for m in alike for node, _ in inside[m]})

    def borders(self) -> tuple[set[Node], set[Node]]:
        return self.finder.borders(self.blocks)


def _flow_of_graph(finder: BlockFinder, blocks: list[SplitBlock]) -> Flow:
    """The flow of the entire graph with these blocks: the proof that they fit together.

    Raises:
        SplitError: types clash somewhere; the classes at that place must not be sharded.
    """
    entries, exits = finder.borders(blocks)
    leaving = set().union(*(b.flow.left for b in blocks))
    flow = finder.flows.run(
        [n for n in finder.nodes if n in finder.flows.live or n in finder.inference.params], entries, exits, {}, leaving
    )
    if flow.clashes:
        node, why = flow.clashes[0]
        raise SplitError(
            finder.atoms_of({node, *node.all_input_nodes})
            or _summed(finder, node, flow)
            or _around(finder, node)
            or set(finder.choice.atoms),
            f"{why} ({op_name(node)} in {finder.flows.path[node] or 'the model'})",
        )
    # a weight shared by the stream and a block: no one reduction is right for the sum of both gradients
    both = flow.same & flow.summed
    if both:
        raise SplitError(set(finder.choice.atoms), f"{min(both)} is used both in the stream and inside a block")
    out = next(n for n in finder.nodes if n.op == "output")
    for node in out.all_input_nodes:
        if flow.types.get(node) in (SpmdType.PARTIAL, SpmdType.REPLICATED):
            raise SplitError(finder.atoms_of(set(finder.inference.graph.nodes)), "the output is left unreduced")
        # logits may stay split over the vocabulary: the loss takes them so
        if flow.types.get(node) is SpmdType.SHARDED and not finder.atoms_of({node}) <= finder.choice.vocabulary:
            raise SplitError(finder.atoms_of({node}), "the caller gets this axis")
    return flow


def _around(finder: BlockFinder, node: Node) -> set[Atom]:
    """Classes in the smallest module around this node that has some."""
    module = finder.flows.path[node]
    while module:
        if found := finder.atoms_of(set(finder.interior(module))) - finder.choice.vocabulary:
            return found
        module = module.rpartition(".")[0]
    return set()


def _summed(finder: BlockFinder, node: Node, flow: Flow) -> set[Atom]:
    """Classes whose contraction left the sums over ranks that reach this node."""
    out: set[Atom] = set()
    seen, todo = {node}, [node]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source in seen or flow.types.get(source) is not SpmdType.PARTIAL:
                continue
            seen.add(source)
            todo.append(source)
            out |= finder.choice.chosen(finder.inference.contracted.get(source, ()))
    return out
