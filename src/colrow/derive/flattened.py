"""The graph that rules read, from the recorded one: copied node by node where torch need not trace it once more.

[Note: flattened graphs]
Rules read a graph as `run_decompositions({})` gives it: nothing is written in place, and an operator that may return a
view of its operand (`reshape`, `to`, `contiguous`) is the view or the copy that it comes to. torch interprets the graph
twice for that, which takes longer than the export. But nearly all nodes stay as they are: here they are copied, and
only those operators run again, on fake tensors.

A write into memory is its operator without the write, whose result stands for the tensor from there on. A write into a
view (`y[:, i] = x`) makes a new tensor for the owner of the memory (`select_scatter`), and other views of it are taken
again where they are used next. A graph that writes into the model's state, into arguments, or through views that have
no such operator is left to torch.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from colrow.derive.infer import strip
from colrow.derive.recorded import Recording
from colrow.torch_compat import (
    TorchDispatchMode,
    fake_mode_of,
    is_decomposed_in_export,
    python_dispatcher,
    tree_leaves,
)


@dataclass(frozen=True)
class Program:
    """A graph, what its placeholders are, and the values of its constants.

    Attributes:
        parameters: names in the model by placeholder.
        buffers: so for buffers.
        constants: values by placeholder.
        inputs: placeholders of the caller's inputs.
    """

    graph: Graph
    parameters: dict[str, str]
    buffers: dict[str, str]
    constants: dict[str, Tensor]
    inputs: tuple[str, ...]


def exported_program(exported: ExportedProgram) -> Program:
    """What torch.export gives, of a model within a wrapper."""
    signature, values = exported.graph_signature, exported.constants
    constants = {
        placeholder: value
        for names in (signature.inputs_to_lifted_tensor_constants, signature.inputs_to_buffers)
        for placeholder, name in names.items()
        if isinstance(value := values.get(name), Tensor)
    }
    for node in exported.graph.nodes:
        if node.op == "get_attr" and isinstance(
            value := getattr(exported.graph_module, str(node.target), None), Tensor
        ):
            constants[str(node.target)] = value
    parameters, buffers = (
        {placeholder: strip(name) for placeholder, name in names.items()}
        for names in (signature.inputs_to_parameters, signature.inputs_to_buffers)
    )
    return Program(exported.graph, parameters, buffers, constants, tuple(map(str, signature.user_inputs)))


class NotFlattenedError(Exception):
    """The graph has something that only torch takes apart."""


def flattened(recording: Recording) -> Program:
    """The program of [Note: flattened graphs].

    Raises:
        NotFlattenedError: torch has to trace the graph again.
    """
    graph = _Copied(recording.graph, {*recording.parameters, *recording.buffers}).run()
    return Program(graph, recording.parameters, recording.buffers, recording.constants, tuple(recording.inputs))


SCATTERS = {
    torch.ops.aten.select.int: torch.ops.aten.select_scatter.default,
    torch.ops.aten.slice.Tensor: torch.ops.aten.slice_scatter.default,
}
"""Views through which memory is written, and what puts their new values into the tensor that they are of."""


Steps = tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]
"""Operators that take a view of a view, each with its arguments behind the tensor."""


@dataclass(frozen=True)
class View:
    """How a view was taken.

    Attributes:
        owner: the node of the recorded graph whose memory it is.
        steps: from there on.
    """

    owner: Node
    steps: Steps = ()


@dataclass
class Memory:
    """What was written into the memory of a tensor.

    Attributes:
        writes: how many there were.
        seen: how many of them are in what stands for each of its views, and for itself.
        value: the owner's, behind all of them.
    """

    value: Node
    writes: int = 0
    seen: dict[Node, int] = field(default_factory=dict)


@dataclass
class _Copied:
    """A graph while it is copied.

    Attributes:
        recorded: the graph.
        state: placeholders of parameters and buffers.
        new: what stands for each of its nodes: a node, or several where it had several results.
        views: of a node that is a view, how it was taken.
        memory: what was written, by the node that owns the memory.
        closed: owners of memory that has views which cannot be taken again.
        current: the node that is copied now.
    """

    recorded: Graph
    state: set[str]
    graph: Graph = field(default_factory=Graph)
    new: dict[Node, Any] = field(default_factory=dict)
    views: dict[Node, View] = field(default_factory=dict)
    memory: dict[Node, Memory] = field(default_factory=dict)
    closed: set[Node] = field(default_factory=set)
    current: Node = field(init=False)

    def run(self) -> Graph:
        for node in self.recorded.nodes:
            self.current = node
            if node.op == "output":
                # what was written into the state is computed, too
                written = [self._stands_for(owner) for owner in self.memory if owner.op == "placeholder"]
                given = map_arg(node.args[0], self._stands_for)
                self.graph.output((*given, *written) if written else given).meta.update(node.meta)
            else:
                self._copy(node)
        self.graph.eliminate_dead_code()
        return self.graph

    def _stands_for(self, node: Node) -> Any:
        """What stands for a node, with all that was written into its memory."""
        view = self.views.get(node, View(node))
        memory = self.memory.get(view.owner)
        if memory is not None and memory.seen.get(node, 0) < memory.writes:
            self.new[node] = self._viewed(memory.value, view.steps)[-1]
            memory.seen[node] = memory.writes
        return self.new[node]

    def _viewed(self, value: Node, steps: Steps) -> list[Node]:
        """The tensor, and the views that the steps take of it, each of the one before."""
        found = [value]
        for target, args, kwargs in steps:
            found.append(self._call(target, (found[-1], *args), kwargs))
        return found

    def _scattered(self, value: Node, steps: Steps, written: Node) -> Node:
        """The tensor behind a write into the view that the steps take of it."""
        if not steps:
            return written
        for of, (target, args, kwargs) in reversed([*zip(self._viewed(value, steps[:-1]), steps, strict=True)]):
            written = self._call(SCATTERS[target], (of, written, *args), kwargs)
        if written.meta["val"].stride() != value.meta["val"].stride():
            raise NotFlattenedError
        return written

    def _call(
        self,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        value: Any = None,
    ) -> Node:
        """A call that the recorded graph has not, for its node that is copied now."""
        made = self.graph.call_function(target, args, kwargs)
        value = _run(target, args, kwargs) if value is None else value
        made.meta.update(self.current.meta, val=value, from_node=[self.current])
        return made

    def _copy(self, node: Node) -> None:
        target: Any = node.target
        if node.op != "call_function":
            self._add(node, target)
        elif target is operator.getitem:
            self._piece(node, node.all_input_nodes[0])
        elif target is torch.ops.aten.detach_.default:  # writes no memory
            self._is_view(node, node.all_input_nodes[0], ())
        elif target._schema.is_mutable:
            self._write(node, target)
        elif is_decomposed_in_export(target):
            self._compose(node, target)
        else:
            # a constant that code wrote down is lifted where it is copied
            copies = target is torch.ops.aten.lift_fresh_copy.default
            self._add(node, torch.ops.aten.clone.default if copies else target)
            if _returns_views(target):
                self._is_view(
                    node,
                    node.all_input_nodes[0],
                    _steps(target, node.args, node.kwargs),
                )

    def _add(self, node: Node, target: Any) -> Node:
        copy = self.graph.node_copy(node, self._stands_for)
        # of the results of an operator, the operator
        copy.meta["from_node"] = [node.args[0] if target is operator.getitem else node]
        copy.target = target
        self.new[node] = copy
        return copy

    def _piece(self, node: Node, of: Node) -> None:
        if isinstance(results := self._stands_for(of), (tuple, list)):
            self.new[node] = results[node.args[1]]  # type: ignore[index]
            self.closed.add(node)
        else:
            self._add(node, operator.getitem)
            if self._owner(of) in self.closed:
                self.closed.add(node)

    def _owner(self, node: Node) -> Node:
        return self.views[node].owner if node in self.views else node

    def _is_view(self, node: Node, of: Node, steps: Steps | None) -> None:
        """Note that the node is a view: of no step where it is the tensor itself, of None where it cannot be taken
        again."""
        view = self.views.get(of, View(of))
        if steps is None:
            self.closed.add(view.owner)
        self.views[node] = View(view.owner, (*view.steps, *(steps or ())))
        if not steps and node not in self.new:
            self.new[node] = self._stands_for(of)
        if (memory := self.memory.get(view.owner)) is not None:
            memory.seen[node] = memory.writes

    def _write(self, node: Node, target: Any) -> None:
        schema, (written, *_) = target._schema, node.all_input_nodes
        packet = getattr(
            getattr(torch.ops, target.namespace),
            schema.name.partition("::")[2].removesuffix("_"),
            None,
        )
        pure = getattr(packet, target._overloadname, None)
        writes = [i for i, argument in enumerate(schema.arguments) if argument.is_write]
        if pure is None or pure._schema.is_mutable or writes != [0]:
            raise NotFlattenedError
        view, before = self.views.get(written, View(written)), written.meta["val"]
        known = view.owner.op == "call_function" or view.owner.name in self.state
        if not known or view.owner in self.closed:
            raise NotFlattenedError
        if any(step[0] not in SCATTERS for step in view.steps):
            raise NotFlattenedError
        copy = self._add(node, pure)
        value = copy.meta["val"] = _run(pure, copy.args, copy.kwargs)
        # a write keeps the tensor's dtype and strides
        if value.dtype != before.dtype or not (view.steps or value.stride() == before.stride()):
            raise NotFlattenedError
        memory = self.memory.setdefault(view.owner, Memory(self.new[view.owner]))
        memory.writes += 1
        memory.value = self._scattered(memory.value, view.steps, copy)
        self.views[node] = view  # it returns what it wrote into
        for each in (written, node):
            self.new[each], memory.seen[each] = copy, memory.writes

    def _compose(self, node: Node, target: Any) -> None:
        """The operators that torch makes this one of; none where it returns its operand."""
        operands = {self._stands_for(each): each for each in node.all_input_nodes}
        known = {id(copy.meta.get("val")): copy for copy in operands}
        views: dict[Node, tuple[Node, Steps | None]] = {copy: (each, ()) for copy, each in operands.items()}
        args: Any = map_arg(node.args, lambda n: self.new[n].meta["val"])
        kwargs: Any = map_arg(node.kwargs, lambda n: self.new[n].meta["val"])
        mode = next(
            (mode for n in known.values() if (mode := fake_mode_of(n.meta.get("val"))) is not None),
            None,
        )
        recorder = _Recorder()
        with mode or nullcontext(), python_dispatcher(), torch.no_grad(), recorder:
            out = target.decompose(*args, **kwargs)

        def nodes_of(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return type(value)(nodes_of(each) for each in value)
            if isinstance(value, Tensor) and id(value) not in known:
                raise NotFlattenedError
            return known[id(value)] if isinstance(value, Tensor) else value

        def add(target: Any, args: Any, kwargs: Any, value: Any) -> Node:
            made = self._call(target, args, kwargs, value)
            known[id(value)] = made
            return made

        for func, given, named, results in recorder.calls:
            if func._schema.is_mutable:
                raise NotFlattenedError
            given, named = (
                nodes_of(given),
                {key: nodes_of(each) for key, each in named.items()},
            )
            made = add(func, given, named, results)
            if _returns_views(func) and given[0] in views:
                of, before = views[given[0]]
                steps = _steps(func, given, named)
                views[made] = (
                    of,
                    None if before is None or steps is None else (*before, *steps),
                )
            for i, each in enumerate(results if isinstance(results, (tuple, list)) else ()):
                piece = add(operator.getitem, (made, i), {}, each)
                if made in views:
                    views[piece] = views[made]
        self.new[node] = nodes_of(out)
        for result in self.new[node] if isinstance(out, (tuple, list)) else [self.new[node]]:
            if result in views:
                self._is_view(node, *views[result])


def _returns_views(target: Any) -> bool:
    return any(result.alias_info is not None for result in target._schema.returns)


def _steps(target: Any, args: Any, kwargs: Any) -> Steps | None:
    """The step by which an operator takes a view; None where it gives several, or takes sizes from the graph."""
    one = len(target._schema.returns) == 1 and str(target._schema.returns[0].type) == "Tensor"
    if not one or any(isinstance(each, Node) for each in tree_leaves((args[1:], kwargs))):
        return None
    return ((target, tuple(args[1:]), dict(kwargs)),)


def _run(target: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator on fake tensors."""
    given, named = (map_arg(each, lambda n: n.meta["val"]) for each in (args, kwargs))
    with fake_mode_of(given[0]) or nullcontext(), python_dispatcher(), torch.no_grad():
        return target(*given, **named)


class _Recorder(TorchDispatchMode):
    """Keeps what is called, and with what result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result
