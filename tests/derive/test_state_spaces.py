"""State-space models: a layer's step, input and output are sums over all channels that each channel then uses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from colrow.derive.derivation import derive
from colrow.verifying.verify import parity
from helpers.split_models import D, SelectiveScan


def test_channels_are_split_around_a_sum_that_each_of_them_uses() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, D), SelectiveScan(), nn.Linear(D, 5)).double()
    inputs = (torch.randn(2, 2, 3, dtype=torch.float64),)
    found = derive(model, 2, inputs=inputs)
    assert {
        f"1.{name}" for name in ("into.weight", "conv.weight", "select.weight", "step.weight", "decay", "skip")
    } <= {*found.sharded}
    plan = found.plan()
    assert parity(model, plan, 2, inputs).worst < 1e-9
    select = replace(plan.modules["1.select"], used_inside=False)  # its gradient stays that of a rank's channels
    broken = replace(plan, modules={**plan.modules, "1.select": select})
    errors = parity(model, broken, 2, inputs)
    assert errors.loss < 1e-9
    assert errors.gradients["1.select.weight"] > 1e-3
