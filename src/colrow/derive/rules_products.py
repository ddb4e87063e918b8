"""Rules for operators that contract: products of matrices, attention, grouped products, lookups."""

from __future__ import annotations

from torch.fx import Node

from colrow.derive.axes import Dim, forbid, leaves, regroup, unify, unify_dims
from colrow.derive.infer import (
    AxisInference,
    Dims,
    NoRuleError,
    Result,
    argument,
    is_float,
    number,
    op_name,
    rule,
    shape_of,
)
from colrow.derive.rules_pieces import index_piece, piece_of, sibling_pieces
from colrow.derive.rules_pointwise import broadcast, elementwise


def weighted(inference: AxisInference, node: Node, dim: Dim, *operands: object) -> None:
    """A contraction with a parameter may be sharded; one of two activations (head_dim of q k^T) may not: the partial
    sums would have to be reduced before the softmax."""
    inference.contract(node, dim)
    if not any(inference.is_weight(operand) for operand in operands):
        forbid(dim, inference.at("summed over by a product of two activations"))


def forbid_own(inference: AxisInference, dims: list[Dim]) -> None:
    """Of a product of two activations only the batch axes are sharded, not those that one of them has alone. But heads
    beside tokens are as a batch is: those of queries that share one head of keys, [heads, T, D] times [S, D]."""
    atoms = [atom for dim in dims for atom in leaves(dim)]
    beside_tokens = any((atom.forbidden or "").startswith("input ") for atom in atoms)
    for atom in atoms if len(atoms) == 1 or not beside_tokens else ():
        forbid([atom], inference.at("only the batch axes of a product of two activations are sharded"))


@rule("linear")
def linear(inference: AxisInference, node: Node) -> Result:
    x, w = inference.of(node.args[0]), inference.of(node.args[1])
    unify(x[-1], w[-1], inference.here)
    weighted(inference, node, w[-1], node.args[0], node.args[1])
    if len(w) == 1:
        return x[:-1]
    bias = argument(node, 2, "bias")
    if bias is not None:
        unify(inference.of(bias)[0], w[0], inference.here)
    return [*x[:-1], w[0]]


def _product(inference: AxisInference, node: Node, a: Node, b: Node) -> Dims:
    x, y = inference.of(a), inference.of(b)
    if len(x) < 2 or len(y) < 2:
        raise NoRuleError("product with a vector")
    # [..., M, K] times [..., K, N]
    unify(x[-1], y[-2], inference.here)
    weighted(inference, node, x[-1], a, b)
    # a product of a matrix and a vector has no scores: a state-space model's channels times what each state gives
    are_matrices = bool(leaves(x[-2]) and leaves(y[-1]))
    if are_matrices and not inference.is_weight(a) and not inference.is_weight(b):
        forbid_own(inference, [x[-2]])
        forbid_own(inference, [y[-1]])
    batch = shape_of(node)[:-2]
    lead = broadcast(inference, batch, [(x[:-2], shape_of(a)[:-2]), (y[:-2], shape_of(b)[:-2])], inference.here)
    return [*lead, x[-2], y[-1]]


@rule("tensordot")
def tensordot(inference: AxisInference, node: Node) -> Result:
    """Contracts dims of the first operand with as many of the second; the others of both follow each other."""
    a, b = node.args[:2]
    x, y = inference.of(a), inference.of(b)
    contracted: list[list[int]] = [node.args[2], node.args[3]]  # type: ignore[list-item]
    summed = [[i % len(dims) for i in given] for dims, given in zip((x, y), contracted, strict=True)]
    for i, j in zip(*summed, strict=True):
        unify(x[i], y[j], inference.here)
        weighted(inference, node, x[i], a, b)
    own = [[dim for k, dim in enumerate(dims) if k not in gone] for dims, gone in zip((x, y), summed, strict=True)]
    if not inference.is_weight(a) and not inference.is_weight(b):
        for dims in own:
            forbid_own(inference, dims)
    return [*own[0], *own[1]]


@rule("bilinear")
def bilinear(inference: AxisInference, node: Node) -> Result:
    """x [..., I] and y [..., J] with a matrix of w [O, I, J] for each output. It sums over both, and a rank's sum over
    a shard of one of them is partial."""
    x, y, w = (inference.of(given) for given in node.args[:3])
    for dims, own in ((x, w[1]), (y, w[2])):
        unify(dims[-1], own, inference.here)
        inference.contract(node, own)
    unify_dims(x[:-1], y[:-1], inference.here)
    bias = argument(node, 3, "bias")
    if isinstance(bias, Node):
        unify(inference.of(bias)[0], w[0], inference.here)
    return [*x[:-1], w[0]]


@rule("matmul")
def matmul(inference: AxisInference, node: Node) -> Result:
    a, b = node.args[:2]
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    return _product(inference, node, a, b)


@rule("addmm")
def addmm(inference: AxisInference, node: Node) -> Result:
    """bias + a b; the bias is broadcast to the product."""
    bias, a, b = node.args[:3]
    assert isinstance(bias, Node)
    assert isinstance(a, Node)
    assert isinstance(b, Node)
    out = _product(inference, node, a, b)
    shape = shape_of(node)
    return broadcast(inference, shape, [(out, shape), (inference.of(bias), shape_of(bias))], inference.here)


@rule("grouped_mm")
def grouped_mm(inference: AxisInference, node: Node) -> Result:
    """Rows of x [N, K], sorted by expert, times the experts' matrices w [E, K, M]; offsets [E] bound the groups."""
    x, w, offsets = node.args[0], node.args[1], argument(node, 2, "offs")
    dx, dw = inference.of(x), inference.of(w)
    if len(dx) != 2 or len(dw) != 3:
        raise NoRuleError("grouped product of other ranks")
    unify(dx[1], dw[1], inference.here)
    weighted(inference, node, dw[1], x, w)
    forbid(dw[0], inference.at("expert axis: expert parallelism is not a part of tensor parallelism"))
    forbid(dx[0], inference.at("rows sorted by expert"))
    if isinstance(offsets, Node):
        forbid(inference.of(offsets)[0], inference.at("offsets of the experts"))
    return [dx[0], dw[2]]


@rule("attention")
def attention(inference: AxisInference, node: Node) -> Result:
    """q [..., Hq, T, D], k [..., Hk, S, D], v [..., Hk, S, Dv]; query heads are [kv heads, group]. Of other dims in
    front (the batch, windows) each index has an attention of its own, as each head has."""
    query, key, value = node.args[:3]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    q, k, v = inference.of(query), inference.of(key), inference.of(value)
    if not 3 <= len(q) == len(k) == len(v):
        raise NoRuleError("attention without a head dimension")
    # Sharded are batch and heads. Tokens meet in the softmax; head_dim in the scores, before the softmax.
    unify(k[-3], v[-3], inference.here)
    for i in range(len(q) - 3):
        if shape_of(key)[i] != 1 and shape_of(query)[i] != 1:
            unify(q[i], k[i], inference.here)
        unify(k[i], v[i], inference.here)
    query_heads, kv_heads = shape_of(query)[-3], shape_of(key)[-3]
    if query_heads == kv_heads:
        unify(q[-3], k[-3], inference.here)
    elif kv_heads > 1:
        # query head h reads kv head h // group: the kv heads are the major factor
        parts = regroup([q[-3]], [kv_heads, query_heads // kv_heads])
        if parts is None:
            raise NoRuleError("query heads that are no multiple of the key heads")
        unify(parts[0], k[-3], inference.here)
    unify(q[-1], k[-1], inference.here)
    forbid(q[-1], inference.at("summed over by a product of two activations"))
    unify(k[-2], v[-2], inference.here)
    forbid(v[-1], inference.at("head_dim of the values: splitting it would leave the scores unsharded"))
    forbid(k[-2], inference.at("softmax runs along it"))
    forbid(q[-2], inference.at("sequence axis under a causal mask"))
    mask = argument(node, 3, "attn_mask")
    if isinstance(mask, Node):
        extents, dims = shape_of(mask), inference.of(mask)
        # from the last dim, as broadcasting does: a mask may lack leading dims
        for j, dim in zip(range(1, len(extents) + 1), [k[-2], *reversed(q[:-1])], strict=False):
            if extents[-j] != 1:
                unify(dims[-j], dim, inference.here)
    return [*q[:-1], v[-1]]


# ---------------------------------------------------------------------- lookups


@rule("embedding")
def embedding(inference: AxisInference, node: Node) -> Result:
    """Rows of w [V, D]. Sharded by row, a rank gives zero for the ids that it does not hold: a partial sum."""
    w, ids = inference.of(node.args[0]), inference.of(node.args[1])
    inference.contract(node, w[0])
    return [*ids, w[1]]


@rule("embedding_bag")
def embedding_bag(inference: AxisInference, node: Node) -> Result:
    """Rows of w [V, D], summed, averaged or maximised over the bags [B, D]: each feature by itself."""
    w, value = inference.of(node.args[0]), node.meta["val"]
    forbid(w[0], inference.at("rows are reduced over a bag"))
    for given in node.all_input_nodes[1:]:
        for dim in inference.of(given):
            forbid(dim, inference.at("bags are reduced along it"))
    shapes = [[int(n) for n in v.shape] for v in value]
    out = [*inference.fresh(shapes[0][:1], "bags are counted along it"), w[1]]
    return tuple(out if shape == shapes[0] else inference.fresh(shape) for shape in shapes)


@rule("index")
def index(inference: AxisInference, node: Node) -> Result:
    """x[i]: dimensions that are indexed must not be sharded, unless the index is a known piece of a tiled axis."""
    source, indices = node.args[0], node.args[1]
    assert isinstance(source, Node)
    assert isinstance(indices, (list, tuple))
    dims = list(inference.of(source))
    piece = index_piece(inference, node)
    if piece is not None:
        _, where, part = piece
        dims[where] = piece_of(inference, dims[where], part, sibling_pieces(inference, source, where), inference.here)
        return dims
    # x[:, i, j]: what is picked takes the place of the indexed dims, which stand beside each other
    given = [i for i, x in enumerate(indices) if x is not None]
    if not given or given != list(range(given[0], given[-1] + 1)):
        # torch moves what is picked to the front then
        raise NoRuleError("index with gaps")
    for i in given:
        forbid(dims[i], inference.at("indexed"))
    tensors = [x for x in indices if isinstance(x, Node)]
    if len(tensors) != len(given) or any(x.meta["val"].dtype.itemsize == 1 or is_float(x) for x in tensors):
        raise NoRuleError("index with a mask")
    rank = max(len(shape_of(x)) for x in tensors)
    shape = shape_of(node)[given[0] : given[0] + rank]
    picked = broadcast(inference, shape, [(inference.of(x), shape_of(x)) for x in tensors], inference.here)
    return [*dims[: given[0]], *picked, *dims[given[-1] + 1 :]]


@rule("index_select")
def index_select(inference: AxisInference, node: Node) -> Result:
    dims, where = list(inference.of(node.args[0])), number(node, 1, "dim")
    forbid(dims[where], inference.at("indexed"))
    dims[where] = inference.of(argument(node, 2, "index"))[0]
    return dims


@rule("index_put")
def index_put(inference: AxisInference, node: Node) -> Result:
    """base[i] = values, or +=, for indices into the first dimensions."""
    base, indices, values = inference.of(node.args[0]), node.args[1], inference.of(node.args[2])
    assert isinstance(indices, (list, tuple))
    if any(x is None for x in indices):
        raise NoRuleError("index_put with gaps")
    for dim in base[: len(indices)]:
        forbid(dim, inference.at("written at an index"))
    for dim in values[: len(values) - (len(base) - len(indices))]:
        forbid(dim, inference.at("written at an index"))
    for k in range(1, len(base) - len(indices) + 1):
        if leaves(values[-k]):
            unify(base[-k], values[-k], inference.here)
    return base


@rule("index_add")
def index_add(inference: AxisInference, node: Node) -> Result:
    base, source = inference.of(node.args[0]), inference.of(node.args[3])
    unify_dims(
        base,
        source,
        inference.here,
        number(node, 1, "dim") % len(base),
        inference.at("written at an index"),
    )
    return base


def _aligned_by_index(inference: AxisInference, node: Node, other: Node, why: str) -> None:
    """The first operand and one that an index along `dim` goes through beside it: the other dimensions are alike where
    they are equally long."""
    base = node.args[0]
    assert isinstance(base, Node)
    dims = inference.of(base)
    where = number(node, 1, "dim") % len(dims)
    for k, (mine, its) in enumerate(zip(dims, inference.of(other), strict=True)):
        apart = k == where or shape_of(base)[k] != shape_of(other)[k]
        unify_dims([mine], [its], inference.here, 0 if apart else None, why)


@rule("gather")
def gather(inference: AxisInference, node: Node) -> Result:
    picked = node.args[2]
    assert isinstance(picked, Node)
    _aligned_by_index(inference, node, picked, "indexed")
    return list(inference.of(picked))


@rule("take_along_dim")
def take_along_dim(inference: AxisInference, node: Node) -> Result:
    """As gather; the other dimensions of tensor and index are broadcast."""
    source, picked, where = node.args[0], node.args[1], argument(node, 2, "dim")
    assert isinstance(source, Node)
    assert isinstance(picked, Node)
    if not isinstance(where, int):
        raise NoRuleError("take_along_dim of all elements")
    x, index = list(inference.of(source)), list(inference.of(picked))
    extents = shape_of(source)
    forbid(x[where], inference.at("indexed"))
    forbid(index[where], inference.at("indexed"))
    x[where], extents[where] = [], 1
    return broadcast(inference, shape_of(node), [(index, shape_of(picked)), (x, extents)], inference.here)


@rule("index_fill")
def index_fill(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    forbid(dims[number(node, 1, "dim")], inference.at("written at an index"))
    return dims


@rule("scatter")
def scatter(inference: AxisInference, node: Node) -> Result:
    """Index and, but for a single number, values."""
    for other in (a for a in node.args[2:4] if isinstance(a, Node)):
        _aligned_by_index(inference, node, other, "written at an index")
    return inference.of(node.args[0])


@rule("sort")
def order(inference: AxisInference, node: Node) -> Result:
    dims = list(inference.of(node.args[0]))
    position = 2 if op_name(node) == "topk" else 1
    where = number(node, position, "dim", -1)
    forbid(dims[where], inference.at("sorted"))
    dims[where] = inference.fresh([int(node.meta["val"][0].shape[where])], "sorted")[0]
    return tuple(list(dims) for _ in node.meta["val"])


@rule("argsort")
def argsort(inference: AxisInference, node: Node) -> Result:
    dims = inference.of(node.args[0])
    given = [a for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, int) and not isinstance(a, bool)]
    forbid(dims[given[0] if given else -1], inference.at("sorted"))
    return dims


@rule("max")
def max_along(inference: AxisInference, node: Node) -> Result:
    """With a dimension: values and indices; with another tensor: element-wise; alone: over everything."""
    dims = list(inference.of(node.args[0]))
    where = argument(node, 1, "dim")
    if where is None:
        for dim in dims:
            forbid(dim, inference.at("reduced"))
        return []
    if isinstance(where, Node):
        return elementwise(inference, node)
    if not isinstance(where, int):
        raise NoRuleError("max over several dimensions")
    forbid(dims[where], inference.at("reduced"))
    if argument(node, 2, "keepdim", False):
        dims[where] = []
    else:
        dims.pop(where)
    return tuple(list(dims) for _ in node.meta["val"])


@rule("one_hot")
def one_hot(inference: AxisInference, node: Node) -> Result:
    return [*inference.of(node.args[0]), *inference.fresh(shape_of(node)[-1:], "classes are counted along it")]


@rule("count")
def count(inference: AxisInference, node: Node) -> Result:
    for dim in inference.of(node.args[0]):
        forbid(dim, inference.at("counted"))
    return inference.fresh(shape_of(node), "counted")
