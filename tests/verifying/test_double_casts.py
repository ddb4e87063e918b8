"""Code that casts its inputs to fp32 is compared in fp64: there a gradient that is zero by mathematics is no noise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from colrow.errors import PlanError
from colrow.plans.plan import Plan
from colrow.verifying.double_casts import DoubleCasts
from colrow.verifying.verify import EXACT, verify


class Casting(nn.Module):
    """A table's columns, cast as recommenders do; the bias in front of the batch norm has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x.float())).relu())


def test_a_model_that_casts_to_fp32_is_proved_in_fp64() -> None:
    rows = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0)
    plan = Plan(modules={"up": "colwise", "norm": {"style": "local_shards", "shards": rows}, "down": "rowwise"})
    report = verify(Casting(), plan, 2, inputs=(torch.randn(16, 4),), backend="local")
    assert (report.verdict, report.tolerance) == ("proved", EXACT)


def test_casts_and_made_tensors_are_fp64() -> None:
    x = torch.ones(2, dtype=torch.float64)
    with DoubleCasts():
        made = x.float(), x.to(torch.float32), x.to(dtype=torch.float32), torch.zeros(2, dtype=torch.float32)
        other = x.to(torch.bfloat16)
    assert {y.dtype for y in made} == {torch.float64}
    assert other.dtype == torch.bfloat16


class Masking(nn.Module):
    """Hides nothing: zeros times the smallest number. Of fp64 that is no fp32 number, and 0 times it is nan."""

    def __init__(self, hidden: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.hidden = nn.Linear(4, 8), nn.Linear(8, 3), hidden

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((3,), self.hidden, dtype=torch.float32) * torch.finfo(x.dtype).min
        return self.down(self.up(x).relu()) + mask


def test_a_loss_that_is_no_number_in_fp64_alone_is_no_error_of_the_plan() -> None:
    plan, rows = Plan(modules={"up": "colwise", "down": "rowwise"}), (torch.randn(16, 4),)
    assert verify(Masking(), plan, 2, inputs=rows, backend="local").verdict == "proved"
    broken = Plan(modules={"up": "colwise"})
    assert verify(Masking(), broken, 2, inputs=rows, backend="local").verdict == "wrong"
    with pytest.raises(PlanError, match="the loss of the unsharded Masking is"):
        verify(Masking(float("inf")), plan, 2, inputs=rows, backend="local")
