"""Rules for operators that act element by element, make constants, or reduce and normalise."""

from __future__ import annotations

from torch.fx import Node

from colrow.derive.axes import Dim, forbid, leaves, mark_normalised, unify, unify_dims
from colrow.derive.infer import AxisInference, Dims, Result, argument, named_argument, number, op_name, rule, shape_of


def broadcast(inference: AxisInference, shape: list[int], tensors: list[tuple[Dims, list[int]]], why: str) -> Dims:
    """The dimensions of an element-wise result: aligned from the right, size 1 stretched."""
    out: Dims = [[] for _ in shape]
    for dims, extents in tensors:
        for k in range(1, len(extents) + 1):
            if extents[-k] == 1:
                continue
            if out[-k]:
                unify(out[-k], dims[-k], why)
            else:
                out[-k] = dims[-k]
    return out


@rule("elementwise")
def elementwise(inference: AxisInference, node: Node) -> Result:
    tensors = [n for n in node.all_input_nodes if isinstance(inference.dims.get(n), list)]
    shape = shape_of(node)
    return broadcast(inference, shape, [(inference.of(n), shape_of(n)) for n in tensors], inference.here)


@rule("broadcast")
def broadcast_tensors(inference: AxisInference, node: Node) -> Result:
    """Every tensor stretched to the shape of all."""
    assert isinstance(node.args[0], (list, tuple))
    tensors = [n for n in node.args[0] if isinstance(n, Node)]
    dims = broadcast(
        inference,
        [int(n) for n in node.meta["val"][0].shape],
        [(inference.of(n), shape_of(n)) for n in tensors],
        inference.here,
    )
    return tuple(list(dims) for _ in tensors)


@rule("prelu")
def prelu(inference: AxisInference, node: Node) -> Result:
    """One slope, or one for each channel, which is dim 1 (of a vector its only one)."""
    dims, slopes = inference.of(node.args[0]), inference.of(node.args[1])
    if leaves(slopes[-1] if slopes else []):
        unify(dims[min(1, len(dims) - 1)], slopes[-1], inference.here)
    return dims


@rule("constant")
def constant(inference: AxisInference, node: Node) -> Result:
    return inference.fresh(shape_of(node))


@rule("like")
def like(inference: AxisInference, node: Node) -> Result:
    return inference.of(node.args[0])


def reduced_dims(node: Node, rank: int) -> set[int]:
    given = named_argument(node, "dim")
    if given is None or given == []:
        return set(range(rank))
    return {int(i) % rank for i in ([given] if isinstance(given, int) else given)}


def _without(dims: Dims, gone: set[int], keep: bool) -> Dims:
    out: Dims = []
    for i, dim in enumerate(dims):
        if i not in gone:
            out.append(dim)
        elif keep:
            out.append([])
    return out


@rule("sum")
def summed(inference: AxisInference, node: Node) -> Result:
    """A sum over a sharded axis is a partial sum, but nothing says that it may stay one: the axis is forbidden."""
    dims = inference.of(node.args[0])
    gone = reduced_dims(node, len(dims))
    for i in gone:
        forbid(dims[i], inference.at("summed over"))
    return _without(dims, gone, bool(argument(node, 2, "keepdim", False)))


@rule("mean")
def mean(inference: AxisInference, node: Node) -> Result:
    """The mean inside a norm: sharding the axis costs a reduction of one number for each row."""
    dims = inference.of(node.args[0])
    gone = reduced_dims(node, len(dims))
    keep = bool(argument(node, 2, "keepdim", False))
    if gone == {len(dims) - 1} and keep:
        inference.average(node, dims[-1])
        mark_normalised(dims[-1], inference.at("normalised over"))
    else:
        for i in gone:
            forbid(dims[i], inference.at("averaged over"))
    return _without(dims, gone, keep)


@rule("reduce")
def reduce(inference: AxisInference, node: Node) -> Result:
    """Values alone, or a tuple: with their indices, a variance with its mean."""
    dims = inference.of(node.args[0])
    gone = reduced_dims(node, len(dims))
    for i in gone:
        forbid(dims[i], inference.at(f"reduced by {op_name(node)}"))
    return _of_each_result(node, _without(dims, gone, bool(named_argument(node, "keepdim", False))))


@rule("along")
def along(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    forbid(dims[number(node, 1, "dim")], inference.at(f"{op_name(node).strip('_')} runs along it"))
    return _of_each_result(node, dims)


def _of_each_result(node: Node, dims: Dims) -> Result:
    """These dimensions, once for each tensor that the node gives."""
    value = node.meta["val"]
    return tuple(list(dims) for _ in value) if isinstance(value, (tuple, list)) else dims


@rule("distance")
def distance(inference: AxisInference, node: Node) -> Result:
    """Compares two vectors along a dimension of what is broadcast, which is gone then: the last one, or `dim`."""
    one, other = node.args[:2]
    assert isinstance(one, Node)
    assert isinstance(other, Node)
    sides = [(inference.of(given), shape_of(given)) for given in (one, other)]
    shape = [max(pair) for pair in zip(shape_of(one), shape_of(other), strict=True)]
    dims = broadcast(inference, shape, sides, inference.here)
    default = 1 if op_name(node) == "cosine_similarity" else -1
    where = named_argument(node, "dim", default) % len(dims)
    forbid(dims[where], inference.at(f"reduced by {op_name(node)}"))
    return _without(dims, {where}, bool(named_argument(node, "keepdim", False)))


@rule("cdist")
def cdist(inference: AxisInference, node: Node) -> Result:
    """Distances of each row of x [..., P, M] to each of y [..., R, M]."""
    one, other = node.args[:2]
    assert isinstance(one, Node)
    assert isinstance(other, Node)
    x, y = inference.of(one), inference.of(other)
    for dim in (x[-1], y[-1]):
        forbid(dim, inference.at("distances are taken along it"))
    batch = shape_of(node)[:-2]
    lead = broadcast(inference, batch, [(x[:-2], shape_of(one)[:-2]), (y[:-2], shape_of(other)[:-2])], inference.here)
    return [*lead, x[-2], y[-2]]


@rule("cross")
def cross(inference: AxisInference, node: Node) -> Result:
    """Of vectors of three elements along one dimension."""
    dims = elementwise(inference, node)
    assert isinstance(dims, list)
    where = named_argument(node, "dim", None)
    where = shape_of(node).index(3) if where is None else where  # `cross` takes the first dimension of 3
    forbid(dims[where], inference.at("a cross product runs along it"))
    return dims


@rule("fft")
def fourier(inference: AxisInference, node: Node) -> Result:
    """Along the dimensions that are given, whose extents may change; else along the last, the last two, or all (of `n`
    as many as sizes are given)."""
    dims, shape, name = list(inference.of(node.args[0])), shape_of(node), op_name(node)
    given = named_argument(node, "dim", [-2, -1] if name.endswith("2") else -1)
    if given is None:
        sizes = argument(node, 1, "s", None)
        given = range(-len(sizes if sizes is not None else dims), 0)
    for i in [given] if isinstance(given, int) else given:
        forbid(dims[i], inference.at("a Fourier transform runs along it"))
        dims[i] = inference.fresh([shape[i]], inference.at("a Fourier transform runs along it"))[0]
    return dims


@rule("reorder")
def reorder(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    where = named_argument(node, "dim" if "shift" in op_name(node) else "dims", ())
    for i in [where] if isinstance(where, int) else where or range(len(dims)):
        forbid(dims[i], inference.at(f"reordered by {op_name(node)}"))
    return dims


@rule("triangle")
def triangle(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    for dim in dims[-2:]:
        forbid(dim, inference.at("triangular mask"))
    return dims


@rule("norm")
def norm(inference: AxisInference, node: Node) -> Result:
    """Normalises over the last dimensions; weight and bias run along them."""
    dims = inference.of(node.args[0])
    shape = list(node.args[1])  # type: ignore[arg-type]
    over: list[Dim] = dims[len(dims) - len(shape) :]
    for position in (2, 3) if op_name(node) == "layer_norm" else (2,):
        given = argument(node, position, "weight" if position == 2 else "bias")
        if isinstance(given, Node):
            unify_dims(over, inference.of(given), inference.here)
    if len(over) == 1:
        inference.average(node, over[0])
        mark_normalised(over[0], inference.at("normalised over"))
    else:
        for dim in over:
            forbid(dim, inference.at("normalised over"))
    return dims


@rule("norm with statistics")
def norm_with_statistics(inference: AxisInference, node: Node) -> Result:
    """What `torch.func.vmap` makes of a layer norm: the result, mean and deviation."""
    dims = inference.of(node.args[0])
    shape = list(node.args[1])  # type: ignore[arg-type]
    kept, over = dims[: len(dims) - len(shape)], dims[len(dims) - len(shape) :]
    for given in node.args[2:4]:
        if isinstance(given, Node):
            unify_dims(over, inference.of(given), inference.here)
    for dim in over:
        forbid(dim, inference.at("normalised over"))
    return dims, *([*kept, *([] for _ in shape)] for _ in range(2))


@rule("pad")
def pad(inference: AxisInference, node: Node) -> Result:
    source = node.args[0]
    assert isinstance(source, Node)
    dims, amounts = list(inference.of(source)), list(node.args[1])  # type: ignore[arg-type]
    out = shape_of(node)
    for k in range(len(amounts) // 2):
        if amounts[2 * k] or amounts[2 * k + 1]:
            forbid(dims[-1 - k], inference.at("padded"))
            dims[-1 - k] = inference.fresh([out[-1 - k]], "padded")[0]
    return dims


@rule("diff")
def diff(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    where = number(node, 2, "dim", -1)
    forbid(dims[where], inference.at("differences run along it"))
    dims[where] = inference.fresh([shape_of(node)[where]], "differences run along it")[0]
    return dims
