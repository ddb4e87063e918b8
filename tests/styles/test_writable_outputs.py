"""A model may write into what a style returns to it: activations in place."""

from __future__ import annotations

import torch
from torch import nn

from colrow.plans.plan import Plan
from colrow.verifying.verify import verify


def test_an_activation_in_place_behind_columns() -> None:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(inplace=True), nn.Linear(64, 16), nn.Tanh())
    plan = Plan(modules={"0": "colwise", "2": "rowwise"})
    report = verify(model, plan, 2, inputs=(torch.randn(3, 8, 16),))
    assert report.verdict == "proved", report.failure
