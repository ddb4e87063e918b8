"""What code caches while it runs on fake tensors does not reach a run with numbers."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.checking.check import check
from colrow.dryrun.code_caches import caches_forgotten
from colrow.mesh import Mesh
from colrow.torch_compat import fake_tensors, is_fake
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan

SCALES: dict[int, Tensor] = {}


@lru_cache
def rises(tokens: int) -> Tensor:
    return torch.linspace(0.5, 1.0, tokens)[:, None]


def scale(tokens: int) -> Tensor:
    if tokens not in SCALES:
        SCALES[tokens] = torch.full((tokens, 1), 2.0)
    return SCALES[tokens]


class Cached(m.MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)) * rises(x.shape[1]) * scale(x.shape[1]))


def test_a_checked_model_runs_with_numbers() -> None:
    model = m.Gpt(mlp=Cached, layers=1)
    assert check(model, gpt_plan(), Mesh(tp=2), 2, 16) == []
    assert not is_fake(model(torch.zeros(2, 16, dtype=torch.long)))
    assert not is_fake(rises(16))
    assert not is_fake(SCALES[16])


def test_what_has_values_is_kept() -> None:
    real = scale(4)
    with caches_forgotten(Cached()), fake_tensors():
        assert is_fake(rises(8))
        assert is_fake(scale(8))
    assert SCALES[4] is real
    assert 8 not in SCALES
    assert not is_fake(rises(8))


def test_without_it_they_stay_fake() -> None:
    with fake_tensors():
        rises(6)
    assert is_fake(rises(6))
    rises.cache_clear()
