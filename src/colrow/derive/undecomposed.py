"""The graph as it was recorded, before decompositions: what a rank's trace is compared with first.

[Note: undecomposed graphs]
Decompositions make writes in place functional, and take composite operators apart (in an export they inline the regions
without gradients, too). Rules need them, so the unsharded model's graph has them. A rank's trace
asks less: the same operators with a rank's extents, and that shows before decompositions too, wherever the operator
that a decomposed node comes from (`from_node`) gives that node's result itself. Where it does not, the rank's graph is
decomposed as well.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from colrow.derive.infer import computation, computes, facts_of, op_name


def computing_nodes(graph: Graph) -> list[Node]:
    """The operators of a graph that was not decomposed, in the order in which they run; those of regions without
    gradients stand where the region does."""
    return [node for node in _nodes(graph) if computes(node)]


def _nodes(graph: Graph) -> Iterator[Node]:
    regions = set[Node]()
    for node in graph.nodes:
        inner = [g for n in node.args if (g := _region(n)) is not None] if node.op == "call_function" else []
        if inner:
            regions.add(node)
            for region in inner:
                yield from _nodes(region.graph)
        elif not (op_name(node) == "getitem" and node.args[0] in regions):
            yield node


def _region(node: object) -> GraphModule | None:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    found = getattr(node.graph.owning_module, str(node.target), None)
    return found if isinstance(found, GraphModule) else None


@dataclass(frozen=True)
class Undecomposed:
    """The operators before decompositions.

    Attributes:
        nodes: what computes, in order.
        result: each operator whose result a decomposed node has, to that node.
        parts: the decomposed nodes of each.
    """

    nodes: list[Node]
    result: dict[Node, Node]
    parts: dict[Node, list[Node]]

    @classmethod
    def of(cls, graph: Graph, decomposed: Graph) -> Undecomposed:
        nodes = computing_nodes(graph)
        by_name = {node.name: node for node in graph.nodes}
        parts = defaultdict[Node, list[Node]](list)
        for node in decomposed.nodes:
            sources = node.meta.get("from_node") if node.op == "call_function" else None
            if sources and (source := by_name.get(sources[0].name)) is not None:
                parts[source].append(node)
        result = {}
        for node in by_name.values():
            made = parts.get(node, [])
            if op_name(node) == "getitem":  # of one of several results it says what made them all
                made = [p for p in parts.get(node.args[0], ()) if op_name(p) == "getitem" and p.args[1] == node.args[1]]
            if same := [part for part in made if known_shape(part) == known_shape(node) is not None]:
                result[node] = same[-1]
        for node, ours in list(parts.items()):
            result |= _views_taken_again(node, ours, parts)
        return cls(nodes, result, dict(parts))

    def shows(self, differs: Callable[[Node], bool], needs_itself: Callable[[Node], bool]) -> bool:
        """Whether the comparison before decompositions says as much as the one behind them.

        Args:
            differs: whether a decomposed node has other extents on a rank.
            needs_itself: whether such a node has to be compared itself, and not only the result of its operator.
        """
        shown = {part for source, parts in self.parts.items() if source in self.result for part in parts}
        shown |= {*self.result.values()}
        same = {part for source, part in self.result.items() if op_name(source) == op_name(part)}
        return all(
            node in (same if needs_itself(node) else shown)
            for parts in self.parts.values()
            for node in parts
            # views taken again behind a write in place are no results; their extents are their operands'
            if computes(node) and (not facts_of(node).moves or needs_itself(node)) and differs(node)
        )


def _views_taken_again(node: Node, ours: list[Node], parts: dict[Node, list[Node]]) -> dict[Node, Node]:
    """Behind a write in place decompositions take the views of what was written again where they are used: the views
    that `node` uses stand first among the decomposed nodes of it, and have none of their own."""
    found = dict[Node, Node]()
    for view in node.all_input_nodes:
        views: list[Node] = []
        while view.op == "call_function" and view not in parts and facts_of(view).moves:
            views.insert(0, view)
            view = view.all_input_nodes[0]
        for start in range(len(ours) - len(views)):
            again = ours[start : start + len(views)]
            if all(
                computation(v) == computation(a) and known_shape(v) == known_shape(a)
                for v, a in zip(views, again, strict=True)
            ):
                found.update(zip(views, again, strict=True))
                break
    return found


NOT_KEPT = Undecomposed([], {}, {})


def known_shape(node: Node) -> list[int] | None:
    """The shape of what the node gives; None where that is no tensor."""
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else None
