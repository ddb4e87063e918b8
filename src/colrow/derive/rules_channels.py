"""Rules for operators on [batch, channels, positions ...]: convolutions, norms of channels, windows of positions.

Channels may be sharded, positions may not: a window reaches over the edge of a shard.
"""

from __future__ import annotations

import re

from torch.fx import Node

from colrow.derive.axes import Dim, forbid, regroup, size_of, unify
from colrow.derive.infer import AxisInference, Dims, NoRuleError, Result, argument, facts_of, number, op_name, rule
from colrow.derive.infer import shape_of as extents
from colrow.derive.rules_products import weighted


def _grouped(dim: Dim, groups: int) -> tuple[Dim, Dim]:
    """Channels as [groups, channels of a group]."""
    parts = regroup([dim], [groups, size_of(dim) // groups])
    if parts is None:
        raise NoRuleError("channels that are no multiple of their groups")
    return parts[0], parts[1]


def channel_groups(node: Node, local_channels: int) -> int | None:
    """How many groups the operator has for so many channels of its first operand; None: it has no groups."""
    where = facts_of(node).groups
    if where is None:
        return None
    groups = int(argument(node, where, "groups", 1))
    source = node.args[0]
    assert isinstance(source, Node)
    channels = extents(source)[_channel(node, source)]
    return groups if groups == 1 else max(1, groups * local_channels // channels)


def _channel(node: Node, source: Node) -> int:
    """Position of the channels: first of all, or behind the batch."""
    positions = re.search(r"conv\D*([123])d", op_name(node))
    return 1 if positions is None else len(extents(source)) - 1 - int(positions[1])


def channels_of(inference: AxisInference, node: Node) -> Dim:
    """The channels of the first operand of an operator that has groups."""
    source = node.args[0]
    assert isinstance(source, Node)
    return inference.of(source)[_channel(node, source)]


@rule("conv")
def convolution(inference: AxisInference, node: Node) -> Result:
    """x [B, I, ...] and w [O, I/G, ...]; of a transposed one w [I, O/G, ...]. Of G groups output channel o sees the
    inputs of its own group: whole groups may be sharded. Of one group the sum over inputs is a contraction."""
    source, kernel = node.args[:2]
    assert isinstance(source, Node)
    assert isinstance(kernel, Node)
    transposed = "transpose" in op_name(node)
    x, w, shape = inference.of(source), inference.of(kernel), extents(node)
    c, groups = _channel(node, source), int(argument(node, 6, "groups", 1))
    into, outof = (w[0], w[1]) if transposed else (w[1], w[0])
    if groups == 1:
        unify(x[c], into, inference.here)
        weighted(inference, node, into, source, kernel)
        out: Dim = outof
    else:
        # With several groups, those are the axis that may be sharded: a rank has complete groups of inputs and weights.
        (group, inputs), (its, rest) = _grouped(x[c], groups), _grouped(w[0], groups)
        unify(group, its, inference.here)
        unify(inputs, rest if transposed else w[1], inference.here)
        outputs = w[1] if transposed else rest
        for inside in (inputs, outputs):
            forbid(inside, inference.at("channels of one group of a convolution"))
        out = [*group, *outputs]
    bias = argument(node, 2, "bias")
    if bias is not None:
        unify(inference.of(bias)[0], out, inference.here)
    for dim in w[2:]:
        forbid(dim, inference.at("a convolution's window"))
    # A window of one position without stride or padding looks at that position alone, as a linear layer does.
    point = all(n == 1 for n in extents(kernel)[2:]) and shape[c + 1 :] == extents(source)[c + 1 :]
    return [*x[:c], out, *(x[c + 1 :] if point else _moved(inference, x, shape, c + 1, "a convolution runs along it"))]


def _moved(inference: AxisInference, x: Dims, shape: list[int], first: int, why: str) -> Dims:
    """Dims `first` and following behind an operator that mixes positions: fresh ones, none of which may be sharded."""
    for dim in x[first:]:
        forbid(dim, why)
    return inference.fresh(shape[first:], why)


@rule("windows")
def windows(inference: AxisInference, node: Node) -> Result:
    """Pooling, resizing, padding of the last dims, as many as the name says."""
    x = inference.of(node.args[0])
    positions = re.search(r"([123])d", op_name(node))
    assert positions is not None
    first = len(x) - int(positions[1])
    value = node.meta["val"]
    shape = [int(n) for n in (value[0] if isinstance(value, (tuple, list)) else value).shape]
    out = [*x[:first], *_moved(inference, x, shape, first, f"{op_name(node).strip('_')} runs along it")]
    return tuple(list(out) for _ in value) if isinstance(value, (tuple, list)) else out


@rule("im2col")
def im2col(inference: AxisInference, node: Node) -> Result:
    """[B, C, H, W] to [B, C * window, positions]: the windows of a channel lie side by side."""
    x, shape = inference.of(node.args[0]), extents(node)
    *batch, channels = x[:-2]
    counts = [shape[-2] // size_of(channels), shape[-1]]  # elements of a window, and windows
    window, positions = _moved(inference, x[-2:], counts, 0, "windows are taken of it")
    return [*batch, [*channels, *window], positions]


@rule("group_norm")
def group_norm(inference: AxisInference, node: Node) -> Result:
    """Each group of channels is normalised by itself, over all positions: whole groups may be sharded."""
    x = inference.of(node.args[0])
    groups, channels = _grouped(x[1], number(node, 1, "num_groups"))
    forbid(channels, inference.at("normalised over, with the others of its group"))
    for dim in x[2:]:
        forbid(dim, inference.at("normalised over"))
    for position, name in ((2, "weight"), (3, "bias")):
        given = argument(node, position, name)
        if isinstance(given, Node):
            unify(inference.of(given)[0], [*groups, *channels], inference.here)
    return x


def _normed_by_channel(inference: AxisInference, node: Node) -> Dims:
    """The input of a norm over positions; weight, bias, running mean and variance run along its channels."""
    x = inference.of(node.args[0])
    for given in node.args[1:5]:
        if isinstance(given, Node):
            unify(inference.of(given)[0], x[1], inference.here)
    for dim in x[2:]:
        forbid(dim, inference.at("normalised over"))
    return x


@rule("batch_norm")
def batch_norm(inference: AxisInference, node: Node) -> Result:
    """Each channel has statistics of its own."""
    x = _normed_by_channel(inference, node)
    forbid(x[0], inference.at("normalised over"))
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):
        return x
    shapes = [[int(n) for n in v.shape] for v in value[1:]]
    return (x, *([x[1]] if shape == [size_of(x[1])] else inference.fresh(shape) for shape in shapes))


@rule("instance_norm")
def instance_norm(inference: AxisInference, node: Node) -> Result:
    """Each channel of each sample is normalised by itself."""
    return _normed_by_channel(inference, node)


@rule("weight_norm")
def weight_norm(inference: AxisInference, node: Node) -> Result:
    """v g / |v|, the norm over all dims but one."""
    v, g = inference.of(node.args[0]), inference.of(node.args[1])
    kept = number(node, 2, "dim", 0)
    for k, dim in enumerate(v):
        if kept < 0 or k != kept:
            forbid(dim, inference.at("normalised over by a weight norm"))
    if kept >= 0:
        unify(g[kept], v[kept], inference.here)
    return v


@rule("recurrent")
def recurrent(inference: AxisInference, node: Node) -> Result:
    """At every step all features of the state go into each feature of the next one: nothing is sharded, weights
    included, and the reason is kept with each of them."""
    why = f"each step of {op_name(node).removesuffix('_cell').upper()} mixes all features of its state"
    for operand in node.all_input_nodes:
        for dim in inference.of(operand):
            forbid(dim, why)
    value = node.meta["val"]
    if not isinstance(value, (tuple, list)):  # a cell of one state
        return inference.fresh(extents(node), why)
    return tuple(inference.fresh([int(n) for n in v.shape], why) for v in value)
