"""A reduced model keeps every kind of block, and a finding in the last of them is found."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.checking.check import check
from colrow.dryrun.block_kinds import BlockTraces, trace_blocks
from colrow.dryrun.calls import example_inputs
from colrow.dryrun.reduced_copy import reduced_copy
from colrow.dryrun.reduced_model import layers_with_every_kind
from colrow.mesh import Mesh
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan
from helpers.variants import params

BLOCKS = 7


class OtherMLP(m.MLP):
    """Mixes its features where its way of telling says so."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        self.__dict__.update(attributes)

    def mixes(self) -> bool:
        return False

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h.softmax(-1) if self.mixes() else h)


class ByNumber(OtherMLP):
    def mixes(self) -> bool:
        return bool(self.layer_idx % 4 == 3)


class ByList(OtherMLP):
    def mixes(self) -> bool:
        return "softmax" in self.steps


class ByPrivateAttribute(OtherMLP):
    def mixes(self) -> bool:
        return bool(self._mixes)


def no() -> bool:
    return False


def yes() -> bool:
    return True


class ByFunction(OtherMLP):
    def mixes(self) -> bool:
        return bool(self.decide())


TABLE = [False] * 5 + [True, False]


class ByTable(OtherMLP):
    def mixes(self) -> bool:
        return TABLE[self.layer_idx]


def returns(value: bool) -> Callable[[], bool]:
    return lambda: value


MODELS: dict[str, tuple[Callable[[int], nn.Module], set[int]]] = {
    "alike": (lambda i: m.MLP(), {0, 1}),
    "alike but for the number": (lambda i: OtherMLP(layer_idx=i), {0, 1}),
    "number": (lambda i: ByNumber(layer_idx=i), {0, 1, 3}),
    "list": (lambda i: ByList(steps=["gelu", "softmax"] if i == 4 else ["gelu"]), {0, 1, 4}),
    "private attribute": (lambda i: ByPrivateAttribute(_mixes=i == 5), {0, 1, 5}),
    "function": (lambda i: ByFunction(decide=yes if i == 4 else no), {0, 1, 4}),
    "closure": (lambda i: ByFunction(decide=returns(i == 4)), {0, 1, 4}),
    "equal closures": (lambda i: ByFunction(decide=returns(False)), {0, 1}),
    "partial": (lambda i: ByFunction(decide=partial(bool, i == 6)), {0, 1, 6}),
    "global table": (lambda i: ByTable(layer_idx=i), {0, 1, 5}),
}

KEPT = ("number", "closure")


def built(make: Callable[[int], nn.Module]) -> m.Gpt:
    numbers = iter(range(BLOCKS))
    return m.Gpt(mlp=lambda: make(next(numbers)), layers=BLOCKS)


def kept(model: nn.Module) -> set[int]:
    traces = trace_blocks(model, lambda copy: example_inputs(copy, 1, 16))
    copy = reduced_copy(model, {}, traces)
    names = [f"blocks.{i}" for i in range(len(copy.model.get_submodule("blocks")._modules))]
    return {int(copy.original(name).rpartition(".")[2]) for name in names}


@pytest.mark.parametrize("name", params(MODELS, exhaustive=lambda name: name not in KEPT))
def test_blocks_that_differ_are_kept(name: str) -> None:
    make, expected = MODELS[name]
    model = built(make)
    left, mixing = kept(model), expected - {0, 1}
    assert expected <= left
    assert len(left) <= len(expected) + 1, "and of those that are alike two"
    assert layers_with_every_kind(model) == max(expected) + 1
    codes = {f.code for f in check(model, gpt_plan(), Mesh(tp=2), seq_len=16)}
    assert codes == ({"CR413"} if mixing else set())


class HookedBlocks(m.Gpt):
    def __init__(self) -> None:
        super().__init__(layers=BLOCKS)
        self.get_parameter("blocks.3.mlp.up.weight").register_hook(torch.sign)
        self.get_submodule("blocks.5.mlp.up").register_forward_hook(lambda *_: None)


def test_blocks_with_hooks_are_kept() -> None:
    assert {3, 5} <= kept(HookedBlocks())


class Loop(m.Gpt):
    """Its own loop does something before one block, or takes a block twice."""

    def __init__(self, form: str) -> None:
        super().__init__(layers=BLOCKS)
        self.form = form

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            if self.form == "shift" and i == 3:
                x = x + 0.1 * x.softmax(1)
            x = block(x)
            if self.form == "twice" and i == 4:
                x = block(x)
            if self.form == "scaled":
                x = x * 0.5
        return self.head(self.norm(x))


@pytest.mark.parametrize(("form", "complete"), [("shift", True), ("twice", True), ("scaled", False), ("", False)])
def test_a_stack_whose_loop_goes_by_index_is_kept_complete(form: str, complete: bool) -> None:
    assert kept(Loop(form)) == (set(range(BLOCKS)) if complete else {0, 1})
    assert layers_with_every_kind(Loop(form)) == (BLOCKS if complete else 2)


def test_what_the_loop_does_at_an_index_is_found() -> None:
    found = check(Loop("shift"), gpt_plan(sequence=True), Mesh(tp=2), seq_len=16)
    assert "CR413" in {f.code for f in found}
    assert check(Loop("scaled"), gpt_plan(sequence=True), Mesh(tp=2), seq_len=16) == []


def test_a_model_that_does_not_run_tells_nothing() -> None:
    assert trace_blocks(Loop(""), lambda copy: example_inputs(nn.Sequential(nn.Linear(3, 3)), 1, 4)) == BlockTraces()
