"""Arguments of one rank: the numbers of a traced call that state extents along sharded axes become local ones.

One function for each rule of the operator table whose operators take such numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from colrow.derive.axes import leaves
from colrow.derive.choice import Choice
from colrow.derive.infer import AxisInference, Dims, facts_of, number, op_name, shape_of
from colrow.derive.rules_channels import channel_groups, channels_of
from colrow.derive.rules_pieces import Piece, index_piece, sibling_pieces, slice_piece, split_pieces


@dataclass(frozen=True)
class Call:
    """A node, and its arguments with the node's operands replaced by a rank's tensors."""

    node: Node
    args: list[Any]
    inference: AxisInference
    choice: Choice

    @property
    def dims(self) -> Dims:
        """The result's dimensions."""
        return self.inference.of(self.node)

    def source(self) -> Dims:
        """The first operand's dimensions."""
        return self.inference.of(self.node.args[0])

    def start(self, source: Node, dim: int, piece: Piece) -> int:
        """Where a piece starts in a rank's shard: after the local extents of the pieces before it."""
        axis, pieces = self.inference.of(source)[dim], sibling_pieces(self.inference, source, dim)
        before = pieces.index(piece)
        if len({length for _, length in pieces}) == 1:
            return before * (self.choice.local_size(axis) // len(pieces))
        return sum(self.choice.local_size(segment) for segment in (leaves(axis)[0].segments or [])[:before])


Localize = Callable[[Call], list[Any]]
LOCALIZE: dict[str, Localize] = {}


def localized(node: Node, args: list[Any], inference: AxisInference, choice: Choice) -> list[Any]:
    """`args` with local extents; as they are where the operator takes none."""
    localize = LOCALIZE.get(facts_of(node).rule)
    return localize(Call(node, args, inference, choice)) if localize else args


def localizes(*rules: str) -> Callable[[Localize], Localize]:
    def register(function: Localize) -> Localize:
        LOCALIZE.update(dict.fromkeys(rules, function))
        return function

    return register


@localizes("view", "expand")
def shape(call: Call) -> list[Any]:
    return [call.args[0], call.choice.local_shape(call.dims)]


@localizes("repeat")
def repeat(call: Call) -> list[Any]:
    before = call.choice.local_shape(call.source())
    padded = [1] * (len(call.dims) - len(before)) + before
    times = [call.choice.local_size(dim) // max(n, 1) for dim, n in zip(call.dims, padded, strict=True)]
    return [call.args[0], times, *call.args[2:]]


@localizes("repeat_interleave")
def repeat_interleave(call: Call) -> list[Any]:
    where = number(call.node, 2, "dim")
    times = call.choice.local_size(call.dims[where]) // call.choice.local_size(call.source()[where])
    return [call.args[0], times, *call.args[2:]]


@localizes("slice")
def slice_(call: Call) -> list[Any]:
    source, dim, piece, step = slice_piece(call.node)
    if not call.choice.sharded(call.source()[dim]):
        return call.args
    if step != 1:
        return [call.args[0], dim, piece[0], shape_of(source)[dim], step]
    if piece[1] == shape_of(source)[dim]:
        return call.args[:1]
    start = call.start(source, dim, piece)
    return [call.args[0], dim, start, start + call.choice.local_size(call.dims[dim]), step]


@localizes("conv", "group_norm")
def groups(call: Call) -> list[Any]:
    count = channel_groups(call.node, call.choice.local_size(channels_of(call.inference, call.node)))
    where = facts_of(call.node).groups
    assert where is not None
    return [*call.args[:where], count, *call.args[where + 1 :]] if len(call.args) > where else call.args


@localizes("index")
def index(call: Call) -> list[Any]:
    found = index_piece(call.inference, call.node)
    if found is None or not call.choice.sharded(call.source()[found[1]]):
        return call.args
    source, dim, piece = found
    start = call.start(source, dim, piece)
    indices = list(call.args[1])
    indices[dim] = torch.arange(start, start + call.choice.local_size(call.dims[dim]))
    return [call.args[0], indices, *call.args[2:]]


@localizes("split")
def split(call: Call) -> list[Any]:
    dim, _ = split_pieces(call.node)
    parts = call.inference.dims[call.node]
    name = op_name(call.node)  # chunk takes a count, which is the same on every rank
    if name == "chunk" or not isinstance(parts, tuple) or not call.choice.sharded(call.source()[dim]):
        return call.args
    sizes = [call.choice.local_size(part[dim]) for part in parts if part is not None]
    return [call.args[0], sizes[0] if name == "split" else sizes, *call.args[2:]]
