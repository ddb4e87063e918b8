"""Whether an operator on local tensors gives what the operator on unsharded tensors gives: an allow-list.

DTensor's sharding propagation is asked first of all, as it is for DTensors; it knows hundreds of operators. Where the
operator table says that it lacks a rule, is stricter than local arithmetic needs, or answers for more than the operator
does, the rules of this file stand beside it. What nothing allows is unproven. `tests/sharding/test_shard_rules.py`
compares every answer with numbers on random shards.

[Note: proven operators]
Let f be an operator with its arguments, x the unsharded input, x_r what rank r holds. f is proven at x_r when the
f_r(x_r) stand in a known relation to f(x): each equals it, they are shards of it, or they are terms of a sum that is
it. f_r may have other arguments than f where these say a size, and only there: a scale of 1 / x.shape[1] is another
number on a shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from colrow.sharding.draws import draws_by_element, may_draw
from colrow.sharding.local_call import INDEXES, PIECES_BACKWARD, LocalCall, Shape, TensorShape, UnprovenError
from colrow.sharding.local_layout import PARTIAL, REPLICATED, Kind, Layout, layout_of, repeating, sharded
from colrow.sharding.operator_rules import RULES
from colrow.sharding.operators import Filling, Linear
from colrow.sharding.positions import of_positions, positions_made
from colrow.torch_compat import NoDTensorRuleError, propagated


def proven_layouts(call: LocalCall, mesh: DeviceMesh) -> list[Layout]:
    """The layout of each result, by the first rule that covers the call. Raises UnprovenError."""
    if torch.Tag.inplace_view in call.func.tags:  # of `squeeze_` DTensor has no rule
        call = replace(call, func=_out_of_place(call.func))
    if call.facts.fills is not Filling.POSITION and (values := call.differing_values):
        here, there = values[0]
        raise UnprovenError(
            f"it computes with {here} on the shard and {there} in the unsharded model", call.sharded_dim
        )
    if call.facts.rule == "constant" and call.facts.fills not in (Filling.POSITION, Filling.RANDOM):
        # All elements are equal: any smaller tensor is a shard of the larger one.
        return [_of_equal_elements(call, 0, range(len(call.results[0])))]
    if (found := _pieces_with_repeats(call)) is not None:
        return found
    if any(layout.repeated for layout, _ in call.tensors):
        return _of_repeated(call, mesh)
    if any(layout.kind is Kind.POSITIONS for layout, _ in call.tensors):
        return of_positions(call)
    all_replicated = all(layout == REPLICATED for layout, _ in call.tensors)
    if _draws(call) and not (all_replicated and call.same_results):
        return _of_draw(call)
    if all_replicated:
        return positions_made(call) or _of_replicated(call)
    # Ours before DTensor's: each stands where DTensor has no rule or moves data, or is wrong for local tensors.
    for rule in (_linear_backward, RULES.get(call.name) or RULES.get(call.name.rstrip("_"))):
        if rule is not None and (found := rule(call)) is not None:
            return found
    if call.differing and not (call.name in SIZES or call.name.endswith("_like")):
        here, there = call.differing[0]
        raise UnprovenError(f"an argument is {here} on the shard and {there} in the unsharded model", call.sharded_dim)
    return _linear_in_one(call) or _of_dtensor(call, mesh)


def _out_of_place(func: Any) -> Any:
    """The operator that takes the same arguments and returns a new tensor; the operator itself where there is none."""
    arguments = [(argument.name, str(argument.type)) for argument in func._schema.arguments]
    packet = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None)
    for each in (getattr(packet, name) for name in packet.overloads()) if packet else ():
        if [(argument.name, str(argument.type)) for argument in each._schema.arguments] == arguments:
            return each
    return func


SIZES = frozenset(
    ("view", "reshape", "_unsafe_view", "_reshape_alias", "expand", "repeat", "new_empty_strided", "slice_backward",
     "select_backward", "embedding_dense_backward")
)  # fmt: skip
"""Operators whose integers are sizes of the result: DTensor's rule is asked with the unsharded ones, and must give the
local shape that this rank computed."""


def _draws(call: LocalCall) -> bool:
    """torch tags every attention as random, whatever its dropout is."""
    if draws_by_element(call.func) and "attention" in call.name:
        return False
    return call.name != "dropout" and (call.facts.random or may_draw(call.func))


def _of_draw(call: LocalCall) -> list[Layout]:
    """Each rank draws its shard: see [Note: random numbers on shards]."""
    if draws_by_element(call.func) and call.wanted is not None:
        layout = call.tensors[0][0] if call.tensors else _of_equal_elements(call, 0, range(len(call.results[0])))
        if layout.kind is Kind.SHARDED:
            return [layout] * len(call.results)
    raise UnprovenError(
        "each rank draws random numbers of its own shard, which are not one draw of all", call.sharded_dim
    )


def _of_equal_elements(call: LocalCall, result: int, dims: Iterable[int]) -> Layout:
    """Layout of a result whose elements are all equal along `dims`, so that any smaller piece is a shard."""
    here, there = call.results[result], call.wanted[result] if call.wanted else call.results[result]
    differing = [d for d, (a, b) in enumerate(zip(here, there, strict=False)) if a != b]
    if len(here) == len(there) and not differing:
        return REPLICATED
    source = call.forward  # zeros for the gradient of a piece
    if source and source.repeated and differing == [source.dim]:
        extents = here[source.dim] * call.ranks, there[source.dim]
        if extents == (sum(source.segments), sum(source.repeated)):
            return source
    if len(differing) == 1 and differing[0] in dims and here[differing[0]] * call.ranks == there[differing[0]]:
        return sharded(differing[0])
    raise UnprovenError(
        f"it makes {list(here)} where the unsharded model makes {list(there)}", next(iter(differing), None)
    )


def _of_replicated(call: LocalCall) -> list[Layout]:
    """Equal inputs and equal arguments give equal results on every rank."""
    if call.same_results and (not call.differing or call.name in ("view", "_unsafe_view")):
        return [REPLICATED] * len(call.results)
    if call.name == "expand":
        source = call.tensors[0][1].shape
        source = (1,) * (len(call.results[0]) - len(source)) + source
        return [_of_equal_elements(call, 0, [d for d, extent in enumerate(source) if extent == 1])]
    here, there = call.differing[0] if call.differing else (list(call.results), list(call.wanted or ()))
    raise UnprovenError(f"an argument or result is {here} beside a shard and {there} in the unsharded model")


def _linear_backward(call: LocalCall) -> list[Layout] | None:
    """A derivative is linear in the gradient: of a term of a sum it gives a term."""
    (gradient, *others) = [layout for layout, _ in call.tensors]
    linear = call.name.endswith(("_backward", "_backward_data")) and gradient == PARTIAL and call.same_results
    return (
        [PARTIAL] * len(call.results)
        if linear and all(o == REPLICATED for o in others) and not call.differing
        else None
    )


def _linear_in_one(call: LocalCall) -> list[Layout] | None:
    """What is linear in its first operand, or in each while the other is given, makes a term of a term: a gather by
    indices that all ranks have, a product with a factor that all ranks have."""
    facts, layouts = call.facts, [layout for layout, _ in call.tensors]
    if facts.linear is Linear.EACH:
        layouts.sort(key=lambda layout: layout != PARTIAL)
    if facts.contracts and facts.addends and len(layouts) > 2:
        return None  # a bias that all ranks have would count tp times
    linear = facts.linear in (Linear.FIRST, Linear.EACH) and not facts.random and facts.identity is None
    if linear and not call.differing and call.same_results and layouts[0] == PARTIAL:
        return [PARTIAL] * len(call.results) if all(other == REPLICATED for other in layouts[1:]) else None
    return None


def _of_repeated(call: LocalCall, mesh: DeviceMesh) -> list[Layout]:
    """Judge the operator on tensors with repeated heads, whose shards the ranks hold; see [Note: repeated heads]."""
    if _draws(call):
        raise UnprovenError("ranks that hold the same head would draw different random numbers for it")
    if call.wanted is None:
        raise UnprovenError("an operator that the unsharded model has not, on repeated heads", call.sharded_dim)
    plain = tuple(layout and sharded(layout.dim, layout.segments) if layout and layout.repeated else layout
                  for layout in call.layouts)  # fmt: skip
    there = [leaf if not layout or not layout.repeated else _with_extent(leaf, layout.dim, sum(layout.segments))
             for leaf, layout in zip(call.there, call.layouts, strict=True)]  # fmt: skip
    complete = replace(call, there=tuple(there), layouts=plain, wanted=None)
    answers = _with_sizes_repeated(complete, mesh) if call.name in SIZES else proven_layouts(complete, mesh)
    found = []
    for layout, here, wanted in zip(answers, call.results, call.wanted, strict=True):
        if layout.kind is Kind.SHARDED and here[layout.dim] * call.ranks != wanted[layout.dim]:
            layout = _repeated_as_before(call, layout, here[layout.dim] * call.ranks, wanted[layout.dim])
        elif layout.kind is not Kind.SHARDED and here != wanted:
            raise UnprovenError(f"it makes {list(here)} where the unsharded model makes {list(wanted)}")
        found.append(layout)
    return found


def _repeated_as_before(call: LocalCall, layout: Layout, held: int, wanted: int) -> Layout:
    """The layout of a result along a dim whose segments are those of its inputs: the same ones repeated, as often.

    Args:
        held: the dim's extent with the repeats.
        wanted: the same in the unsharded run.
    """
    inputs = [(each, there.shape) for each, there in call.tensors if each.kind is Kind.SHARDED]
    joined = call.name == "cat" and call.argument("dim")[0] % len(call.results[0]) == layout.dim
    if not joined:  # else each input gives segments of its own
        inputs = [next((each, shape) for each, shape in inputs if each.repeated)]
    sources = []
    for each, shape in inputs:
        sizes = each.sizes(shape[each.dim])
        sources += [
            (n, k, i in each.complete) for i, (n, k) in enumerate(zip(sizes, each.repeated or sizes, strict=True))
        ]
    sizes = layout.sizes(held)
    sources *= len(sizes) // len(sources)  # a batch of them, in one dim
    if len(sizes) == len(sources):
        unrepeated = tuple(size * k // n for size, (n, k, _) in zip(sizes, sources, strict=True))
        if sum(unrepeated) == wanted:
            complete = tuple(i for i, source in enumerate(sources) if source[2])
            return repeating(layout.dim, sizes, unrepeated, complete)
    raise UnprovenError("which heads of the result are repeated is not known", layout.dim)


def _with_extent(tensor: TensorShape, dim: int, extent: int) -> TensorShape:
    shape = (*tensor.shape[:dim], extent, *tensor.shape[dim + 1 :])
    return TensorShape(shape, contiguous_stride(shape), tensor.dtype)


def _with_sizes_repeated(call: LocalCall, mesh: DeviceMesh) -> list[Layout]:
    """The sizes in the arguments belong to the unsharded result: one of them has to be that of the repeated heads."""
    shape, answers = call.results[0], []
    for dim in range(len(shape)):
        sizes = iter((*shape[:dim], shape[dim] * call.ranks, *shape[dim + 1 :]))
        leaves = tuple(next(sizes, leaf) if type(leaf) is int else leaf for leaf in call.there)
        try:
            found = proven_layouts(replace(call, there=leaves), mesh)
        except UnprovenError:
            continue
        if found[0].dim == dim:
            answers.append(found)
    if not answers:
        raise UnprovenError("no size of the result fits its shard", call.sharded_dim)
    # one local head fits beside the tokens too, as a part of each: the plain shard is meant
    return min(answers, key=lambda found: len(found[0].segments))


def _pieces_with_repeats(call: LocalCall) -> list[Layout] | None:
    """Along segments of which some have repeated heads: the same segments here and there, or a piece of one that each
    rank holds completely. The gradient of pieces goes the other way. None: another operator, or along another dim."""
    if call.wanted is None:
        return None
    backward = call.name in PIECES_BACKWARD
    layout = call.forward if backward else next((layout for layout, _ in call.tensors), None)
    pieces = call.pieces(layout.dim) if layout and layout.repeated else None
    if pieces is None or layout is None:
        return None
    found = [_piece_with_repeats(layout, *piece, call.ranks) for piece in pieces]
    if not backward:
        return found
    # of what each rank holds completely, its gradient is one term of the sum over ranks
    wanted = [PARTIAL if piece == REPLICATED else piece for piece in found]
    written = [PARTIAL if i in call.zeros and each == REPLICATED else each
               for i, each in enumerate(call.layouts) if each is not None]  # fmt: skip
    if call.name != "cat":
        written = written[-1:]
    if wanted == written and (call.name not in INDEXES or 0 in call.zeros):
        return [layout]
    if call.name == "cat":  # of something else, perhaps
        return None
    raise UnprovenError("the gradient of a piece has another layout than the piece", layout.dim)


def _piece_with_repeats(layout: Layout, here: tuple[int, int], there: tuple[int, int], ranks: int) -> Layout:
    """Layout of the elements `here` of a local dim, which are those `there` of the unsharded one."""
    bounds = [n // ranks for n in (0, *accumulate(layout.segments))]
    bounds_there = [0, *accumulate(layout.repeated)]
    for i in layout.complete:
        ends = (here[0] - bounds[i], here[1] - bounds[i]), (there[0] - bounds_there[i], there[1] - bounds_there[i])
        if ends[0] == ends[1] and 0 <= ends[0][0] < ends[0][1] <= layout.repeated[i]:
            return REPLICATED
    if set(here) <= set(bounds) and here[0] < here[1]:
        i, j = map(bounds.index, here)
        if (bounds_there[i], bounds_there[j]) == there:
            complete = tuple(k - i for k in layout.complete if i <= k < j)
            return repeating(layout.dim, layout.segments[i:j], layout.repeated[i:j], complete)
    raise UnprovenError(f"elements {here[0]} to {here[1]} of a shard with repeated heads", layout.dim)


def contiguous_stride(shape: Shape) -> Shape:
    """The strides of a contiguous tensor."""
    return tuple(accumulate((max(n, 1) for n in shape[:0:-1]), mul, initial=1))[::-1] if shape else ()


# -- DTensor's rules


def _of_dtensor(call: LocalCall, mesh: DeviceMesh) -> list[Layout]:
    placements = [layout.placement() for layout, _ in call.tensors]
    try:
        if None in placements:
            raise UnprovenError(f"DTensor has no name for {call.layouts_text}", call.sharded_dim)
        return _propagate(call, placements, mesh)
    except UnprovenError as error:
        unproven = error
    with_zeros = [
        (_of_zeros(call, layout) if i in call.zeros else layout).placement()
        for i, layout in enumerate(call.layouts)
        if layout is not None
    ]
    if None not in with_zeros and with_zeros != placements:
        return _propagate(call, with_zeros, mesh)
    segments = {layout.segments for layout, _ in call.tensors if layout.kind is Kind.SHARDED}
    if segments == {()} or len(segments) != 1:
        raise unproven
    # DTensor knows few rules for equal segments and none for unequal ones. What it says of a dim sharded as one holds
    # for segments too, where the dim comes out at its full length (a batch of rows) or is summed over.
    (cut,) = segments
    plain = [Shard(layout.dim) if layout.kind is Kind.SHARDED else layout.placement() for layout, _ in call.tensors]
    layouts = []
    for i, layout in enumerate(_propagate(call, plain, mesh)):
        if layout.kind is Kind.SHARDED and _complete_shape(call, i, layout.dim)[layout.dim] != sum(cut):
            raise UnprovenError(f"there is no rule for a dim of segments {list(cut)}", layout.dim)
        layouts.append(sharded(layout.dim, cut) if layout.kind is Kind.SHARDED else layout)
    return layouts


def _of_zeros(call: LocalCall, layout: Layout) -> Layout:
    """Zero is a term of any sum, and a shard of zeros is one of any segments."""
    if layout == REPLICATED:
        return PARTIAL
    others = [each for i, each in enumerate(call.layouts) if each and each.kind is Kind.SHARDED and i not in call.zeros]
    return next((each for each in others if each.dim == layout.dim and not each.repeated), layout)


def _propagate(call: LocalCall, placements: Sequence[Any], mesh: DeviceMesh) -> list[Layout]:
    """What DTensor's rule says, if it moves nothing and gives the local shapes that this rank computed."""
    given = iter(placements)
    leaves = [
        leaf if layout is None else (next(given), *leaf[:3])
        for leaf, layout in zip(call.there, call.layouts, strict=True)
    ]
    try:
        answers = propagated(call.func, leaves, call.tree, mesh)
    except NoDTensorRuleError as error:
        raise UnprovenError(f"{error}; the tensors are {call.layouts_text}", call.sharded_dim) from None
    if len(answers) != len(call.results):
        raise UnprovenError("DTensor's rule gives another number of results", call.sharded_dim)
    layouts = []
    for i, ((placement, local), computed) in enumerate(zip(answers, call.results, strict=True)):
        layout = layout_of(placement, _complete_shape(call, i, getattr(placement, "dim", None)))
        if layout is None:
            raise UnprovenError(f"the result is one rank's part of {placement}", call.sharded_dim)
        if local != computed:
            raise UnprovenError(
                f"a shard of the result is {list(local)}, and here it is {list(computed)}", call.sharded_dim
            )
        layouts.append(layout)
    return layouts


def _complete_shape(call: LocalCall, result: int, dim: int | None) -> Shape:
    """The unsharded shape of a result that is sharded along `dim`."""
    if call.wanted is not None:
        return call.wanted[result]
    return tuple(n * call.ranks if d == dim else n for d, n in enumerate(call.results[result]))
