"""What code caches while it runs on fake tensors does not reach a run with numbers."""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from functools import lru_cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.checking.check import check
from colrow.dryrun.code_caches import caches_forgotten, caches_of_one_call
from colrow.mesh import Mesh
from colrow.plans.plan import Plan
from colrow.torch_compat import fake_tensors, is_fake
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan

SCALES: dict[int, Tensor] = {}
SHIFT: Tensor | None = None
TABLES: dict[str, Any] = {}


@lru_cache
def rises(tokens: int) -> Tensor:
    return torch.linspace(0.5, 1.0, tokens)[:, None]


def scale(tokens: int) -> Tensor:
    if tokens not in SCALES:
        SCALES[tokens] = torch.full((tokens, 1), 2.0)
    return SCALES[tokens]


def shift(tokens: int) -> Tensor:
    global SHIFT
    if SHIFT is None:
        SHIFT = torch.zeros(tokens, 1)
    return SHIFT


class Cached(m.MLP):
    def forward(self, x: Tensor) -> Tensor:
        rising, scaled, shifted = self.made(x.shape[1])
        return self.down(F.gelu(self.up(x)) * rising * scaled + shifted)

    def made(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        return rises(tokens), scale(tokens), shift(tokens)


class Noting(Cached):
    def made(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        self.tables = super().made(tokens)
        return self.tables


class Uncached(Cached):
    def made(self, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        return rises.__wrapped__(tokens), torch.full((tokens, 1), 2.0), torch.zeros(tokens, 1)


def test_a_checked_model_runs_with_numbers() -> None:
    model = m.Gpt(mlp=Cached, layers=1)
    assert check(model, gpt_plan(), Mesh(tp=2), 2, 16) == []
    assert not is_fake(model(torch.zeros(2, 16, dtype=torch.long)))
    assert not is_fake(rises(16))
    assert not is_fake(SCALES[16])
    assert not is_fake(SHIFT)


def test_what_has_values_is_kept() -> None:
    real = scale(4)
    with caches_forgotten(Cached()), fake_tensors():
        assert is_fake(rises(8))
        assert is_fake(scale(8))
    assert SCALES[4] is real
    assert 8 not in SCALES
    assert not is_fake(rises(8))


def test_each_call_of_a_module_makes_its_own_in_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What two blocks take from a cache ties them together; a derivation splits neither then."""
    monkeypatch.setattr(sys.modules[__name__], "SHIFT", None)
    block, x = Noting(), torch.zeros(2, 12, m.D)

    def tables() -> tuple[Tensor, ...]:
        block(x)
        return block.tables

    with caches_forgotten(block), fake_tensors():
        assert all(a is b for a, b in zip(tables(), tables(), strict=True))
        with caches_of_one_call(block):
            assert not any(a is b for a, b in zip(tables(), tables(), strict=True))
    assert SHIFT is None


@pytest.mark.parametrize(
    "kind", [tuple, list, deque, lambda held: OrderedDict(enumerate(held)), lambda held: [[*held]]]
)
def test_what_lies_in_a_container_is_forgotten_with_it(kind: Any) -> None:
    with caches_forgotten(Cached()), fake_tensors():
        TABLES.update(made=kind([torch.zeros(2)]), numbers=kind([2]))
    assert {"numbers": kind([2])} == TABLES
    TABLES.clear()


@pytest.mark.exhaustive
def test_blocks_with_a_common_cache_are_split_as_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SHIFT", None)
    plans = [Plan.derive(m.Gpt(mlp=mlp), tp=2) for mlp in (Cached, Uncached)]
    assert plans[0].modules == plans[1].modules


def test_without_it_they_stay_fake() -> None:
    with fake_tensors():
        rises(6)
    assert is_fake(rises(6))
    rises.cache_clear()
