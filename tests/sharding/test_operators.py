"""The operator table: what other code names stands in it, and its facts hold."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import colrow
from colrow.derive.table import RULES
from colrow.sharding.operators import OPERATORS, Filling, Identity, Linear, operator, plain_name

ROOMS = ("derive", "dryrun", "checking")
WORDS = {"backward", "count", "cpu", "dim", "fix", "inner", "mode", "norm", "size", "sorted"}
"""Operators' names that stand for something else in these rooms: arguments, keys, findings."""
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
    assert not missing


def test_the_search_sees_what_is_named() -> None:
    tree = ast.parse("if name in ('geqrf', 'not an operator'): torch.ops.aten.lstm.input")
    assert set(operators_named(tree)) == {"geqrf", "lstm"}


def test_the_rules_of_the_table_are_those_of_derive() -> None:
    assert {op.rule for op in OPERATORS.values() if op.rule} == RULES.keys()


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
