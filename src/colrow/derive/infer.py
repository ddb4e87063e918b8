"""Axis-class inference over an exported graph: one rule an operator; where there is none, nothing may be sharded.

The result says for each node which atoms its dimensions consist of, which nodes contract over which atoms (a sharded
contraction gives a partial sum), and which operators had no rule.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from colrow.derive.axes import Atom, Dim, forbid, size_of
from colrow.plans.patterns import with_stars
from colrow.sharding.operators import NOTHING_KNOWN, Identity, Operator, operator, plain_name

Dims = list[Dim]
Result = Dims | tuple[Dims | None, ...] | None
Rule = Callable[["AxisInference", Node], Result]
RULES: dict[str, Rule] = {}
"""By the names that `sharding.operators` gives them: operators that propagate a sharded dim alike have one rule."""


OPAQUE = "opaque"
"""The operator that stands for a module which cannot be traced (see opaque.py)."""


class NoRuleError(Exception):
    """An operator, or this use of it, is outside the table."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under its name in the operator table."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def op_name(node: Node) -> str:
    """`linear` for aten.linear.default; in-place variants lose their underscore."""
    schema = getattr(node.target, "_schema", None)
    return plain_name(schema.name.split("::")[1] if schema else getattr(node.target, "__name__", str(node.target)))


def facts_of(node: Node) -> Operator:
    """What the operator table knows of the node's operator; of one that is not in the table, or no call, nothing."""
    return operator(op_name(node)) if node.op == "call_function" else NOTHING_KNOWN


def computes(node: Node) -> bool:
    """Whether the node counts when two traces are compared: whether a reshape copies depends on extents that are 1, so
    copies are no difference."""
    return node.op == "call_function" and facts_of(node).identity is not Identity.MEMORY


def computation(node: Node) -> str:
    """The operator's name, one for all views: of one head einops makes another view than of several."""
    return "view" if facts_of(node).rule in ("view", "unsqueeze", "squeeze") else op_name(node)


def module_path(node: Node) -> str:
    """The name of the innermost module whose forward made this node; '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return strip(paths[-1]) if paths else ""


def strip(name: str) -> str:
    """A name inside the tracing wrapper to the name inside the model."""
    name = name.split("@")[0]
    return name[2:] if name.startswith("m.") else "" if name == "m" else name


def is_lookup(node: Node) -> bool:
    """Whether the node takes rows of a table by number."""
    return facts_of(node).rule == "embedding"


def shape_of(node: Node) -> list[int]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise NoRuleError(f"{node} is not a tensor")
    return [int(extent) for extent in value.shape]


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """An argument that may be given by position or by keyword."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def named_argument(node: Node, name: str, default: Any = None) -> Any:
    """An argument by the name that the operator's schema gives it: `dim` stands at 1 in `sum` and at 2 in `norm`."""
    schema: Any = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema else []
    return argument(node, names.index(name), name, default) if name in names else default


def number(node: Node, index: int, name: str, default: int | None = None) -> int:
    """An integer argument; NoRuleError where the graph computes it, or the call leaves it out."""
    value = argument(node, index, name)
    value = default if value is None else value
    if not isinstance(value, int):
        raise NoRuleError(f"{name} is not a known number")
    return value


class AxisInference:
    """The axes of every tensor of a graph.

    Args:
        graph: the graph of an exported program, after `run_decompositions({})`.
        parameters: placeholder name to the parameter's fully qualified name.
        constants: placeholder and get_attr name to the value of a lifted constant, where it is known.
        inputs: names of the placeholders that are the caller's inputs.
        fresh_at: nodes whose output starts with fresh axes (a place where the layout may change).
        free_inputs: axes of the caller's inputs may be sharded. Unless set, none may: all ranks get the same batch.
    """

    def __init__(
        self,
        graph: Graph,
        parameters: dict[str, str],
        constants: dict[str, Tensor] | None = None,
        inputs: Sequence[str] = (),
        fresh_at: Callable[[Node, AxisInference], Dims | None] | None = None,
        free_inputs: bool = False,
    ) -> None:
        self.graph = graph
        self.constants = constants or {}
        self.dims: dict[Node, Result] = {}
        self.contracted: dict[Node, list[Dim]] = {}
        """Nodes that sum over axes, and the axes."""
        self.averaged: dict[Node, list[Dim]] = {}
        """Nodes that normalise over axes: a mean, or a norm."""
        self.unknown: Counter[str] = Counter()
        self.params: dict[Node, str] = {}
        self.from_params: set[Node] = set()
        """Nodes that depend on parameters only."""
        self.rows: set[Node] = set()
        """Rows of a parameter that an index picks (an expert's weight), and views of them: made of parameters alone,
        though the caller's inputs decide which."""
        self._inputs = set(inputs)
        self._fresh_at = fresh_at
        self._free_inputs = free_inputs
        self._node: Node | None = None
        """The one whose rule runs."""
        for node in graph.nodes:
            self._node = node
            self._visit(node, parameters)

    # ------------------------------------------------------------------ what rules use

    def of(self, node: Any) -> Dims:
        """The dimensions of a tensor-valued node."""
        dims = self.dims.get(node) if isinstance(node, Node) else None
        if not isinstance(dims, list):
            raise NoRuleError("an argument is not a tensor")
        return dims

    def tensors(self, node: Node) -> list[Dims]:
        """The dimensions of each tensor that the node gives: of several for a split, of none for a size."""
        dims = self.dims.get(node)
        return [part for part in (dims if isinstance(dims, tuple) else (dims,)) if part is not None]

    def fresh(self, shape: Sequence[int], why: str | None = None) -> Dims:
        return [[Atom(int(extent), why)] if int(extent) != 1 else [] for extent in shape]

    @property
    def here(self) -> str:
        """The operator whose rule runs, with the module whose code gives it."""
        return self.at("" if self._node is None else op_name(self._node))

    def at(self, why: str) -> str:
        """A reason with the module whose code gives it."""
        module = with_stars(module_path(self._node)) if self._node is not None else ""
        return f"{why} in {module}" if module else why

    def contract(self, node: Node, dim: Dim) -> None:
        """`node` sums over `dim`: sharded, each rank holds a partial sum."""
        if dim:
            self.contracted.setdefault(node, []).append(dim)

    def average(self, node: Node, dim: Dim) -> None:
        """`node` normalises over `dim`."""
        if dim:
            self.averaged.setdefault(node, []).append(dim)

    # ------------------------------------------------------------------ the walk

    def _visit(self, node: Node, parameters: dict[str, str]) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if isinstance(value, Tensor):
                why = f"input {node.name}" if node.name in self._inputs and not self._free_inputs else None
                self.dims[node] = self.fresh(value.shape, why)
                if node.name in parameters:
                    self.params[node] = parameters[node.name]
                    self.from_params.add(node)
            return
        if node.op == "get_attr":
            constant = self.constants.get(str(node.target))
            if isinstance(constant, Tensor):
                self.dims[node] = self.fresh(constant.shape)
            return
        if node.op == "output":
            return
        name = op_name(node)
        if name == "_assert_tensor_metadata":
            return
        incoming = [n for n in node.all_input_nodes if self.dims.get(n) is not None]
        # A stacked or rescaled weight is still a weight: it is sharded as its parameters are, and contracting over it
        # is a row product.
        if incoming and all(n in self.from_params for n in incoming):
            self.from_params.add(node)
        elif self._picks_rows(node):
            self.rows.add(node)
        if self._fresh_at is not None and (dims := self._fresh_at(node, self)) is not None:
            self.dims[node] = dims
            return
        try:
            handler = RULES.get(facts_of(node).rule)
            if handler is None:
                raise NoRuleError(name)
            result = handler(self, node)
            self._require_shape(result, value, name)
        except (NoRuleError, KeyError, IndexError, ValueError):  # not TypeError, AttributeError: a rule with a bug
            result = self._give_up(name, value, incoming)
        self.dims[node] = result

    def _picks_rows(self, node: Node) -> bool:
        facts, first = facts_of(node), node.args[0] if node.args else None
        picks = facts.rule in ("index", "index_select", "gather") and first in self.from_params
        return picks or (facts.moves and first in self.rows and len(node.all_input_nodes) == 1)

    def is_weight(self, node: object) -> bool:
        """Whether the node is made of parameters alone, or of rows of them."""
        return node in self.from_params or node in self.rows

    def _require_shape(self, result: Result, value: Any, name: str) -> None:
        """A rule must reproduce the shape of its node; otherwise it does not cover this use."""
        if isinstance(value, Tensor):
            if not isinstance(result, list) or [size_of(d) for d in result] != [int(n) for n in value.shape]:
                raise NoRuleError(name)
        elif isinstance(value, (tuple, list)):
            if not isinstance(result, tuple) or len(result) != len(value):
                raise NoRuleError(name)
            for part, tensor in zip(result, value, strict=True):
                if isinstance(tensor, Tensor):
                    self._require_shape(part, tensor, name)

    def _give_up(self, name: str, value: Any, incoming: list[Node]) -> Result:
        # Both ends: the operator must see complete operands, and nothing is known of how its result would be sharded.
        self.unknown[name] += 1
        for node in incoming:
            for dim in itertools.chain(*self.tensors(node)):
                forbid(dim, self.at(f"no rule for {name}" if name != OPAQUE else "an untraceable module uses it"))
        why = self.at(f"made by {name}, which has no rule" if name != OPAQUE else "made by an untraceable module")
        if isinstance(value, Tensor):
            return self.fresh(value.shape, why)
        if isinstance(value, (tuple, list)):
            return tuple(self.fresh(v.shape, why) if isinstance(v, Tensor) else None for v in value)
        return None


def is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()
