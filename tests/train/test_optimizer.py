from __future__ import annotations

import pytest
import torch
from torch import nn

from colrow.config_sections import TrainSection
from colrow.train.optimizer import build_optimizer, set_learning_rate

SECTION = TrainSection(steps=1, global_batch=1, micro_batch=1, lr=0.5, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-6)


def test_what_decays_is_a_group_and_frozen_parameters_stay_out() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))
    model[2].weight.requires_grad_(False)
    groups = build_optimizer(model.parameters(), SECTION, {model[0].weight}).param_groups
    found = {group["weight_decay"]: {id(param) for param in group["params"]} for group in groups}
    assert found == {0.1: {id(model[0].weight)}, 0.0: {id(model[0].bias), id(model[1].weight), id(model[1].bias)}}
    assert all(group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 for group in groups)


@pytest.mark.parametrize("rate_is_a_tensor", [False, True])
def test_a_step_is_adamw_with_decoupled_decay(rate_is_a_tensor: bool) -> None:
    """The first step by hand: m/sqrt(v) is the gradient's sign, the decay is lr × weight_decay × w."""
    weight = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer([weight], SECTION.model_copy(update={"cuda_graph": rate_is_a_tensor}), {weight})
    rate = optimizer.param_groups[0]["lr"]
    assert isinstance(rate, torch.Tensor) == rate_is_a_tensor
    set_learning_rate(optimizer, 0.25)
    assert (optimizer.param_groups[0]["lr"] is rate) == rate_is_a_tensor  # a graph reads it where it lies
    weight.grad = torch.tensor([[3.0, -5.0]])
    optimizer.step()
    want = torch.tensor([[1.0, -2.0]]) * (1 - 0.25 * 0.1) - 0.25 * torch.tensor([[1.0, -1.0]])
    torch.testing.assert_close(weight.detach(), want, rtol=1e-5, atol=1e-6)
