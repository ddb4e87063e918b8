"""Rules for operators that run along some dims, or none, and treat every index of the other dims alone (`Runs` in
`operators`): a reduction, a sort, a softmax, a pooling of the last dims, a norm of channels, a function of elements.

DTensor lacks rules for many of them, the more the older it is, and says of `logsumexp` that keeps its dim that another
dim is sharded. A rule's docstring says which shards of the arguments give shards of the results.
"""

from __future__ import annotations

import re
from itertools import accumulate

from colrow.sharding.local_call import LocalCall, UnprovenError
from colrow.sharding.local_layout import PARTIAL, REPLICATED, Kind, Layout, sharded

_NAMES = ("dim", "dims", "dimension")


def along(call: LocalCall) -> list[Layout] | None:
    """Where the shards are of a dim along which it does not run."""
    layout = _common(call)
    ndim = len(call.tensors[0][1].shape)
    name = next((a.name for a in call.func._schema.arguments if a.name in _NAMES), None)
    if layout is None or name is None or (call.differing and not _differs_in_extent_alone(call, layout)):
        return None
    given = call.argument(name)[0]
    if given == [] and not call.facts.moves:  # DTensor, and some operators on fake tensors, take it for none
        raise UnprovenError(f"{call.name} over an empty list of dims, which means all", layout.dim)
    if given is None or given == []:
        return None
    counted = len(call.results[0]) if call.name == "unfold_backward" else ndim
    dims = {d % counted for d in ([given] if isinstance(given, int) else given)}
    if layout.dim not in dims:
        return _shards(call, layout, ndim, dims)
    # DTensor calls some partial sums (`any` and `all`; in torch 2.11 `logsumexp`), and of those whose rule is `along`
    # it takes -1 for another dim than the last
    if call.facts.rule == "along" or (call.facts.rule == "reduce" and "norm" not in call.name):
        raise UnprovenError(f"{call.name} over a sharded dim", layout.dim)
    return None


def windows(call: LocalCall) -> list[Layout] | None:
    """Where the shards are of samples or channels; or of a length in which no window reaches into another shard."""
    layout, there = call.tensors[0]
    spatial, ndim = re.search(r"([123])d", call.name), len(there.shape)
    assert spatial is not None
    if layout.kind is not Kind.SHARDED or any(other != layout for other, _ in call.tensors):
        return None
    if layout.dim >= ndim - int(spatial[1]):
        return _windows_inside(call, layout, ndim)
    if call.differing and not _differs_in_extent_alone(call, layout):
        return None
    return [layout] * len(call.results)


def matrices(call: LocalCall) -> list[Layout] | None:
    """Where the shards are of the dims in front of the matrices."""
    layout = _common(call)
    ndim = len(call.tensors[0][1].shape)
    if layout is None or layout.dim >= ndim - 2 or call.differing:
        return None
    return [layout] * len(call.results) if all(len(shape) > layout.dim for shape in call.results) else None


def elementwise(call: LocalCall) -> list[Layout] | None:
    """Shards of the same dim give shards of it; an operand may be stretched along it (broadcast) from one element."""
    ndim = max(len(there.shape) for _, there in call.tensors)
    found: set[tuple[int, int, tuple[int, ...]]] = set()
    for layout, there in call.tensors:
        if layout.kind is Kind.SHARDED:
            # from the last dim, as broadcasting aligns operands
            found.add((layout.dim - len(there.shape), there.shape[layout.dim], layout.segments))
        elif layout != REPLICATED:
            return None
    if len(found) != 1 or call.differing:
        return None
    ((dim, _, segments),) = found
    beside = [there.shape for layout, there in call.tensors if layout == REPLICATED]
    if any(len(shape) >= -dim and shape[dim] != 1 for shape in beside):
        return None
    return [sharded(dim + ndim, segments) if len(shape) == ndim else REPLICATED for shape in call.results]


def _common(call: LocalCall) -> Layout | None:
    """The layout of the first tensor, where all others have it too, with as many elements along the sharded dim; an
    index or a number may be replicated."""
    (layout, first), *others = call.tensors
    if layout.kind is not Kind.SHARDED:
        return None
    for other, there in others:
        is_index = other == REPLICATED and len(there.shape) <= 1
        if not is_index and (other != layout or there.shape[layout.dim] != first.shape[layout.dim]):
            return None
        if not is_index and len(there.shape) != len(first.shape):
            return None
    return layout


def _shards(call: LocalCall, layout: Layout, ndim: int, dims: set[int]) -> list[Layout] | None:
    """The shards' dim in each result, which may lack the dims that were reduced."""
    extent, found = _local_extent(call), []
    for i, shape in enumerate(call.results):
        missing = ndim - len(shape)
        if missing not in (len(dims), *range(-1, 1)):
            return None
        dim = layout.dim - (sum(d < layout.dim for d in dims) if missing > 0 else 0)
        if shape[dim] != extent or (call.wanted is not None and call.wanted[i][dim] != extent * call.ranks):
            return None
        found.append(sharded(dim, layout.segments))
    return found


def _local_extent(call: LocalCall) -> int:
    position = next(i for i, layout in enumerate(call.layouts) if layout is not None)
    layout = call.layouts[position]
    assert layout is not None
    return int(call.here[position].shape[layout.dim])


def _windows_inside(call: LocalCall, layout: Layout, ndim: int) -> list[Layout] | None:
    """Average pooling whose windows neither overlap nor reach over the end of a shard."""
    if not call.name.startswith("avg_pool") or layout.segments or call.differing:
        return None
    kernel, stride, padding = (call.argument(name)[0] for name in ("kernel_size", "stride", "padding"))
    i = layout.dim - ndim
    size, step, edge = (_at(sizes, i) for sizes in (kernel, stride or kernel, padding))
    x = call.here[call.name.endswith("_backward")]
    return [layout] * len(call.results) if size == step and edge == 0 and x.shape[layout.dim] % size == 0 else None


def _at(sizes: int | list[int], i: int) -> int:
    return sizes if isinstance(sizes, int) else sizes[i if len(sizes) > 1 else 0]


def _differs_in_extent_alone(call: LocalCall, layout: Layout) -> bool:
    """Whether all that differs is the extent of the sharded dim, in the shape of what the gradient is of."""
    name = next((a.name for a in call.func._schema.arguments if a.name in ("input_size", "input_sizes")), None)
    if name is None or len(call.differing) != 1:
        return False
    here, there = call.argument(name)
    changed = [d for d, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
    return changed == [layout.dim] and here[layout.dim] * call.ranks == there[layout.dim]


# -- norms of channels


def batch_norm(call: LocalCall) -> list[Layout] | None:
    """Shards of channels, each of which has its own statistics; in eval mode, which is an affine function of each
    channel, shards of samples or positions too."""
    backward = call.name == "native_batch_norm_backward"
    training = call.argument("train" if backward else "training")[0]
    layouts = [layout for layout, _ in call.tensors]
    x, others = layouts[backward], layouts[1 + backward :]
    if layouts[0] != x or x.kind is not Kind.SHARDED:
        return None
    if x.dim == 1:  # all statistics and weights of a channel lie on the rank that has it
        of_channels = sharded(0, x.segments)
        lengths = [there.shape for _, there in call.tensors[1 + backward :]]
        if any(layout != of_channels for layout, shape in zip(others, lengths, strict=True) if shape != (0,)):
            return None
        return needed(call, [x, of_channels, of_channels])
    # in training, statistics of a rank's samples alone are not those of the batch
    if training or any(layout != REPLICATED for layout in others):
        return None
    return needed(call, [x, PARTIAL, PARTIAL]) if backward else [x, REPLICATED, REPLICATED]


def group_norm(call: LocalCall) -> list[Layout] | None:
    """Shards of samples, or of complete groups of channels."""
    backward = call.name.endswith("_backward")
    numbers = {name: call.argument(name) for name in ("N", "C", "HxW", "group")}
    layouts = [layout for layout, _ in call.tensors]
    statistics = 4 if backward else 1  # gradient, input, mean, rstd; then weights
    x, weights = layouts[0], layouts[statistics:]
    whole_groups = x == sharded(1)
    if x.kind is not Kind.SHARDED or x.repeated or not (x.dim == 0 or whole_groups):
        return None
    if any(layout != x for layout in layouts[1:statistics]):
        return None
    # The call's own counts must be a rank's: with those of all channels it would read past its shard.
    fewer = ("C", "group") if whole_groups else ("N",)
    if any(layout != (sharded(0) if whole_groups else REPLICATED) for layout in weights):
        return None
    if any(here * (call.ranks if name in fewer else 1) != there for name, (here, there) in numbers.items()):
        return None
    # The weights' gradients sum over samples: each rank's is a term where samples are split.
    of_weights = sharded(0) if whole_groups else PARTIAL
    return needed(call, [x, of_weights, of_weights]) if backward else [x, x, x]


def needed(call: LocalCall, layouts: list[Layout]) -> list[Layout]:
    """The layouts of those gradients of a backward that its `output_mask` requests."""
    if not call.name.endswith("_backward"):
        return layouts
    mask = call.argument("output_mask")[0]
    return [layout for layout, is_needed in zip(layouts, mask, strict=True) if is_needed]


# -- more


def glu(call: LocalCall) -> list[Layout] | None:
    """Shards of the dim that holds gate and values, where each half is sharded alike; or of another dim."""
    backward = call.name == "glu_backward"
    layout, there = call.tensors[backward]
    half = len(layout.segments) // 2
    first = layout.segments[:half]
    of_half = sharded(layout.dim, first)
    if layout.dim != call.argument("dim")[0] % len(there.shape) or layout.repeated:
        return along(call)
    if not first or first != layout.segments[half:] or (backward and call.tensors[0][0] != of_half):
        return None
    return [layout if backward else of_half]


def roll(call: LocalCall) -> list[Layout] | None:
    """Along the sharded dim: by complete segments, so that a rank's roll by its shards of them gives their shards."""
    layout, there = call.tensors[0]
    dims = [d % len(there.shape) for d in call.argument("dims")[0]]
    if layout.kind is not Kind.SHARDED or dims.count(layout.dim) != 1:
        return along(call)
    i, extent = dims.index(layout.dim), there.shape[layout.dim]
    here, wanted = call.argument("shifts")
    shift, bounds = wanted[i] % extent, [0, *accumulate(layout.sizes(extent))]
    others_differ = any(a != b for k, (a, b) in enumerate(zip(here, wanted, strict=True)) if k != i)
    if others_differ or layout.repeated or extent - shift not in bounds or here[i] * call.ranks % extent != shift:
        raise UnprovenError("elements move from one rank's shard to another's", layout.dim)
    cut = bounds.index(extent - shift)
    return [sharded(layout.dim, (*layout.segments[cut:], *layout.segments[:cut]))]


def unfold(call: LocalCall) -> list[Layout] | None:
    """Along the sharded dim: windows side by side that end with each segment."""
    layout, there = call.tensors[0]
    backward = call.name == "unfold_backward"
    dim = call.argument("dim" if backward else "dimension")[0] % (len(there.shape) - backward)
    if layout.kind is not Kind.SHARDED or layout.dim != dim:
        return along(call)
    size, step = call.argument("size")[0], call.argument("step")[0]
    sizes = [n * (size if backward else 1) for n in layout.sizes(there.shape[dim])]
    if size != step or layout.repeated or any(n % (size * call.ranks) for n in sizes):
        raise UnprovenError("a window reaches from one rank's shard into another's", dim)
    if backward and call.argument("input_sizes")[1][dim] != sum(sizes):
        return None
    return [sharded(dim, tuple(sizes if backward else (n // size for n in sizes)))]


def renorm(call: LocalCall) -> list[Layout] | None:
    """Every slice along its dim is scaled by its own norm."""
    layout, there = call.tensors[0]
    return (
        [layout] if layout.kind is Kind.SHARDED and layout.dim == call.argument("dim")[0] % len(there.shape) else None
    )


def weight_norm(call: LocalCall) -> list[Layout] | None:
    """v g / |v|: every slice along its dim has a norm of its own. Backward takes the norms, and gives v's and g's."""
    layout, there = call.tensors[0]
    alike = all(other == layout for other, _ in call.tensors)
    if not alike or layout.kind is not Kind.SHARDED or layout.dim != call.argument("dim")[0] % len(there.shape):
        return None
    return [layout] * len(call.results)


def pad(call: LocalCall) -> list[Layout] | None:
    """Along other dims than the sharded one, with one number or (of a gradient) without some elements."""
    layout, there = call.tensors[0]
    amounts = call.argument("pad")[0]  # of the last dim's two ends, then of the one before
    padded = {len(there.shape) - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    return [layout] if layout.kind is Kind.SHARDED and layout.dim not in padded and not call.differing else None


def stack(call: LocalCall) -> list[Layout] | None:
    """Shards of one dim, put beside each other along a new one."""
    layout, first = call.tensors[0]
    if layout.kind is not Kind.SHARDED or call.differing or any(other != layout for other, _ in call.tensors):
        return None
    behind = call.argument("dim")[0] % (len(first.shape) + 1) <= layout.dim
    return [sharded(layout.dim + behind, layout.segments)]


def write_piece(call: LocalCall) -> list[Layout] | None:
    """`slice_scatter` and `select_scatter`: the same piece of another dim than the sharded one."""
    (layout, base), (of_piece, piece) = call.tensors
    dim = call.argument("dim")[0] % len(base.shape)
    if layout.kind is not Kind.SHARDED or layout.dim == dim or call.differing:
        return None
    missing = len(piece.shape) < len(base.shape) and dim < layout.dim
    return [layout] if of_piece == sharded(layout.dim - missing, layout.segments) else None


def searchsorted(call: LocalCall) -> list[Layout] | None:
    """Rows are searched one by one; or one row that all ranks have, for each value."""
    (sequence, rows), *values = call.tensors
    if sequence == REPLICATED and len(rows.shape) == 1 and len(values) == 1 and not call.differing:
        return [values[0][0]] if values[0][0].kind is Kind.SHARDED else None
    layout = _common(call)
    if layout is None or layout.dim == len(rows.shape) - 1 or call.differing:
        return None
    return _shards(call, layout, len(rows.shape), set()) if values else None


def bucketize(call: LocalCall) -> list[Layout] | None:
    """Element by element, with the same boundaries on all ranks."""
    (layout, _), *boundaries = call.tensors
    return [layout] if layout.kind is Kind.SHARDED and all(b == REPLICATED for b, _ in boundaries) else None


def same_view(call: LocalCall) -> list[Layout] | None:
    """`as_strided_` of all elements, where it changes strides of dims of one element alone."""
    here = call.here[0]
    size, stride = call.argument("size")[0], call.argument("stride")[0]
    is_same = tuple(size) == here.shape and all(
        n == 1 or a == b for n, a, b in zip(here.shape, here.stride, stride, strict=True)
    )
    if not is_same:
        raise UnprovenError("another window on the memory of a shard", call.sharded_dim)
    return [call.tensors[0][0]]
