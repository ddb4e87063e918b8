"""How values and gradients flow between ranks: where a plan must gather, and where it must sum.

Each tensor has a kind on the ranks:

    I  the same on every rank, and so is its gradient (the residual stream)
    R  the same on every rank, but each rank's gradient is a part of a sum (inside a block, before its reduction)
    S  a shard
    P  a part of a sum
    W  made of whole parameters alone: it takes the kind of what it meets
    C  a constant, or not differentiable: it has no gradient

A plan turns I into R at the entry of a block (backward: sum the gradient once) and P into I at its reduction. Where
kinds clash, nothing is guessed: the axis class is given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch.fx import Node

from colrow.derive.choose import Choice
from colrow.derive.infer import AxisInference, facts_of, op_name
from colrow.derive.trace import is_boundary, label_of, module_path
from colrow.sharding.operators import Filling, Linear


class Kind(Enum):
    I = "I"  # noqa: E741
    R = "R"
    S = "S"
    P = "P"
    W = "W"
    C = "C"


@dataclass
class Flow:
    """The kinds of a region's nodes."""

    kinds: dict[Node, Kind] = field(default_factory=dict)
    clashes: list[tuple[Node, str]] = field(default_factory=list)
    summed: set[str] = field(default_factory=set)
    """Whole parameters that a rank uses in its own way: gradients must be summed."""
    same: set[str] = field(default_factory=set)
    """Whole parameters that every rank uses alike."""


class Flows:
    """Flow analysis of one choice on one graph."""

    def __init__(
        self,
        inference: AxisInference,
        choice: Choice,
        wide: Iterable[str] = (),
        ties: Mapping[str, str] | None = None,
    ) -> None:
        self.inference, self.choice = inference, choice
        self.wide = set(wide)
        """Modules that normalise over a sharded axis."""
        self.path = {node: module_path(node) for node in inference.graph.nodes}
        for node in inference.graph.nodes:
            if is_boundary(node):
                self.path[node] = label_of(node).module
        self.live = self._live()
        self.given = self._given()
        self.constant = self._constants()
        self.owners = {fqn: fqn.rpartition(".")[0] for fqn in inference.params.values()}
        self.sharers = {fqn: {owner} for fqn, owner in self.owners.items()}
        """All modules that hold a parameter under some name."""
        for other, first in (ties or {}).items():
            self.sharers.get(first, set()).add(other.rpartition(".")[0])
        self.params_of = self._params_of()

    # ------------------------------------------------------------------ facts about nodes

    def _live(self) -> set[Node]:
        """Nodes that the output depends on."""
        out = next(n for n in self.inference.graph.nodes if n.op == "output")
        found: set[Node] = set()
        todo = list(out.all_input_nodes)
        while todo:
            node = todo.pop()
            if node not in found:
                found.add(node)
                todo += node.all_input_nodes
        return found

    def _given(self) -> set[Node]:
        """Nodes that depend on the caller's inputs."""
        found: set[Node] = set()
        for node in self.inference.graph.nodes:
            if node.name in self.inference._inputs or any(i in found for i in node.all_input_nodes):
                found.add(node)
        return found

    def _constants(self) -> set[Node]:
        """Nodes through which no gradient flows: they depend on no parameter and no floating input, or are no
        floating-point tensors."""
        found: set[Node] = set()
        inputs = {n for n in self.inference.graph.nodes if n.op == "placeholder"}
        for node in self.inference.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and not (value.is_floating_point() or value.is_complex()):
                found.add(node)
            elif node in inputs:
                if node not in self.inference.params and node.name not in self.inference._inputs:
                    found.add(node)
            elif node.op != "output":
                fills = facts_of(node).fills not in (None, Filling.RANDOM)
                if fills or all(i in found for i in node.all_input_nodes):
                    found.add(node)
        return found

    def _params_of(self) -> dict[Node, set[str]]:
        """The parameters that a node made of parameters and constants alone consists of."""
        found: dict[Node, set[str]] = {}
        for node in self.inference.graph.nodes:
            if node in self.inference.params:
                found[node] = {self.inference.params[node]}
            elif node.op == "call_function" and node not in self.constant and node not in self.given:
                inputs = [i for i in node.all_input_nodes if i not in self.constant]
                if inputs and all(i in found for i in inputs):
                    found[node] = set().union(*(found[i] for i in inputs))
        return found

    def is_sharded(self, node: Node) -> bool:
        dims = self.inference.dims.get(node)
        parts = dims if isinstance(dims, tuple) else (dims,)
        return any(self.choice.any_sharded(part) for part in parts if part)

    def is_reduction(self, node: Node) -> bool:
        """Whether the node contracts over a sharded axis."""
        return node in self.inference.contracted and self.choice.any_sharded(self.inference.contracted[node])

    def inside(self, node: Node, module: str) -> bool:
        path = self.path[node]
        if is_boundary(node) and path == module:
            return False
        return module == "" or path == module or path.startswith(module + ".")

    # ------------------------------------------------------------------ the analysis

    def run(self, nodes: Iterable[Node], entries: set[Node], exits: set[Node], given: dict[Node, Kind]) -> Flow:
        """Kinds of `nodes` in order. `entries` are boundaries where I becomes R, `exits` where P becomes I; `given`
        are kinds known from outside."""
        flow = Flow(dict(given))
        for node in nodes:
            if node in flow.kinds or node.op == "output" or op_name(node) == "_assert_tensor_metadata":
                continue
            kind = self._kind(node, flow)
            if node in entries and kind in (Kind.I, Kind.W):
                kind = Kind.R
            elif node in exits and kind is Kind.P:
                kind = Kind.I
            flow.kinds[node] = kind
        return flow

    def _kind(self, node: Node, flow: Flow) -> Kind:
        if node.op in ("placeholder", "get_attr"):
            if node in self.inference.params:
                return Kind.S if self.is_sharded(node) else Kind.W
            return self._constant_kind(node) if node in self.constant else Kind.I
        if node in self.constant:
            return self._constant_kind(node)
        if node in self.inference.from_params:
            return Kind.S if self.is_sharded(node) else Kind.W
        incoming = {i: flow.kinds.get(i, Kind.C) for i in node.all_input_nodes}
        if self.path[node] in self.wide and any(k is Kind.S for k in incoming.values()):
            return Kind.S
        kinds = set(incoming.values()) - {Kind.C}
        if node in self.inference.averaged and self.choice.any_sharded(self.inference.averaged[node]):
            flow.clashes.append((node, "normalises over a sharded axis outside a norm module"))
        if self.is_reduction(node):
            if Kind.I in kinds or Kind.P in kinds:
                flow.clashes.append((node, "a product over a sharded axis meets an activation that is not sharded"))
            self._commit(node, incoming, flow, Kind.P)
            return Kind.P
        if Kind.P in kinds:
            return self._partial(node, incoming, flow)
        if Kind.S in kinds:
            if Kind.I in kinds:
                flow.clashes.append((node, "a shard meets an activation whose gradient is not summed"))
            if not self.is_sharded(node) and op_name(node) in ("slice", "index", "getitem"):
                return Kind.R  # a segment of a fused product that every rank computes
            if not self.is_sharded(node) and node in self.live:
                flow.clashes.append((node, "the sharded axis ends without a reduction"))
            self._commit(node, incoming, flow, Kind.S)
            return Kind.S
        if Kind.I in kinds and Kind.R in kinds:
            flow.clashes.append((node, "an activation of the stream meets one inside the block"))
        if Kind.I in kinds:
            self._commit(node, incoming, flow, Kind.I)
            return Kind.I
        if Kind.R in kinds:
            self._commit(node, incoming, flow, Kind.R)
            return Kind.R
        return Kind.I if node in self.given else Kind.W

    def _constant_kind(self, node: Node) -> Kind:
        return Kind.S if self.is_sharded(node) else Kind.C

    def _partial(self, node: Node, incoming: dict[Node, Kind], flow: Flow) -> Kind:
        name = op_name(node)
        partial = [i for i, kind in incoming.items() if kind is Kind.P]
        others = {i: kind for i, kind in incoming.items() if kind is not Kind.P}
        match facts_of(node).linear:
            case Linear.FIRST:
                legal = True
            case Linear.NUMERATOR:
                legal = node.args[0] in partial
            case Linear.EACH:
                legal = len(partial) == 1
            case Linear.TERMS:
                legal = all(
                    self._owned_bias(node, i, kind) or self._zeros(i) or self._index_like(i)
                    for i, kind in others.items()
                )
            case Linear.WRITTEN:
                legal = (len(partial) == 1 and node.args[-1] in partial) or self._zeros(node.args[0])
            case None:
                legal = False
        if any(kind is Kind.S or kind is Kind.I for kind in others.values()):
            legal = False
        if not legal:
            flow.clashes.append((node, f"{name} on a sum that is not reduced yet"))
        self._commit(node, dict(incoming), flow, Kind.P)
        return Kind.P

    def _owned_bias(self, node: Node, operand: Node, kind: Kind) -> bool:
        """The bias of the very module whose product is the partial sum: it is added at 1/tp on each rank."""
        names = self.params_of.get(operand, set())
        return kind is Kind.W and all(self.path[node] in self.sharers[n] for n in names)

    def _zeros(self, node: object) -> bool:
        return isinstance(node, Node) and facts_of(node).fills in (Filling.ZERO, Filling.UNSET)

    def _index_like(self, node: Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and not value.is_floating_point()

    def _commit(self, node: Node, incoming: dict[Node, Kind], flow: Flow, kind: Kind) -> None:
        """Parameters that this node meets take its kind."""
        for operand, its in incoming.items():
            if its is Kind.W:
                for name in self.params_of.get(operand, set()):
                    (flow.same if kind is Kind.I else flow.summed).add(name)
