"""The operator table: what other code names stands in it, and its facts hold."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Placement

import colrow
from colrow.derive.table import RULES
from colrow.dryrun.fake_world import fake_tp_mesh
from colrow.sharding.operators import OPERATORS, Filling, Identity, Linear, operator, plain_name

ROOMS = ("derive", "dryrun", "checking")
WORDS = {
    "backward",
    "count",
    "cpu",
    "cuda",
    "dim",
    "fix",
    "gradient",
    "inner",
    "mode",
    "norm",
    "pin_memory",
    "size",
    "sorted",
}
"""Operators' names that stand for something else in these rooms: arguments, keys, findings, devices."""
aten: Any = torch.ops.aten


def operators_named(tree: ast.AST) -> Iterator[str]:
    """Strings that are names of ATen operators, and the names behind `aten.`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            if isinstance(getattr(aten, node.value, None), torch._ops.OpOverloadPacket):
                yield node.value
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("aten"):
            yield node.attr


@pytest.mark.parametrize("room", ROOMS)
def test_every_operator_that_is_named_stands_in_the_table(room: str) -> None:
    missing = {
        f"{path.name}: {name}"
        for path in Path(colrow.__file__).parent.joinpath(room).glob("*.py")
        for name in operators_named(ast.parse(path.read_text(encoding="utf-8")))
        if plain_name(name) not in OPERATORS.keys() | WORDS
    }
    assert not missing, "enter each in sharding/operators.py; or in WORDS, where the word is no operator there"


def test_the_search_sees_what_is_named() -> None:
    tree = ast.parse("if name in ('geqrf', 'not an operator'): torch.ops.aten.lstm.input")
    assert set(operators_named(tree)) == {"geqrf", "lstm"}


def test_the_rules_of_the_table_are_those_of_derive() -> None:
    named = {op.rule for op in OPERATORS.values() if op.rule}
    assert named <= RULES.keys(), f"write derive's rule (`@rule(NAME)`) for each of {sorted(named - RULES.keys())}"
    assert RULES.keys() <= named, f"no operator of the table has the rule {sorted(RULES.keys() - named)}"


def test_an_operator_in_place_is_the_same_operator() -> None:
    assert operator("add_") is OPERATORS["add"]
    assert operator("_to_copy") is OPERATORS["_to_copy"]
    assert operator("linalg_solve").rule == ""


def test_what_moves_elements_is_linear() -> None:
    assert not [op.name for op in OPERATORS.values() if op.moves and op.linear not in (Linear.FIRST, Linear.TERMS)]


UNARY = [op.name for op in OPERATORS.values() if op.rule == "elementwise" and op.linear is Linear.FIRST]


@pytest.mark.parametrize("name", [n for n in UNARY if n not in ("dropout", "boundary", "to", "_to_copy", "type_as")])
def test_a_linear_operator_commutes_with_a_sum(name: str) -> None:
    one, other = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    f = getattr(aten, name)
    torch.testing.assert_close(f(one + other), f(one) + f(other))


PRODUCTS = [op.name for op in OPERATORS.values() if op.contracts and op.linear is Linear.EACH]


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_commutes_with_a_sum_but_not_with_a_bias(name: str) -> None:
    a, b, x = (torch.randn(2, 3, 3, dtype=torch.float64) for _ in range(3))
    if name in ("linear", "mm"):
        a, b, x = a[0], b[0], x[0]
    f = partial(torch.einsum, "bij,bjk->bik") if name == "einsum" else getattr(aten, name)
    torch.testing.assert_close(f(a + b, x), f(a, x) + f(b, x))
    torch.testing.assert_close(f(x, a + b), f(x, a) + f(x, b))
    if name == "linear":  # which the rules of the check leave to DTensor, and derive does not take
        bias = torch.ones(3, dtype=torch.float64)
        assert not torch.allclose(f(a + b, x, bias), f(a, x, bias) + f(b, x, bias))


@pytest.mark.parametrize("name", [op.name for op in OPERATORS.values() if op.identity is Identity.MEMORY])
def test_an_identity_gives_its_input(name: str) -> None:
    x = torch.randn(3, 4)
    if name != "_assert_tensor_metadata":
        assert torch.equal(getattr(aten, name)(x), x)


@pytest.mark.parametrize("name", [op.name for op in OPERATORS.values() if op.rule == "like" and op.fills])
def test_what_fills_does_not_read(name: str) -> None:
    def filled(x: Tensor) -> Tensor:
        return getattr(aten, name)(x, 2.0) if name == "full_like" else getattr(aten, name)(x)

    if OPERATORS[name].fills in (Filling.ZERO, Filling.CONSTANT):
        assert torch.equal(filled(torch.zeros(3)), filled(torch.full((3,), float("nan"))))
    assert filled(torch.zeros(3)).shape == (3,)


# ---------------------------------------------------------------------- beside DTensor's own propagation


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with fake_tp_mesh(2) as made:
        yield made


def answer(function: Callable[..., Any], *args: Any) -> Placement | None:
    """The placement that DTensor gives the first result; None where it moves data or has no rule."""
    try:
        with CommDebugMode() as counted:
            out = function(*args)
    except NotImplementedError:
        return None
    first = out[0] if isinstance(out, (tuple, list)) else out
    return None if counted.get_total_counts() else first.placements[0]


SHARDED = [op.name for op in OPERATORS.values() if op.rule == "elementwise"]
OLD_TORCH = torch.__version__.startswith("2.11.")
LEARNT_SINCE = (
    *("ne", "not_equal", "hardshrink", "polar", "complex", "rrelu", "special_entr", "special_erfcx", "special_i0e"),
    *("special_i1", "special_i1e", "special_log_ndtr", "special_ndtri", "special_xlog1py"),
)
LEARNT_SINCE = LEARNT_SINCE if OLD_TORCH else ()
"""DTensor of torch 2.11 has no rule for them: there the table is ahead of it."""
OTHER_SIGNATURES = ("threshold", "lerp", "addcmul", "addcdiv", "_conj", "real", "clamp", "boundary", "fill")
OTHER_ANSWERS = ("where", "masked_fill", "copy", "dropout", "clone", "lift_fresh_copy")
"""DTensor has no rule for them, or one that does more, or less: see `SHORT`."""


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in SHARDED
        if n not in OTHER_SIGNATURES + OTHER_ANSWERS + LEARNT_SINCE and "bitwise" not in n and "__" not in n
    ],
)
def test_dtensor_agrees_that_an_elementwise_operator_keeps_shards(name: str, mesh: DeviceMesh) -> None:
    x = DTensor.from_local(torch.rand(4, 3), mesh, [Shard(1)], run_check=False)
    function = getattr(aten, name)
    try:
        assert answer(function, x) == Shard(1)
    except RuntimeError:  # it takes two
        assert answer(function, x, x) == Shard(1)


def partly(function: Callable[..., Any], place: Placement, *more: Any) -> Callable[[DeviceMesh], Placement | None]:
    def ask(mesh: DeviceMesh) -> Placement | None:
        rest = [
            DTensor.from_local(m, mesh, [Replicate()], run_check=False) if isinstance(m, Tensor) else m for m in more
        ]
        return answer(function, DTensor.from_local(torch.rand(4, 6, 6), mesh, [place], run_check=False), *rest)

    return ask


MASK = torch.zeros(4, 6, 6, dtype=torch.bool)
SHORT: dict[str, Callable[[DeviceMesh], Placement | None]] = {
    **({} if OLD_TORCH else {"clone": partly(aten.clone, Partial())}),  # 2.11 keeps a partial sum partial
    "copy": partly(aten.copy, Shard(1), torch.rand(4, 12, 6)),
    "lift_fresh_copy": partly(aten.lift_fresh_copy, Shard(1)),
    "masked_fill": partly(aten.masked_fill, Partial(), MASK, 0.0),
    "tril": partly(aten.tril, Shard(0)),
    "triu": partly(aten.triu, Shard(0)),
    "slice": partly(lambda x: aten.slice(x, 1, 0, 6, 2), Shard(1)),
    "split": partly(lambda x: aten.split(x, 6, 1), Shard(1)),
    "cat": partly(lambda x: aten.cat([x, x], 1), Shard(1)),
}


@pytest.mark.parametrize("name", SHORT)
def test_where_a_rule_stands_because_dtensor_falls_short_it_does(name: str, mesh: DeviceMesh) -> None:
    """A failure is good news: torch has learnt the operator, and the check's rule for it may go."""
    assert SHORT[name](mesh) is None


def test_dtensor_takes_random_numbers_and_lookups_for_what_its_handlers_make_of_them(mesh: DeviceMesh) -> None:
    assert partly(aten.rand_like, Shard(1))(mesh) == Shard(1)
    table = DTensor.from_local(torch.rand(4, 3), mesh, [Shard(0)], run_check=False)
    ids = DTensor.from_local(torch.zeros(5, dtype=torch.long), mesh, [Replicate()], run_check=False)
    place = answer(aten.embedding, table, ids)
    assert place is not None
    assert place.is_partial()
