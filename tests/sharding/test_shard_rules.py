"""Every rule beside DTensor's, on numbers: the ranks' results are what the rule says of the unsharded result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_flatten, tree_unflatten

from colrow.dryrun.fake_world import fake_tp_mesh
from colrow.dryrun.numbered import shape_of
from colrow.sharding.local_call import LocalCall, UnprovenError
from colrow.sharding.local_layout import PARTIAL, REPLICATED, STYLE, Layout, layout_of, repeating, sharded
from colrow.sharding.operator_rules import RULES
from colrow.sharding.operators import operator
from colrow.sharding.shard_rules import proven_layouts
from helpers.head_cases import HEADS_AND_PIECES
from helpers.segment_cases import SUMS_AND_SEGMENTS
from helpers.shards import ATTENTION, POSITIONS, QUERIES_AND_ALL_KV, RANKS, S0, S1, S2, agrees, aten, parts, written, x


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with fake_tp_mesh(RANKS) as mesh:
        yield mesh


def terms(whole: Tensor, layout: Layout) -> list[Tensor]:
    """What each rank holds of a gradient: of what all hold completely, a term of the sum."""
    if not layout.complete:
        return parts(whole, layout)
    segments = whole.split(list(layout.repeated), layout.dim)
    held = [parts(s, PARTIAL if i in layout.complete else sharded(layout.dim)) for i, s in enumerate(segments)]
    return [torch.cat(pieces, layout.dim) for pieces in zip(*held, strict=True)]


def terms_agree(results: list[Tensor], whole: Tensor, layout: Layout) -> bool:
    """`agrees` of a gradient."""
    if not layout.complete:
        return agrees(results, whole, layout)
    segments = whole.split(list(layout.repeated), layout.dim)
    held = [result.split([n // RANKS for n in layout.segments], layout.dim) for result in results]
    layouts = [PARTIAL if i in layout.complete else sharded(layout.dim) for i in range(len(segments))]
    return all(map(agrees, map(list, zip(*held, strict=True)), segments, layouts))


def answer(
    mesh: DeviceMesh,
    func: Any,
    args: Any,
    layouts: list[Layout],
    here: Any = None,
    *,
    gradient: bool = False,
    **known: Any,
) -> list[Layout]:
    """The layouts that are proven, after a comparison with numbers.

    Args:
        args: of the unsharded run.
        layouts: of each tensor among them.
        here: arguments that are no tensors, as a rank gives them; those of the unsharded run unless given.
        gradient: the tensors are gradients (see `terms`).
    """
    leaves, tree = tree_flatten((args, {}))
    given = iter(layouts)
    placed = [next(given) if isinstance(leaf, Tensor) else None for leaf in leaves]
    split, same = (terms, terms_agree) if gradient else (parts, agrees)
    held = [split(leaf, layout) if layout else [leaf] * RANKS for leaf, layout in zip(leaves, placed, strict=True)]
    if here is not None:
        plain = iter(tree_flatten(here)[0])
        held = [h if layout else [next(plain)] * RANKS for h, layout in zip(held, placed, strict=True)]

    def run(flat: list[Any]) -> list[Tensor]:
        call_args, kwargs = tree_unflatten(flat, tree)
        return [leaf for leaf in tree_flatten(func(*call_args, **kwargs))[0] if isinstance(leaf, Tensor)]

    whole = run(list(leaves))
    ranks = [run([h[rank] for h in held]) for rank in range(RANKS)]
    call = LocalCall(
        func,
        tree,
        tuple(shape_of(h[0]) for h in held),
        tuple(shape_of(leaf) for leaf in leaves),
        tuple(placed),
        tuple(tuple(t.shape) for t in ranks[0]),
        tuple(tuple(t.shape) for t in whole),
        RANKS,
        **known,
    )
    found = proven_layouts(call, mesh)
    for i, (layout, expected) in enumerate(zip(found, whole, strict=True)):
        assert same([results[i] for results in ranks], expected, layout), f"result {i} is not {layout}"
    return found


PROVEN = HEADS_AND_PIECES | SUMS_AND_SEGMENTS


@pytest.mark.parametrize("name", PROVEN)
def test_a_rule_holds_for_numbers(name: str, mesh: DeviceMesh) -> None:
    func, args, layouts, here, expected, *known = PROVEN[name]
    assert answer(mesh, func, args, layouts, here, **(known[0] if known else {})) == expected


REFUSED: dict[str, tuple[Any, ...]] = {
    "gate and values as one": (aten.glu.default, (x(3, 16), 1), [S1], None),
    "any over the shards": (aten.any.dim, (x(3, 8) > 0.5, 1), [S1], None),
    "pooled over edges": (aten.avg_pool2d.default, (x(2, 4, 8, 8), [3, 3], [1, 1], [1, 1]), [S2], None),
    "channels in groups": (
        aten.native_group_norm.default,
        (x(2, 4, 8), None, None, 2, 4, 8, 2, 1e-5),
        [S1],
        ([None, None, 2, 2, 8, 2, 1e-5],),
    ),
    "rows searched in pieces": (aten.searchsorted.Tensor, (x(4, 6).sort().values, x(4, 6)), [S1, S1], None),
    "a split row searched": (aten.searchsorted.Tensor, (x(6).sort().values, x(4, 6)), [S0, S1], None),
    "stacked with other segments": (aten.stack.default, ([x(4, 8), x(4, 8)], 2), [S1, sharded(1, (4, 4))], None),
    "row written into shards": (aten.select_scatter.default, (x(4, 4), x(4), 0, 1), [S0, REPLICATED], None),
    "rows written at other places": (
        aten.slice_scatter.default,
        (x(4, 6), x(2, 6), 0, 1, 3),
        [S1, S1],
        ([0, 2, 4],),
    ),
    "norm of each row over its pieces": (
        aten._weight_norm_interface_backward.default,
        (x(4, 4), x(4, 4), x(4, 1), x(4, 1), 0),
        [S1, S1, REPLICATED, REPLICATED],
        None,
    ),
    "slices renormed over them": (aten.renorm.default, (x(3, 4), 2, 0, 0.5), [S1], None),
    "batch norm in training": (
        aten.native_batch_norm.default,
        (x(2, 4, 8), x(4), x(4), x(4), x(4).abs(), True, 0.1, 1e-5),
        [S2, *[REPLICATED] * 4],
        None,
    ),
    "slice of a piece": (aten.slice.Tensor, (x(3, 8), 1, 0, 4), [S1], ([1, 0, 2],)),
    "slice of a part of a segment": (aten.slice.Tensor, (x(3, 12), 1, 0, 4), [sharded(1, (8, 4))], ([1, 0, 2],)),
    "slice with a step that does not divide": (aten.slice.Tensor, (x(3, 12), 1, 0, 12, 4), [S1], ([1, 0, 6, 4],)),
    "split of one piece": (aten.split.Tensor, (x(3, 8), 4, 1), [S1], ([2, 1],)),
    "triangle of rows": (aten.tril.default, (x(4, 4),), [S0], None),
    "attention of other heads": (ATTENTION, (x(2, 4, 3, 8),) * 3, [S1, sharded(1, (2, 2)), sharded(1, (2, 2))], None),
    "attention by tokens": (ATTENTION, (x(2, 4, 4, 8),) * 3, [S2] * 3, None),
    "convolution by inputs with all of its bias": (
        aten.convolution.default,
        (x(2, 4, 9), x(6, 4, 3), x(6), [1], [1], [1], False, [0], 1),
        [S1, S1, REPLICATED],
        None,
    ),
    "convolution of other inputs": (
        aten.convolution.default,
        (x(2, 8, 9), x(6, 8, 3), None, [1], [1], [1], False, [0], 1),
        [sharded(1, (4, 4)), S1],
        None,
    ),
    "cumulative sum of the last dim": (aten.cumsum.default, (x(3, 8), -1), [S1], None),
    "padding of the sharded dim": (aten.constant_pad_nd.default, (x(2, 4, 3), [0, 0, 1, 1], 0.0), [S1], None),
    "convolution by groups in other segments": (
        aten.convolution.default,
        (x(2, 12, 9), x(18, 2, 3), None, [1], [1], [1], False, [0], 6),
        [sharded(1, (8, 4)), sharded(0, (6, 12))],
        ([None, 1, 1, 1, False, 0, 3],),
    ),
    "convolution by groups of which a segment has half": (
        aten.convolution.default,
        (x(2, 12, 9), x(12, 2, 3), None, [1], [1], [1], False, [0], 6),
        [sharded(1, (10, 2)), sharded(0, (10, 2))],
        ([None, 1, 1, 1, False, 0, 3],),
    ),
    "gradient of a convolution that is a sum": (
        aten.convolution_backward.default,
        (x(2, 6, 9), x(2, 4, 9), x(6, 4, 3), [6], [1], [1], [1], False, [0], 1, [True, True, True]),
        [PARTIAL, S1, S1],
        None,
    ),
    "convolution by positions": (
        aten.convolution.default,
        (x(2, 4, 8), x(6, 4, 3), None, [1], [1], [1], False, [0], 1),
        [S2, REPLICATED],
        None,
    ),
    "mask with a number": (aten.masked_fill.Scalar, (x(3, 4), x(3, 4) > 0, 1), [PARTIAL, REPLICATED], None),
    "term and an addend": (aten.add.Tensor, (x(3, 4), x(3, 4)), [REPLICATED, PARTIAL], None),
    "two terms multiplied": (aten.mul.Tensor, (x(3, 4), x(3, 4)), [PARTIAL, PARTIAL], None),
    "norm": (aten.linalg_vector_norm.default, (x(3, 8), 2, [1]), [S1], None),
    "largest": (aten.amax.default, (x(3, 8), [1]), [S1], None),
    "rolled": (aten.roll.default, (x(3, 8), [1], [1]), [S1], None),
    "softmax": (aten._softmax.default, (x(3, 8), 1, False), [S1], None),
    "positions from another one": (aten.arange.start, (1, 9), [], ([1, 5],)),
    "positions as numbers": (aten.mul.Tensor, (x(3, 8), torch.arange(8)), [S1, POSITIONS], None),
    "positions of other elements": (aten.index.Tensor, (x(3, 16), [None, torch.arange(8)]), [S1, POSITIONS], None),
    "positions in another dim": (aten.index.Tensor, (x(8, 8), [torch.arange(8)]), [S1, POSITIONS], None),
    "windows over the end of a shard": (aten.unfold.default, (x(3, 12), 1, 4, 4), [S1], None),
    "windows that overlap": (aten.unfold.default, (x(3, 12), 1, 2, 1), [S1], None),
    "rolled by a part of a segment": (aten.roll.default, (x(3, 16), [4], [1]), [sharded(1, (8, 8))], ([2, 1],)),
    "rolled by all of a shard": (aten.roll.default, (x(3, 16), [8], [1]), [sharded(1, (8, 8))], None),
    "number of a shard": (aten.div.Tensor, (x(3, 8), 8), [S1], ([4],)),
    "noise": (aten.normal_functional.default, (x(3, 8),), [S1], None),
    "looked up in a shard": (aten.embedding.default, (x(8, 3), torch.tensor([1, 2])), [S0, REPLICATED], None),
    "heads by number": (aten.view.default, (x(3, 8), [3, 4, 2]), [S1], ([3, 4, 1],)),
    "segments that are no heads": (aten.view.default, (x(3, 32), [3, 4, 8]), [sharded(1, (20, 12))], ([3, 2, 8],)),
    "number of anything but zeros": (
        aten.baddbmm.default,
        (x(12, 2, 2), x(12, 2, 3), x(12, 3, 2)),
        [S0, sharded(0, (4, 4, 4)), sharded(0, (4, 4, 4))],
        None,
    ),
    "slice inside repeated heads": (
        aten.slice.Tensor,
        (x(3, 8), 1, 5, 7),
        [repeating(1, (4, 8), (4, 4))],
        ([1, 3, 5],),
    ),
    "other places of a complete segment": (aten.slice.Tensor, (x(3, 8), 1, 5, 7), [QUERIES_AND_ALL_KV], ([1, 2, 4],)),
    "repeated heads with a step": (
        aten.slice.Tensor,
        (x(3, 6), 1, 0, 4, 2),
        [repeating(1, (4, 4), (4, 2))],
        ([1, 0, 2, 2],),
    ),
    "index by other constants": (
        aten.index.Tensor,
        (x(3, 8), [None, written(1)]),
        [QUERIES_AND_ALL_KV, REPLICATED],
        None,
    ),
    "split inside repeated heads": (
        aten.split_with_sizes.default,
        (x(3, 6), [3, 3], 1),
        [repeating(1, (4, 4), (4, 2))],
        ([2, 2, 1],),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_on_shards_is_unproven(name: str, mesh: DeviceMesh) -> None:
    func, args, layouts, here = REFUSED[name]
    with pytest.raises(UnprovenError):
        answer(mesh, func, args, layouts, here)


def test_every_rule_has_a_case() -> None:
    """Those that follow from the table are compared in `test_rules_on_random_shards.py`."""
    names = {str(case[0].name()).partition("::")[2].partition(".")[0].rstrip("_") for case in PROVEN.values()}
    alike = {
        "_index_put_impl": "index_put",
        **dict.fromkeys(("reshape", "_reshape_alias", "_unsafe_view"), "view"),
        "_scaled_dot_product_flash_attention_for_cpu_backward": "_scaled_dot_product_flash_attention_for_cpu",
    }
    by_hand = {name for name in RULES if operator(name).runs is None and operator(name).rule != "elementwise"}
    assert {alike.get(name, name) for name in by_hand} <= names


def test_the_gradient_of_attention_by_heads(mesh: DeviceMesh) -> None:
    q, k, v = (x(2, 4, 3, 8) + i for i in range(3))
    out, logsumexp = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    args = (x(2, 4, 3, 8) * 2, q, k, v, out, logsumexp, 0.0, True)
    assert answer(mesh, aten._scaled_dot_product_flash_attention_for_cpu_backward.default, args, [S1] * 6) == [S1] * 3


def test_the_names_of_layouts() -> None:
    for layout in (REPLICATED, PARTIAL, sharded(1), sharded(1, (4, 4))):
        assert layout_of(layout.placement(), (2, 8)) == layout
    assert (sharded(1, (2, 6)).placement(), STYLE.placement()) == (None, None)
    assert str(sharded(1, (2, 6))) == "shard(1) of each of [2, 6]"
