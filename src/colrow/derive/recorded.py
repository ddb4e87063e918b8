"""The operators of a model's forward, recorded as it runs on fake tensors.

[Note: recorded graphs]
torch.export runs a model's code on fake tensors and keeps the operators that it calls, before autograd and before
composite operators are taken apart. A graph that is only read needs no more than that: the same mode of torch's
dispatcher, one node for each call, without the proxies, guards, signatures and regions of an exported program, which
take most of its time. Regions without gradients leave no trace here: their operators stand among the others.

What a recording does not know is left to torch.export: sizes that depend on the data, functions over a batch
(`vmap`), autocast, operators that take functions (`cond`), and tensors that came about unseen.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from colrow.dryrun.calls import Inputs
from colrow.torch_compat import (
    PreDispatchMode,
    as_in_export,
    attributes_put_back,
    fake_state,
    fake_tensor_mode,
    is_fake,
    is_transformed,
    python_dispatcher,
    replaced,
)

_NODE = "_colrow_node"
"""The attribute of a fake tensor that holds the node which gave it."""


class NotRecordedError(Exception):
    """The model does what only torch.export can trace."""


@dataclass(frozen=True)
class Recording:
    """A graph as it was recorded, and what its placeholders are.

    Attributes:
        parameters: the names in the model by placeholder; of tied parameters the first.
        buffers: so for buffers.
        constants: the values of tensors that code made or that stand in attributes, by placeholder.
        inputs: placeholders of the caller's inputs.
    """

    graph: Graph = field(default_factory=Graph)
    parameters: dict[str, str] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)


def record(model: nn.Module, inputs: Inputs, call: Callable[..., tuple[Tensor, ...]]) -> Recording:
    """The operators of `call`, which runs the model; its modules' attributes are put back as they were.

    Raises:
        NotRecordedError: the recording would not be complete.
        Exception: what the model's code raises.
    """
    found, mode = Recording(), fake_tensor_mode(allow_non_fake_inputs=True, export=True)
    recorder = _Recorder(found, {id(module): name for name, module in model.named_modules()})
    fakes = {}
    # each module once: of one that has two names the second exchange would put the fake tensors back
    for owner, module in model.named_modules():
        for known, kind, prefix in (
            (module.named_parameters(owner, recurse=False, remove_duplicate=False), found.parameters, "p"),
            (module.named_buffers(owner, recurse=False, remove_duplicate=False), found.buffers, "b"),
        ):
            for name, value in known:
                fakes[name] = fake = mode.from_tensor(value)
                if recorder.known(fake) is None:
                    kind[recorder.placeholder(f"{prefix}_{name}", fake).name] = name
    given = inputs.map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x)
    for i, fake in enumerate(given.tensors):
        found.inputs.append(recorder.placeholder(f"inputs_{i}", fake).name)
    gradients = torch.is_grad_enabled()
    try:
        with (
            attributes_put_back(model),
            fake_state(model, fakes),
            as_in_export(),
            recorder.following(),
            mode,
            python_dispatcher(),
            recorder,
        ):
            results = call(*given)
            if any(fakes.get(name, value) is not value for name, value in model.named_buffers(remove_duplicate=False)):
                raise NotRecordedError("the model's code puts another tensor in a buffer's place")
    finally:
        torch.set_grad_enabled(gradients)
    found.graph.output(tuple(recorder.node_of(result) for result in results))
    return found


class _Recorder(PreDispatchMode):
    """Makes a node of each call.

    Args:
        names: the model's modules by identity.
    """

    def __init__(self, found: Recording, names: dict[int, str]) -> None:
        super().__init__()
        self.found, self.graph, self.names = found, found.graph, names
        self.path = [""]
        self.constants: dict[int, tuple[Node, Tensor]] = {}

    @contextmanager
    def following(self) -> Iterator[None]:
        """Within, `path` ends with the module whose code runs."""
        called = nn.Module.__call__

        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.path.append(self.names.get(id(module), self.path[-1]))
            try:
                return called(module, *args, **kwargs)
            finally:
                self.path.pop()

        with replaced(nn.Module, __call__=call):
            yield

    def placeholder(self, name: str, value: Tensor) -> Node:
        node = self.graph.placeholder(re.sub(r"\W", "_", name))
        self._keep(node, value)
        return node

    def known(self, value: Tensor) -> Node | None:
        """The node that gave the tensor."""
        node = getattr(value, _NODE, None) if is_fake(value) else self.constants.get(id(value), (None,))[0]
        return node if node is not None and node.graph is self.graph else None

    def node_of(self, value: Tensor) -> Node:
        if (node := self.known(value)) is not None:
            return node
        if type(value) not in (Tensor, nn.Parameter) or is_transformed(value):
            raise NotRecordedError("a tensor came about unseen")
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.placeholder(f"c_lifted_tensor_{len(self.constants)}", value)
        self.found.constants[node.name] = value
        self.constants[id(value)] = node, value
        return node

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
            raise NotRecordedError("autocast")
        if func._schema.is_mutable and isinstance(args[0], Tensor) and (node := self.known(args[0])) is not None:
            # the operator may change the extents of the tensor that earlier nodes have
            node.meta["val"] = args[0].detach()
        given, named = self._operands(args), {key: self._operands(value) for key, value in kwargs.items()}
        result = func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags and not isinstance(result, Tensor):
            return result  # of a number that code wrote down
        # a constant that code wrote down is copied, so that a write into it changes no other call's
        target = torch.ops.aten.lift_fresh_copy.default if func is torch.ops.aten.lift_fresh.default else func
        self._track(self._node(target, given, named, target.overloadpacket.__name__), result)
        return result

    def _operands(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, (tuple, list)):
            return type(value)(map(self._operands, value))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise NotRecordedError("a size depends on the data")
        return value

    def _node(self, target: Any, args: Any, kwargs: Any, name: str) -> Node:
        node = self.graph.create_node("call_function", target, args, kwargs, name)
        node.meta["nn_module_stack"] = {"": (self.path[-1], "")}
        return node

    def _track(self, node: Node, result: Any) -> None:
        self._keep(node, result)
        if isinstance(result, (tuple, list)):
            for i, each in enumerate(result):
                self._track(self._node(operator.getitem, (node, i), {}, "getitem"), each)

    def _keep(self, node: Node, value: Any) -> None:
        node.meta["val"] = value
        if is_fake(value):
            setattr(value, _NODE, node)
            if node.op == "call_function" and _makes_memory(node.target):
                # what such a function gave it returns as another tensor, if somebody else holds the first
                node.meta["val"] = value.detach()


@cache
def _makes_memory(target: Any) -> bool:
    """Whether it is one of torch's functions of sizes and options: `arange`, `zeros_like`."""
    schema = getattr(target, "_schema", None)
    return schema is not None and any(argument.name == "pin_memory" for argument in schema.arguments)
