"""Code that casts its inputs to fp32 is compared in fp64: there a gradient that is zero by mathematics is no noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
