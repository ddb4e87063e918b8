"""Rules for operators that take pieces of a dimension: slices, splits, and indices that are runs of numbers."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from colrow.derive.axes import Atom, Dim, forbid, leaves, regroup, size_of
from colrow.derive.infer import AxisInference, NoRuleError, Result, argument, facts_of, number, op_name, rule, shape_of

Piece = tuple[int, int]
"""Start and length of a part of a dimension."""
PieceOfDim = tuple[int, int, int]
"""A piece, and the extent of the dimension that it is of."""


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
    while facts_of(index).identity:  # through casts and copies to the constant
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


def piece_of(inference: AxisInference, dim: Dim, piece: Piece, pieces: list[Piece], why: str) -> Dim:
    """The axes of one piece of a dimension. Equal pieces that tile it make it [index, rest], and the index is not
    sharded; unequal ones make it a concatenation. Where pieces leave gaps or overlap, the axis is forbidden."""
    offset = 0
    for start, length in pieces:
        if start != offset:
            break
        offset += length
    if offset != size_of(dim) or piece not in pieces:
        forbid(dim, inference.at(f"sliced in part at {why}"))
        return inference.fresh([piece[1]], f"sliced in part at {why}")[0]
    sizes = [length for _, length in pieces]
    if len(set(sizes)) == 1:
        parts = regroup([dim], [len(sizes), sizes[0]])
        if parts is None:
            forbid(dim, inference.at(f"split across factors at {why}"))
            return inference.fresh([piece[1]], f"split across factors at {why}")[0]
        # [pieces, rest]: each piece is split alike, inside; a shard of `pieces` would give one rank all of q
        forbid(parts[0], inference.at("it counts equal pieces"))
        return parts[1]
    atoms = leaves(dim)
    # The first slice of a fused dim turns it into a concatenation; later ones find their segment in it.
    if len(atoms) == 1 and not atoms[0].segments:
        atoms[0].segments = [[Atom(size, atoms[0].forbidden)] if size > 1 else [] for size in sizes]
    if len(atoms) == 1 and [size_of(s) for s in atoms[0].segments or ()] == sizes:
        assert atoms[0].segments is not None
        return atoms[0].segments[pieces.index(piece)]
    forbid(dim, inference.at(f"split unequally at {why}"))
    return inference.fresh([piece[1]], f"split unequally at {why}")[0]


def interleaved(inference: AxisInference, dim: Dim, piece: Piece, step: int) -> Dim:
    """Every `step`-th element of a dimension, as gate and up stand in one weight of gpt-oss: [index, step], where the
    position inside a step is not sharded. Other pieces with a step: the axis is forbidden."""
    start, length = piece
    parts = regroup([dim], [length, step]) if start < step and length * step == size_of(dim) else None
    if parts is None:
        forbid(dim, inference.at("sliced with a step"))
        return inference.fresh([length], "sliced with a step")[0]
    forbid(parts[1], inference.at("it counts interleaved pieces"))
    return parts[0]


@rule("slice")
def slice_(inference: AxisInference, node: Node) -> Result:
    source, dim, piece, step = slice_piece(node)
    dims = list(inference.of(source))
    if step != 1:
        dims[dim] = interleaved(inference, dims[dim], piece, step)
        return dims
    if piece[1] != shape_of(source)[dim]:
        dims[dim] = piece_of(inference, dims[dim], piece, sibling_pieces(inference, source, dim), inference.here)
    return dims


@rule("narrow")
def narrow(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    where = number(node, 1, "dim") % len(dims)
    if shape_of(node)[where] != size_of(dims[where]):
        forbid(dims[where], inference.at("sliced in part"))
        dims[where] = inference.fresh([shape_of(node)[where]], "sliced in part")[0]
    return dims


def split_pieces(node: Node) -> tuple[int, list[Piece]]:
    """The dimension that split, split_with_sizes or chunk takes apart, and its pieces."""
    source = node.args[0]
    assert isinstance(source, Node)
    dim = number(node, 2, "dim", 0) % len(shape_of(source))
    pieces, start = [], 0
    for part in node.meta["val"]:
        pieces.append((start, int(part.shape[dim])))
        start += int(part.shape[dim])
    return dim, pieces


@rule("glu")
def glu(inference: AxisInference, node: Node) -> Result:
    """The first half of a dimension times a sigmoid of the second."""
    dims = list(inference.of(node.args[0]))
    where = number(node, 1, "dim", -1) % len(dims)
    half = size_of(dims[where]) // 2
    dims[where] = piece_of(inference, dims[where], (0, half), [(0, half), (half, half)], inference.here)
    return dims


@rule("unfold")
def unfold(inference: AxisInference, node: Node) -> Result:
    """Windows along a dimension, which stand last."""
    dims, shape = list(inference.of(node.args[0])), shape_of(node)
    where = number(node, 1, "dimension") % len(dims)
    forbid(dims[where], inference.at("windows are taken of it"))
    dims[where], window = inference.fresh([shape[where], shape[-1]], "windows are taken of it")
    return [*dims, window]


@rule("split")
def split(inference: AxisInference, node: Node) -> Result:
    dim, pieces = split_pieces(node)
    out = []
    for piece in pieces:
        dims = list(inference.of(node.args[0]))
        if len(pieces) > 1:
            dims[dim] = piece_of(inference, dims[dim], piece, pieces, inference.here)
        out.append(dims)
    return tuple(out)
