"""Rules for operators on shards where DTensor's propagation lacks one or is stricter than local arithmetic needs.

Each is named by its operator in `RULES`, takes a call, and gives the layouts of the results, or None where DTensor's
rules decide; it raises UnprovenError where the call gives no shards of the result. A rule's docstring says which shards
of the arguments give shards of the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate, pairwise
from math import prod

import torch

from colrow.sharding.local_call import LocalCall, Shape, UnprovenError
from colrow.sharding.local_layout import PARTIAL, REPLICATED, Kind, Layout, sharded
from colrow.sharding.operators import OPERATORS, Runs
from colrow.sharding.rules_along import (
    along,
    batch_norm,
    bucketize,
    elementwise,
    glu,
    group_norm,
    matrices,
    needed,
    pad,
    renorm,
    roll,
    same_view,
    searchsorted,
    stack,
    unfold,
    weight_norm,
    windows,
    write_piece,
)


def _segments_between(layout: Layout, extent: int, here: tuple[int, int], there: tuple[int, int], ranks: int) -> Layout:
    """Layout of the rows `there` of a sharded dim, which must be the rows `here` of the local one: segments."""
    sizes = layout.sizes(extent)
    bounds = [0, *accumulate(sizes)]
    inside = there[0] in bounds and there[1] in bounds and here[0] < here[1]
    if inside and here == (there[0] // ranks, there[1] // ranks):
        return sharded(layout.dim, sizes[bounds.index(there[0]) : bounds.index(there[1])])
    raise UnprovenError(
        f"elements {here[0]} to {here[1]} of a shard are no shard of elements {there[0]} to {there[1]}", layout.dim
    )


def _slice(call: LocalCall) -> list[Layout] | None:
    """Along the sharded dim: segments, or every step-th element of all."""
    backward, layout = call.name == "slice_backward", call.tensors[0][0]
    sizes = call.argument("input_sizes") if backward else (call.here[0].shape, call.there[0].shape)
    dim = call.argument("dim")[0] % len(sizes[0])
    if layout.dim != dim:
        return None
    source = layout  # of what is sliced; backward has the slice's gradient, and the layout that forward saw
    if backward and call.forward is None:
        source = sharded(dim)
    elif backward and call.forward is not None and call.forward.dim == dim:
        source = call.forward
    # x[::k] of a shard is a shard of X[::k] where k divides its length; a range must be one of the segments
    local, extent = sizes[0][dim], sizes[1][dim]
    (first, end, step), (first_there, end_there, step_there) = call.slices(local, extent)
    segments = source.sizes(extent)
    if step != step_there:
        raise UnprovenError("a slice with another step than in the unsharded model", dim)
    if (first, end, end_there) == (first_there, local, extent) and first < step:
        if any(n // call.ranks % step for n in segments):
            raise UnprovenError(f"every {step}-th element of a shard whose length {step} does not divide", dim)
        cut = sharded(dim, tuple(n // step for n in segments))
    elif step == 1:
        cut = _segments_between(source, extent, (first, end), (first_there, end_there), call.ranks)
    else:
        raise UnprovenError("a piece of a sharded dim with a step", dim)
    if backward and cut != layout:
        raise UnprovenError("the gradient of a slice has another layout than the slice", dim)
    return [source if backward else cut]


def _view(call: LocalCall) -> list[Layout] | None:
    """DTensor knows only equal segments, and not all views of them; in torch 2.11 few of a dim that is sharded as one.

    The dims of `before` that become some dims of `after` are one run of elements. In it the segments follow one another
    (once for each index of the dims that stand before the sharded one), and they must do so in the result."""
    layout, source = call.tensors[0]
    before, local = source.shape, call.results[0]
    after = call.wanted[0] if call.wanted else _sizes(call, before)
    if layout.kind is not Kind.SHARDED or after is None or len(after) != len(local):
        return None
    # The result may be sharded along one dim alone, which is then tp times shorter here; all others are as unsharded.
    changed = [d for d, (n, full) in enumerate(zip(local, after, strict=True)) if n * call.ranks == full != n]
    same = sum(n == full for n, full in zip(local, after, strict=True))
    for dim in changed if same == len(after) - 1 else ():
        for merged, result in same_elements(before, after):
            if layout.dim in merged and dim in result:
                # In the run: `outer` repeats of the segments, each of `inner` contiguous elements an index.
                outer = prod(before[d] for d in merged if d < layout.dim)
                inner = prod(before[d] for d in merged if d > layout.dim)
                runs = [n * inner for n in layout.sizes(before[layout.dim])] * outer
                times = prod(after[d] for d in result if d < dim)
                unit = prod(after[d] for d in result if d > dim)
                # of the result's dim: as many runs as one index of the dims before it holds
                own = runs[: len(runs) // times]
                if own * times == runs and not any(n % (unit * call.ranks) for n in own):
                    return [sharded(dim, tuple(n // unit for n in own))]
    return None


def _repeat(call: LocalCall) -> list[Layout] | None:
    """Along the sharded dim: the same segments, so many times."""
    layout, source = call.tensors[0]
    times = call.argument("repeats")[1]
    if layout.kind is not Kind.SHARDED or call.differing:
        return None
    dim = layout.dim + len(times) - len(source.shape)
    return [sharded(dim, layout.sizes(source.shape[layout.dim]) * times[dim])]


def _sizes(call: LocalCall, before: Shape) -> Shape | None:
    """The sizes that a view of the unsharded tensor is given."""
    given = list(call.argument("shape" if call.name == "reshape" else "size")[1])
    if -1 in given:
        given[given.index(-1)] = prod(before) // max(1, -prod(given))
    return tuple(given) if prod(given) == prod(before) else None


def same_elements(before: Shape, after: Shape) -> Iterator[tuple[range, range]]:
    """The smallest runs of dims of two shapes that hold the same elements."""
    first = first_after = i = j = 0
    while i < len(before) or j < len(after):
        sizes = prod(before[first:i]), prod(after[first_after:j])
        if i > first and j > first_after and sizes[0] == sizes[1]:
            yield range(first, i), range(first_after, j)
            first, first_after = i, j
        elif j == len(after) or (i < len(before) and sizes[0] <= sizes[1]):
            i += 1
        else:
            j += 1
    yield range(first, i), range(first_after, j)


def _split(call: LocalCall) -> list[Layout] | None:
    layout, shape = call.tensors[0]
    dim = call.argument("dim")[0] % len(shape.shape)
    if layout.kind is not Kind.SHARDED or call.wanted is None:
        return None
    here, there = ([0, *accumulate(s[dim] for s in shapes)] for shapes in (call.results, call.wanted))
    if layout.dim != dim:
        return [layout] * len(call.results) if here == there else None
    pieces = zip(pairwise(here), pairwise(there), strict=True)
    return [_segments_between(layout, shape.shape[dim], *piece, call.ranks) for piece in pieces]


def _cat(call: LocalCall) -> list[Layout] | None:
    """Shards put together along their dim are shards of each."""
    dim = call.argument("dim")[0] % len(call.results[0])
    if any(layout.dim != dim for layout, _ in call.tensors):
        return None
    return [sharded(dim, tuple(n for layout, there in call.tensors for n in layout.sizes(there.shape[dim])))]


def _attention(call: LocalCall) -> list[Layout]:
    """All of some heads, or all of some samples, the same ones of each tensor. A mask may be the same for all heads."""
    tensors = [
        (layout, there.shape)
        for layout, there in call.tensors
        if len(there.shape) == 4 and not (layout == REPLICATED and there.shape[1] == 1)
    ]
    dims = {layout.dim if layout.kind is Kind.SHARDED else None for layout, _ in tensors}
    if dims not in ({0}, {1}) or any(layout == PARTIAL for layout, _ in call.tensors):
        raise UnprovenError(f"attention of {call.layouts_text}", call.sharded_dim)
    dim = 1 if 1 in dims else 0
    # 32 query heads and 8 kv heads are split alike if their segments are the same shares of the dim.
    shares = {tuple(Fraction(n, shape[dim]) for n in layout.sizes(shape[dim])) for layout, shape in tensors}
    if len(shares) > 1:
        raise UnprovenError(f"attention of {call.layouts_text}", dim)
    (share,) = shares
    return [sharded(dim, tuple(int(part * shape[dim] * call.ranks) for part in share)) if len(shape) > 1 else REPLICATED
            for shape in call.results]  # fmt: skip


def _convolution(call: LocalCall) -> list[Layout]:
    """Shards of groups of channels, of output channels, of input channels (a partial sum), of samples, or of positions
    where the kernel is a point.

    Where the length is split, DTensor exchanges the edges between ranks. A local convolution does not."""
    backward = call.name == "convolution_backward"
    layouts = [layout for layout, _ in call.tensors]
    gradient = layouts[0] if backward else None
    x, w, *bias = layouts[backward:]
    groups, wanted = call.argument("groups")
    kernel = call.argument("weight")[0].shape[2:]
    # dims of output and input channels in the weight; the kernel of a transposed convolution is [in, out, ...]
    out, into = (1, 0) if call.argument("transposed")[0] else (0, 1)

    def found(y: Layout, dx: Layout, dw: Layout, db: Layout) -> list[Layout]:
        if backward and gradient != (REPLICATED if y == PARTIAL else y):  # of a sum each rank has all of the gradient
            raise UnprovenError(f"convolution of {call.layouts_text}", call.sharded_dim)
        return needed(call, [dx, dw, db] if backward else [y])

    of_groups = sharded(0, w.segments)
    by_groups = x == sharded(1, x.segments) and w == of_groups and groups * call.ranks == wanted
    if by_groups and bias in ([], [of_groups]) and _are_whole_groups(call, x, w, wanted):
        return found(sharded(1, w.segments), x, w, of_groups)
    if groups == wanted == 1:
        of_outputs = sharded(0, w.segments)
        if x == REPLICATED and w == sharded(out, w.segments) and bias in ([], [of_outputs]):
            return found(sharded(1, w.segments), PARTIAL, w, of_outputs)
        if x == sharded(1, x.segments) and w == sharded(into, x.segments) and bias in ([], [PARTIAL]):
            return found(PARTIAL, x, w, REPLICATED)
    pointwise = x.kind is Kind.SHARDED and x.dim > 1 and set(kernel) == {1} and not any(call.argument("padding")[0])
    batch = x.kind is Kind.SHARDED and x.dim == 0
    if (pointwise or batch) and w == REPLICATED and bias in ([], [REPLICATED]):
        return found(x, x, PARTIAL, PARTIAL)
    raise UnprovenError(f"convolution of {call.layouts_text}", call.sharded_dim)


def _are_whole_groups(call: LocalCall, x: Layout, w: Layout, groups: int) -> bool:
    """Whether segments of channels are whole groups, of which each rank has the same ones of input and weight."""
    if not x.segments and not w.segments:
        return True
    weight = call.argument("weight")[1].shape
    channels = weight[1] * groups, weight[0]  # in and out, of a convolution that is not transposed
    counts = [
        [Fraction(n * groups, total) for n in layout.sizes(total)]
        for layout, total in zip((x, w), channels, strict=True)
    ]
    whole = all((count / call.ranks).denominator == 1 for count in counts[0])
    return not call.argument("transposed")[0] and counts[0] == counts[1] and whole


def _linear_together(call: LocalCall) -> list[Layout] | None:
    """Linear in all floating-point arguments together: of terms of a sum, or of zeros, they make a term."""
    pairs = [
        (i, layout, there) for i, (layout, there) in enumerate(zip(call.layouts, call.there, strict=True)) if layout
    ]
    terms = [layout == PARTIAL or i in call.zeros for i, layout, there in pairs if there.dtype.is_floating_point]
    others = [layout for _, layout, there in pairs if not there.dtype.is_floating_point]
    numbers = [leaf for leaf, layout in zip(call.here, call.layouts, strict=True) if layout is None]
    if call.name.startswith("masked_fill") and numbers != [0]:
        return None
    return (
        [PARTIAL] if all(terms) and PARTIAL in [p[1] for p in pairs] and all(o == REPLICATED for o in others) else None
    )


def _fill(call: LocalCall) -> list[Layout] | None:
    base, *values = [layout for layout, _ in call.tensors]
    return [base] if base.kind is Kind.SHARDED and all(value == REPLICATED for value in values) else None


def _write(call: LocalCall) -> list[Layout] | None:
    """`copy_`: the target becomes what is written, where the shapes agree."""
    (_, target), (layout, source) = call.tensors[:2]
    return [layout] if target.shape == source.shape else None


def _masked_write(call: LocalCall) -> list[Layout] | None:
    """`x[mask] = number` with a mask of x's first dims."""
    if len(call.tensors) != 3:
        return None
    (x, into), (mask, where), (value, number) = call.tensors
    dims = len(where.shape)
    if (
        where.dtype != torch.bool
        or where.shape != into.shape[:dims]
        or value != REPLICATED
        or number.shape not in ((), (1,))
    ):
        return None
    same = mask == (x if x.dim < dims else REPLICATED)
    return [x] if x.kind is Kind.SHARDED and same else None


Rule = Callable[[LocalCall], "list[Layout] | None"]
_BY_DIMS: dict[Runs, Rule] = {
    Runs.DIMS: along,
    Runs.WINDOWS: windows,
    Runs.MATRICES: matrices,
    Runs.NONE: elementwise,
}


def _either(*rules: Rule) -> Rule:
    return lambda call: next((found for rule in rules if (found := rule(call)) is not None), None)


RULES: dict[str, Rule] = {
    name: elementwise if facts.runs is None else _BY_DIMS[facts.runs]
    for name, facts in OPERATORS.items()
    if facts.runs is not None or facts.rule == "elementwise"
} | {
    "slice": _slice,
    "slice_backward": _slice,
    "split": _split,
    "split_with_sizes": _split,
    "cat": _cat,
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias"), _view),
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention,
    "convolution": _convolution,
    "convolution_backward": _convolution,
    "native_batch_norm": batch_norm,
    "native_batch_norm_backward": batch_norm,
    "native_group_norm": group_norm,
    "native_group_norm_backward": group_norm,
    "glu": glu,
    "glu_backward": glu,
    "renorm": renorm,
    "_weight_norm_interface": weight_norm,
    "_weight_norm_interface_backward": weight_norm,
    "roll": roll,
    "unfold": unfold,
    "unfold_backward": unfold,
    "searchsorted": searchsorted,
    "bucketize": bucketize,
    "stack": stack,
    "slice_scatter": write_piece,
    "select_scatter": write_piece,
    "constant_pad_nd": pad,
    "as_strided": same_view,
    "repeat": _repeat,
    "fill": _fill,
    "copy": _write,
    "index_put": _either(_linear_together, _masked_write),
    "_index_put_impl": _either(_linear_together, _masked_write),
}
for _name in ("scatter", "scatter_add", "index_add", "masked_fill", "where"):
    RULES[_name] = _either(_linear_together, RULES[_name])
