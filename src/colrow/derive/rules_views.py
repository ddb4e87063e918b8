"""Rules for operators that move, cut, and join dimensions."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from colrow.derive.axes import Atom, Dim, block, leaves, regroup, size_of, unify
from colrow.derive.infer import AxisInference, NoRuleError, Result, argument, facts_of, number, op_name, rule, shape_of

Piece = tuple[int, int]
"""Start and length of a part of a dimension."""


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
    out = regroup(inference.of(node.args[0]), shape_of(node))
    if out is None:
        raise NoRuleError("view across factors")
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
    dims, times = inference.of(node.args[0]), argument(node, 1, "repeats")
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


# ---------------------------------------------------------------------- cutting


def slice_piece(node: Node) -> tuple[Node, int, Piece, int]:
    """Source, non-negative dimension, piece and step of an aten.slice node."""
    source = node.args[0]
    assert isinstance(source, Node)
    shape = shape_of(source)
    dim = number(node, 1, "dim", 0) % len(shape)
    start = argument(node, 2, "start", None) or 0
    step = argument(node, 4, "step", 1) or 1
    if not isinstance(start, int) or not isinstance(step, int):
        raise NoRuleError("slice with a computed bound")
    start = max(0, start + shape[dim]) if start < 0 else min(start, shape[dim])
    return source, dim, (start, shape_of(node)[dim]), step


def index_piece(inference: AxisInference, node: Node) -> tuple[Node, int, Piece] | None:
    """The piece that `x[:, [3]]` takes, where one index tensor is a known run of numbers."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(indices, (list, tuple))
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1 or not isinstance(given[0][1], Node):
        return None
    dim, index = given[0]
    while facts_of(index).identity:
        index = index.args[0]
        assert isinstance(index, Node)
    value = inference.constants.get(index.name if index.op == "placeholder" else str(index.target))
    if not isinstance(value, Tensor) or value.device.type == "meta" or value.dim() != 1 or not value.numel():
        return None
    extent = shape_of(source)[dim]
    numbers = [int(i) % extent for i in value.tolist()]
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        return None
    return source, dim, (numbers[0], len(numbers))


def sibling_pieces(inference: AxisInference, source: Node, dim: int) -> list[Piece]:
    """Every piece that the graph takes of this dimension of `source`, in order."""
    pieces = set()
    for user in source.users:
        if user.op != "call_function":
            continue
        name = op_name(user)
        if name == "slice" and user.args[0] is source:
            _, where, piece, step = slice_piece(user)
            if where == dim and step == 1 and piece[1] != shape_of(source)[dim]:
                pieces.add(piece)
        elif name == "index" and user.args[0] is source:
            found = index_piece(inference, user)
            if found is not None and found[1] == dim:
                pieces.add(found[2])
    return sorted(pieces)


def cut(inference: AxisInference, dim: Dim, piece: Piece, pieces: list[Piece], why: str) -> Dim:
    """One piece of a dimension. Equal pieces that tile it: [index, rest], where the index stays whole. Unequal ones:
    segments. Pieces that leave gaps or overlap: the axis stays whole."""
    offset = 0
    for start, length in pieces:
        if start != offset:
            break
        offset += length
    if offset != size_of(dim) or piece not in pieces:
        block(dim, f"cut in part at {why}")
        return inference.fresh([piece[1]], f"cut in part at {why}")[0]
    sizes = [length for _, length in pieces]
    if len(set(sizes)) == 1:
        parts = regroup([dim], [len(sizes), sizes[0]])
        if parts is None:
            block(dim, f"cut across factors at {why}")
            return inference.fresh([piece[1]], f"cut across factors at {why}")[0]
        block(parts[0], "index of equal pieces")
        return parts[1]
    whole = leaves(dim)
    if len(whole) == 1 and not whole[0].segments:
        whole[0].segments = [[Atom(size, whole[0].block)] if size > 1 else [] for size in sizes]
    if len(whole) == 1 and [size_of(s) for s in whole[0].segments or ()] == sizes:
        assert whole[0].segments is not None
        return whole[0].segments[pieces.index(piece)]
    block(dim, f"cut unequally at {why}")
    return inference.fresh([piece[1]], f"cut unequally at {why}")[0]


@rule("slice")
def slice_(inference: AxisInference, node: Node) -> Result:
    source, dim, piece, step = slice_piece(node)
    dims = list(inference.of(source))
    if step != 1:
        block(dims[dim], "cut with a step")
        dims[dim] = inference.fresh([piece[1]], "cut with a step")[0]
        return dims
    if piece[1] != shape_of(source)[dim]:
        dims[dim] = cut(inference, dims[dim], piece, sibling_pieces(inference, source, dim), node.name)
    return dims


@rule("narrow")
def narrow(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    where = number(node, 1, "dim") % len(dims)
    if shape_of(node)[where] != size_of(dims[where]):
        block(dims[where], "cut in part")
        dims[where] = inference.fresh([shape_of(node)[where]], "cut in part")[0]
    return dims


def split_pieces(node: Node) -> tuple[int, list[Piece]]:
    """The dimension that split, split_with_sizes or chunk cuts, and its pieces."""
    source = node.args[0]
    assert isinstance(source, Node)
    dim = number(node, 2, "dim", 0) % len(shape_of(source))
    pieces, start = [], 0
    for part in node.meta["val"]:
        pieces.append((start, int(part.shape[dim])))
        start += int(part.shape[dim])
    return dim, pieces


@rule("split")
def split(inference: AxisInference, node: Node) -> Result:
    dim, pieces = split_pieces(node)
    out = []
    for piece in pieces:
        dims = list(inference.of(node.args[0]))
        if len(pieces) > 1:
            dims[dim] = cut(inference, dims[dim], piece, pieces, node.name)
        out.append(dims)
    return tuple(out)


@rule("getitem")
def getitem(inference: AxisInference, node: Node) -> Result:
    parts = inference.dims[node.args[0]]  # type: ignore[index]
    if not isinstance(parts, tuple):
        raise NoRuleError("getitem")
    return parts[number(node, 1, "index")]


@rule("select")
def select(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    block(dims.pop(number(node, 1, "dim")), "one element is selected")
    return dims


@rule("unbind")
def unbind(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    block(dims.pop(number(node, 1, "dim", 0)), "unbound")
    return tuple(list(dims) for _ in node.meta["val"])


# ---------------------------------------------------------------------- joining


@rule("cat")
def cat(inference: AxisInference, node: Node) -> Result:
    tensors: list[Any] = [x for x in node.args[0] if shape_of(x) != [0]]  # type: ignore[union-attr,arg-type]
    rank = len(shape_of(node))
    where = number(node, 1, "dim", 0) % rank
    extents = [shape_of(x)[where] for x in tensors]
    out = list(inference.of(tensors[0]))
    for x in tensors[1:]:
        for k in range(rank):
            if k != where:
                unify(out[k], inference.of(x)[k], node.name)
    if len(tensors) == 1:
        return out
    joined = [inference.of(x)[where] for x in tensors]
    if len(set(extents)) == 1:
        for dim in joined[1:]:
            unify(joined[0], dim, node.name)
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
        for mine, its in zip(out, inference.of(x), strict=True):
            unify(mine, its, node.name)
    out.insert(where, [Atom(len(tensors), "index of a stack")])
    return out


@rule("slice_scatter")
def slice_scatter(inference: AxisInference, node: Node) -> Result:
    """A copy of the first tensor with a piece of one dimension overwritten: that dimension stays whole."""
    base, source = list(inference.of(node.args[0])), inference.of(node.args[1])
    where = number(node, 2, "dim", 0) % len(base)
    for k, (mine, its) in enumerate(zip(base, source, strict=True)):
        if k != where:
            unify(mine, its, node.name)
    if size_of(base[where]) == size_of(source[where]):
        unify(base[where], source[where], node.name)
    else:
        block(base[where], "overwritten in part")
        block(source[where], "overwritten in part")
    return base


@rule("select_scatter")
def select_scatter(inference: AxisInference, node: Node) -> Result:
    base, source = list(inference.of(node.args[0])), list(inference.of(node.args[1]))
    where = number(node, 2, "dim") % len(base)
    block(base[where], "overwritten in part")
    for mine, its in zip(base[:where] + base[where + 1 :], source, strict=True):
        unify(mine, its, node.name)
    return base


@rule("view_as_complex")
def view_as_complex(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    block(dims[-1], "real and imaginary part")
    return dims[:-1]


@rule("view_as_real")
def view_as_real(inference: AxisInference, node: Node) -> Result:
    return [*inference.of(node.args[0]), [Atom(2, "real and imaginary part")]]
