"""How values and gradients flow between ranks: where a plan must gather, and where it must sum.

[Note: SPMD types]
Each tensor x has a type over the tp ranks, which says what its value and its gradient are there:

    type         value of x               gradient of x
    INVARIANT    equal on all ranks       equal on all ranks (the residual stream)
    REPLICATED   equal on all ranks       a partial sum (inside a block, before its reduction)
    SHARDED      a shard                  a shard
    PARTIAL      a partial sum            equal on all ranks
    PARAMETER    computed from unsharded parameters only: it takes the type of what it meets
    CONSTANT     not differentiable: it has no gradient

A plan turns INVARIANT into REPLICATED at the entry of a block (its backward sums the gradient, once) and PARTIAL into
INVARIANT at its reduction. A REPLICATED output that auxiliary losses alone use (router logits) becomes INVARIANT: each
rank passes back 1/tp of its gradient. Where types clash, nothing is guessed: the axis class is given up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch.fx import Node

from colrow.derive.choice import Choice
from colrow.derive.infer import AxisInference, argument, facts_of, module_path, op_name
from colrow.derive.trace import is_boundary, label_of
from colrow.plans.patterns import is_within
from colrow.sharding.operators import Filling, Linear


class SpmdType(Enum):
    """See [Note: SPMD types]."""

    INVARIANT = "invariant"
    REPLICATED = "replicated"
    SHARDED = "sharded"
    PARTIAL = "partial"
    PARAMETER = "parameter"
    CONSTANT = "constant"


@dataclass
class Flow:
    """The types of a region's nodes."""

    types: dict[Node, SpmdType] = field(default_factory=dict)
    clashes: list[tuple[Node, str]] = field(default_factory=list)
    summed: set[str] = field(default_factory=set)
    """Unsharded parameters whose gradients are partial sums: they meet values that differ between ranks."""
    left: set[Node] = field(default_factory=set)
    """Outputs of modules that were REPLICATED, and are INVARIANT outside the block."""
    same: set[str] = field(default_factory=set)
    """Unsharded parameters whose gradients are equal on all ranks: summed, they would count tp times."""


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
            if is_boundary(node):  # hooks run in the caller: a marker belongs to the module whose border it marks
                self.path[node] = label_of(node).module
        # the model's output, and what it returns beside it: a router's loss, say
        main, *losses = next(n for n in inference.graph.nodes if n.op == "output").all_input_nodes
        self.for_main = ancestors([main])
        """Nodes that the main output depends on."""
        self.live = self.for_main | ancestors(losses)
        """Nodes that some output depends on."""
        self.given = self._given()
        self.constant = self._constants()
        self.owners = {fqn: fqn.rpartition(".")[0] for fqn in inference.params.values()}
        self.called = {self.path[node] for node in inference.graph.nodes if is_boundary(node)}
        """Modules that are called: of others, code of another module takes the parameters."""
        self.sharers = {fqn: {owner} for fqn, owner in self.owners.items()}
        """All modules that hold a parameter under some name."""
        for other, first in (ties or {}).items():
            self.sharers.get(first, set()).add(other.rpartition(".")[0])
        self.params_of = self._params_of()

    # ------------------------------------------------------------------ facts about nodes

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
                # zeros_like(x) depends on x's shape alone
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
            elif node.op == "call_function" and node not in self.constant:
                inputs = [i for i in node.all_input_nodes if i not in self.constant]
                given = node in self.given and node not in self.inference.rows
                if inputs and not given and all(i in found for i in inputs):
                    found[node] = set().union(*(found[i] for i in inputs))
        return found

    def is_sharded(self, node: Node) -> bool:
        return any(self.choice.any_sharded(dims) for dims in self.inference.tensors(node))

    def is_activation(self, node: Node) -> bool:
        """Whether the node depends on the inputs, and gradients flow through it."""
        return node not in self.constant and node not in self.inference.from_params

    def is_reduction(self, node: Node) -> bool:
        """Whether the node contracts over a sharded axis."""
        return node in self.inference.contracted and self.choice.any_sharded(self.inference.contracted[node])

    def inside(self, node: Node, module: str) -> bool:
        path = self.path[node]
        if is_boundary(node) and path == module:
            return False
        return module == "" or is_within(path, module)

    def made_in(self, node: Node, modules: Iterable[str]) -> bool:
        """Whether a constant was made by code inside of these modules, with the heads that a rank has there (T5's zero
        bias of a cross-attention, which the next layer gets)."""
        todo, seen = [node], set[Node]()
        while todo:
            at = todo.pop()
            if at in seen or at not in self.constant or not self.is_sharded(at):
                continue
            if not is_boundary(at) and any(self.inside(at, module) for module in modules):
                return True
            seen.add(at)
            todo += at.all_input_nodes
        return False

    # ------------------------------------------------------------------ the analysis

    def run(
        self,
        nodes: Iterable[Node],
        entries: set[Node],
        exits: set[Node],
        given: dict[Node, SpmdType],
        leaving: set[Node],
    ) -> Flow:
        """Types of `nodes` in order.

        Args:
            entries: boundaries where INVARIANT becomes REPLICATED.
            exits: boundaries where PARTIAL becomes INVARIANT; of those that are entries too, REPLICATED.
            given: types known from outside.
            leaving: boundaries where REPLICATED becomes INVARIANT.
        """
        flow = Flow(dict(given))
        for node in nodes:
            if node in flow.types or node.op == "output" or op_name(node) == "_assert_tensor_metadata":
                continue
            spmd_type = self._type(node, flow)
            # First the reduction, then the entry: a boundary that is both (an inner sum) goes PARTIAL, INVARIANT,
            # REPLICATED.
            if node in exits and spmd_type is SpmdType.PARTIAL:
                spmd_type = SpmdType.INVARIANT
            if node in entries and spmd_type in (SpmdType.INVARIANT, SpmdType.PARAMETER):
                spmd_type = SpmdType.REPLICATED
            elif node in leaving and spmd_type is SpmdType.REPLICATED:
                spmd_type = SpmdType.INVARIANT
                flow.left.add(node)
            flow.types[node] = spmd_type
        return flow

    def _type(self, node: Node, flow: Flow) -> SpmdType:
        if node in self.constant and node not in self.inference.params:
            return self.constant_type(node)
        incoming = {i: flow.types.get(i, SpmdType.CONSTANT) for i in node.all_input_nodes}
        # behind a block's entry what is made of parameters alone (a Perceiver's latents) is as any activation is
        if node in self.inference.from_params and SpmdType.REPLICATED not in incoming.values():
            return SpmdType.SHARDED if self.is_sharded(node) else SpmdType.PARAMETER
        if node.op in ("placeholder", "get_attr"):
            return SpmdType.INVARIANT
        if self.path[node] in self.wide and SpmdType.SHARDED in incoming.values():
            return SpmdType.SHARDED  # style sharded_norm sums the statistics inside the module
        types = set(incoming.values()) - {SpmdType.CONSTANT, SpmdType.PARAMETER}
        if not types and not self.is_reduction(node):
            return SpmdType.INVARIANT if node in self.given and node not in self.params_of else SpmdType.PARAMETER
        spmd_type = self._result_type(node, incoming, types, flow)
        # An unsharded weight gets the gradient of its result's type: equal on all ranks in the stream, else a partial
        # sum.
        for operand in (i for i, given in incoming.items() if given is SpmdType.PARAMETER):
            names = flow.same if spmd_type is SpmdType.INVARIANT else flow.summed
            names |= self.params_of.get(operand, set())
        return spmd_type

    def _result_type(self, node: Node, incoming: dict[Node, SpmdType], types: set[SpmdType], flow: Flow) -> SpmdType:
        """The type of an operator's result, by its operands' types (but for constants and parameters).

        With x_r on rank r, I for INVARIANT, R for REPLICATED, S for SHARDED, P for PARTIAL:

            S @ S -> P    over the sharded axis: x w = Σ_r x_r w_r. An I operand would not be a shard of x.
            P -> P        if the operator is linear in it, see `_is_linear_in_partial`
            S, R -> S     An I operand would get its gradient from this rank's shard only, and nothing would sum it.
            I, R -> clash The gradient cannot be equal on all ranks and a partial sum at once.
        """

        def clash(why: str) -> None:
            flow.clashes.append((node, why))

        if node in self.inference.averaged and self.choice.any_sharded(self.inference.averaged[node]):
            clash("normalises over a sharded axis outside a norm module")
        if self.is_reduction(node):
            if types & {SpmdType.INVARIANT, SpmdType.PARTIAL}:
                clash("a product over a sharded axis meets an activation that is not sharded")
            return SpmdType.PARTIAL
        if SpmdType.PARTIAL in types:
            # f(Σ_r x_r) = Σ_r f(x_r) holds for linear f alone. The product with a shard would mix the ranks' terms.
            if types & {SpmdType.SHARDED, SpmdType.INVARIANT} or not self._is_linear_in_partial(node, incoming):
                clash(f"{op_name(node)} on a sum that is not reduced yet")
            return SpmdType.PARTIAL
        if SpmdType.SHARDED in types:
            if SpmdType.INVARIANT in types:
                clash("a shard meets an activation whose gradient is not summed")
            if not self.is_sharded(node) and op_name(node) in ("slice", "index", "getitem"):
                return SpmdType.REPLICATED  # the segment of a fused product that every rank computes
            # a reduction over all of a sharded axis (a max) without a rule that sums it
            if not self.is_sharded(node) and node in self.live:
                clash("the sharded axis ends without a reduction")
            return SpmdType.SHARDED
        if SpmdType.INVARIANT in types and SpmdType.REPLICATED in types:
            clash("an activation of the stream meets one inside the block")
        return SpmdType.INVARIANT if SpmdType.INVARIANT in types else SpmdType.REPLICATED

    def constant_type(self, node: Node) -> SpmdType:
        return SpmdType.SHARDED if self.is_sharded(node) else SpmdType.CONSTANT

    def _is_linear_in_partial(self, node: Node, incoming: dict[Node, SpmdType]) -> bool:
        """Whether the operator commutes with the sum over ranks of its partial operands."""
        partial = [i for i, spmd_type in incoming.items() if spmd_type is SpmdType.PARTIAL]
        match facts_of(node).linear:
            case Linear.FIRST:
                return True
            case Linear.NUMERATOR:
                return node.args[0] in partial
            case Linear.EACH:
                return len(partial) == 1 and self._goes_on_in_one_module(node, partial[0])
            case Linear.TERMS:  # x_1 + t + x_2 + t counts t twice: only what is zero, or added at 1/tp, may stand there
                others = {i: spmd_type for i, spmd_type in incoming.items() if i not in partial}
                return all(
                    self._owned_bias(node, i, spmd_type) or self._zeros(i) or self._index_like(i)
                    for i, spmd_type in others.items()
                )
            case Linear.WRITTEN:
                return (len(partial) == 1 and node.args[-1] in partial) or self._zeros(node.args[0])
            case None:
                return False

    def _goes_on_in_one_module(self, node: Node, partial: Node) -> bool:
        """Whether a partial sum may go through this operator. Through a product (x A B of a LoRA layer) it may only
        where no module ends in between, at which the sum could be reduced before it grows, and no bias is added, which
        would count tp times."""
        facts = facts_of(node)
        if not facts.contracts:
            return True
        added = any(argument(node, i, "bias") is not None for i in facts.addends or ())
        return not added and not is_boundary(partial) and self.path[partial] == self.path[node]

    def _owned_bias(self, node: Node, operand: Node, spmd_type: SpmdType) -> bool:
        """The bias of the very module whose product is the partial sum, or of one that is not called and whose weight
        this module multiplies by: it is added at 1/tp on each rank."""
        names, path = self.params_of.get(operand, set()), self.path[node]
        belongs = [path in self.sharers[n] or (self.owners[n] not in self.called and path) for n in names]
        return spmd_type is SpmdType.PARAMETER and all(belongs)

    def _zeros(self, node: object) -> bool:
        return isinstance(node, Node) and facts_of(node).fills in (Filling.ZERO, Filling.UNSET)

    def _index_like(self, node: Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and not value.is_floating_point()


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """The nodes, and all that they depend on."""
    found: set[Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found
