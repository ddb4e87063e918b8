"""Rules for operators that move and join dimensions."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from colrow.derive.axes import Atom, Dim, forbid, regroup, size_of, unify, unify_dims
from colrow.derive.infer import (
    AxisInference,
    NoRuleError,
    Result,
    argument,
    named_argument,
    number,
    op_name,
    rule,
    shape_of,
)
from colrow.sharding.operator_rules import same_elements


@rule("transpose")
def transpose(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    i, j = number(node, 1, "dim0"), number(node, 2, "dim1")
    dims[i], dims[j] = dims[j], dims[i]
    return dims


@rule("t")
def t(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    if len(dims) > 2:
        raise NoRuleError("t of more than two dimensions")
    return dims[::-1]


@rule("permute")
def permute(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    return [dims[int(i)] for i in argument(node, 1, "dims")]


@rule("movedim")
def movedim(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    source, target = argument(node, 1, "source"), argument(node, 2, "destination")
    if not isinstance(source, int) or not isinstance(target, int):
        raise NoRuleError("movedim of several dimensions")
    order = [i for i in range(len(dims)) if i != source % len(dims)]
    order.insert(target % len(dims), source % len(dims))
    return [dims[i] for i in order]


@rule("unsqueeze")
def unsqueeze(inference: AxisInference, node: Node) -> Result:
    dims, i = list(inference.of(node.args[0])), number(node, 1, "dim")
    dims.insert(i if i >= 0 else i + len(dims) + 1, [])
    return dims


@rule("squeeze")
def squeeze(inference: AxisInference, node: Node) -> Result:
    source = node.args[0]
    assert isinstance(source, Node)
    shape, given = shape_of(source), argument(node, 1, "dim")
    chosen = range(len(shape)) if given is None else [given] if isinstance(given, int) else given
    gone = {i % len(shape) for i in chosen if shape[i] == 1}
    return [dim for i, dim in enumerate(inference.of(source)) if i not in gone]


@rule("view")
def view(inference: AxisInference, node: Node) -> Result:
    """Factors over the new extents. Where an extent cuts through a factor, the dims that it is made of are forbidden,
    and those before and behind them stay: the shift of relative positions, [heads, T, 1 + S] to [heads, 1 + S, T]."""
    source = node.args[0]
    assert isinstance(source, Node)
    dims, old, new = inference.of(source), shape_of(source), shape_of(node)
    if 0 in old:
        raise NoRuleError("view of nothing")
    out: list[Dim] = []
    for run, run_after in same_elements(tuple(old), tuple(new)):
        before, after = dims[run.start : run.stop], new[run_after.start : run_after.stop]
        found = regroup(before, after)
        if found is None:
            for dim in before:
                forbid(dim, inference.at("a view cuts through it"))
            found = inference.fresh(after, "a view cuts through it")
        out += found
    return out


@rule("expand")
def expand(inference: AxisInference, node: Node) -> Result:
    """A stretched axis is new and free: each rank can stretch to its own part."""
    source = node.args[0]
    assert isinstance(source, Node)
    dims, old, new = inference.of(source), shape_of(source), shape_of(node)
    out: list[Dim] = []
    for k, extent in enumerate(new):
        j = k - (len(new) - len(old))
        out.append(dims[j] if j >= 0 and old[j] == extent else [Atom(extent)])
    return out


@rule("repeat")
def repeat(inference: AxisInference, node: Node) -> Result:
    """Copies stand outside: element i of copy c lies at c * extent + i."""
    dims, times = inference.of(node.args[0]), argument(node, 1, "repeats" if op_name(node) == "repeat" else "dims")
    times = [*[1] * (len(dims) - len(times)), *times]
    if not all(isinstance(n, int) for n in times):
        raise NoRuleError("repeat by a computed number")
    padded: list[Dim] = [[] for _ in range(len(times) - len(dims))] + list(dims)
    return [[Atom(n), *dim] if n > 1 else dim for n, dim in zip(times, padded, strict=True)]


@rule("repeat_interleave")
def repeat_interleave(inference: AxisInference, node: Node) -> Result:
    """Copies stand inside: copy c of element i lies at i * times + c."""
    dims, times, where = list(inference.of(node.args[0])), argument(node, 1, "repeats"), argument(node, 2, "dim")
    if not isinstance(times, int) or where is None:
        raise NoRuleError("repeat_interleave with a tensor")
    dims[where] = [*dims[where], Atom(times)]
    return dims


@rule("kron")
def kron(inference: AxisInference, node: Node) -> Result:
    """Each element of the first tensor times the second: dimension i counts the first's, then the second's."""
    x, y = inference.of(node.args[0]), inference.of(node.args[1])
    rank = max(len(x), len(y))
    sides = zip(*([*[[]] * (rank - len(dims)), *dims] for dims in (x, y)), strict=True)
    return [[*one, *other] for one, other in sides]


@rule("diagonal")
def diagonal(inference: AxisInference, node: Node) -> Result:
    """Of two dimensions, which are gone; it stands last."""
    dims = list(inference.of(node.args[0]))
    gone = {int(named_argument(node, name, k)) % len(dims) for k, name in enumerate(("dim1", "dim2"))}
    for i in gone:
        forbid(dims[i], inference.at("its diagonal is taken"))
    kept = [dim for i, dim in enumerate(dims) if i not in gone]
    return [*kept, *inference.fresh(shape_of(node)[-1:], "a diagonal")]


@rule("getitem")
def getitem(inference: AxisInference, node: Node) -> Result:
    parts = inference.dims[node.args[0]]  # type: ignore[index]
    if not isinstance(parts, tuple):
        raise NoRuleError("getitem")
    return parts[number(node, 1, "index")]


@rule("select")
def select(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    forbid(dims.pop(number(node, 1, "dim")), inference.at("single elements are selected"))
    return dims


@rule("unbind")
def unbind(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    forbid(dims.pop(number(node, 1, "dim", 0)), inference.at("its elements are taken apart"))
    return tuple(list(dims) for _ in node.meta["val"])


# ---------------------------------------------------------------------- joining


_STACKED = {"hstack": 1, "vstack": 0, "row_stack": 0, "column_stack": 1, "dstack": 2}


@rule("cat")
def cat(inference: AxisInference, node: Node) -> Result:
    """Along `dim`; the dimension of `hstack`, `vstack` and `dstack` is in their names."""
    # an empty piece has no elements: without it the result may be one tensor, and then it has that one's dims
    tensors: list[Any] = [x for x in node.args[0] if 0 not in shape_of(x)]  # type: ignore[union-attr,arg-type]
    if not tensors:
        raise NoRuleError("nothing is joined")
    rank = len(shape_of(node))
    where = _STACKED[op_name(node)] if op_name(node) in _STACKED else number(node, 1, "dim", 0) % rank
    if any(len(shape_of(x)) <= where for x in tensors):  # these get a dimension first
        raise NoRuleError("vectors are joined as rows")
    extents = [shape_of(x)[where] for x in tensors]
    out = list(inference.of(tensors[0]))
    for x in tensors[1:]:
        for k in range(rank):
            if k != where:
                unify(out[k], inference.of(x)[k], inference.here)
    if len(tensors) == 1:
        return out
    joined = [inference.of(x)[where] for x in tensors]
    if len(set(extents)) == 1:
        for dim in joined[1:]:
            unify(joined[0], dim, inference.here)
        out[where] = [Atom(len(tensors), "index of a concatenation"), *joined[0]]
    else:
        atom = Atom(sum(extents))
        atom.segments = joined
        out[where] = [atom]
    return out


@rule("stack")
def stack(inference: AxisInference, node: Node) -> Result:
    tensors: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    where = number(node, 1, "dim", 0) % len(shape_of(node))
    out = list(inference.of(tensors[0]))
    for x in tensors[1:]:
        unify_dims(out, inference.of(x), inference.here)
    out.insert(where, [Atom(len(tensors), "index of a stack")])
    return out


@rule("slice_scatter")
def slice_scatter(inference: AxisInference, node: Node) -> Result:
    """A copy of the first tensor with a piece of one dimension overwritten: that dimension must not be sharded."""
    base, source = list(inference.of(node.args[0])), inference.of(node.args[1])
    where = number(node, 2, "dim", 0) % len(base)
    partly = size_of(base[where]) != size_of(source[where])
    unify_dims(base, source, inference.here, where if partly else None, inference.at("overwritten in part"))
    return base


@rule("select_scatter")
def select_scatter(inference: AxisInference, node: Node) -> Result:
    base, source = list(inference.of(node.args[0])), list(inference.of(node.args[1]))
    where = number(node, 2, "dim") % len(base)
    forbid(base[where], inference.at("overwritten in part"))
    unify_dims(base[:where] + base[where + 1 :], source, inference.here)
    return base


@rule("view_as_complex")
def view_as_complex(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    forbid(dims[-1], inference.at("real and imaginary part"))
    return dims[:-1]


@rule("view_as_real")
def view_as_real(inference: AxisInference, node: Node) -> Result:
    return [*inference.of(node.args[0]), [Atom(2, "real and imaginary part")]]


@rule("meshgrid")
def meshgrid(inference: AxisInference, node: Node) -> Result:
    """Each vector along a dimension of its own: the results have them all."""
    assert isinstance(node.args[0], (list, tuple))
    vectors = [vector for vector in node.args[0] if isinstance(vector, Node)]
    grid = [inference.of(vector)[0] if shape_of(vector) else [] for vector in vectors]
    if named_argument(node, "indexing", "ij") == "xy":
        grid[:2] = reversed(grid[:2])
    return tuple(list(grid) for _ in grid)
