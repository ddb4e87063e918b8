"""Rewrites the graph of a block before inductor compiles it, where an operator of ours does with less memory traffic
what inductor's kernels do:

- silu(a) b with a, b = y.split(f, -1): `ops.swiglu`, whose backward writes the gradient of y in one pass.
- The largest |number| of each row of what an 8-bit linear rounds in its forward: as a part of the graph, so that the
  kernel that makes the numbers finds it too. The operator then reads one number a row in place of all of them. In
  backward that gains nothing (H200): the kernel behind attention gets slower by as much as the operator saves.

The graph is dynamo's: torch functions and methods, before autograd.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

import colrow.ops.parallel_linear
import colrow.ops.swiglu  # noqa: F401 (these register operators)
from colrow.ops.linear_options import LinearOptions
from colrow.torch_compat import inductor

_PRODUCTS = (operator.mul, torch.mul, "mul")
_SPLITS = (torch.split, torch.chunk, "split", "chunk")
_LINEARS = (torch.ops.colrow.column_forward, torch.ops.colrow.row_forward)
_FLATTENED = ("flatten", "view", "reshape")


def fused_inductor(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A backend of torch.compile: inductor, after `rewrite` on GPUs."""
    if any(isinstance(x, Tensor) and x.is_cuda for x in inputs):
        rewrite(graph)
    compiled: Callable[..., Any] = inductor()(graph, inputs)
    return compiled


def rewrite(module: fx.GraphModule) -> None:
    """Change the graph in place, see above."""
    graph = module.graph
    peaks: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if (found := _swiglu_of(node)) is not None:
            h, peaks_of_h = _fuse_swiglu(graph, node, *found)
            peaks[h] = peaks_of_h
    for node in list(graph.nodes):
        if node.target in _LINEARS and LinearOptions.parse(node.args[3]).fp8 == "tensorwise":
            _give_peaks(graph, node, peaks)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()


def _swiglu_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The tensor y and the half a of it where the node is silu(a) b, and b is the other half; nothing else reads a, b
    and silu(a)."""
    if node.target not in _PRODUCTS or len(node.args) != 2 or node.kwargs:
        return None
    for silu, b in (node.args, node.args[::-1]):
        if not (isinstance(silu, fx.Node) and isinstance(b, fx.Node)):
            continue
        if silu.target is not F.silu or len(silu.users) > 1 or silu.kwargs.get("inplace") or len(silu.args) > 1:
            continue
        a = silu.args[0]
        if isinstance(a, fx.Node) and (y := _halved(a)) is not None and y is _halved(b):
            return (y, a) if {a.args[1], b.args[1]} == {0, 1} else None
    return None


def _halved(half: fx.Node) -> fx.Node | None:
    """The tensor that is split in two along its last dim, of which this is a half that one node reads."""
    if half.target is not operator.getitem or len(half.users) > 1:
        return None
    split = half.args[0]
    if not isinstance(split, fx.Node) or split.target not in _SPLITS:
        return None
    y, halves = split.args[0], split.meta.get("example_value")
    value = _value(y)
    if value is None or not isinstance(halves, tuple | list) or len(halves) != 2 or value.dim() < 2:
        return None
    f, rest = value.shape[-1], value.shape[:-1]
    equal = all(part.shape[-1] * 2 == f and part.shape[:-1] == rest for part in halves)
    return y if isinstance(y, fx.Node) and equal and value.is_floating_point() else None


def _value(node: Any) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _fuse_swiglu(graph: fx.Graph, node: fx.Node, y: fx.Node, a: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Replace silu(a) b. Returns the node that holds it now, and that of its rows' largest numbers."""
    with graph.inserting_before(node):
        rows = graph.call_method("flatten", (y, 0, -2))
        both = graph.call_function(torch.ops.colrow.swiglu.default, (rows, a.args[1]))
        h, peaks = (graph.call_function(operator.getitem, (both, i)) for i in (0, 1))
        shaped = graph.call_method("view_as", (h, a))
    shaped.meta.update(node.meta)
    node.replace_all_uses_with(shaped)
    graph.erase_node(node)
    return shaped, peaks


def _give_peaks(graph: fx.Graph, node: fx.Node, known: dict[fx.Node, fx.Node]) -> None:
    """Give an 8-bit linear the largest |number| of each row of its input."""
    x = node.args[0]
    assert isinstance(x, fx.Node)
    peaks = known.get(_unflattened(x))
    with graph.inserting_before(node):
        if peaks is None:
            numbers = graph.call_method("abs", (graph.call_method("detach", (x,)),))
            peaks = graph.call_method("amax", (numbers, -1))
    node.args = (*node.args[:4], peaks, *node.args[5:])  # the argument behind input, weights, group and options


def _unflattened(x: fx.Node) -> fx.Node:
    """What x is a view of, with the same rows; else x."""
    source = x.args[0] if x.op == "call_method" and x.target in _FLATTENED else x
    before, after = _value(source), _value(x)
    if not isinstance(source, fx.Node) or before is None or after is None or before.shape[-1] != after.shape[-1]:
        return x
    return source
