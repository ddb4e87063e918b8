"""The gradient's norm keeps its digits, whatever the size of a shard."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from colrow.sharding.grad_norm import grad_norm


def test_the_norm_of_a_million_fp32_entries_is_that_of_fp64() -> None:
    param = nn.Parameter(torch.zeros(1024, 1024))
    param.grad = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)) * 1e-3
    param.grad[:512] *= 1e-2
    truth = param.grad.double().norm()
    assert abs(grad_norm([param]) / truth - 1) < 5e-7
    one_by_one = np.cumsum(param.grad.flatten().square().numpy(), dtype=np.float32)[-1] ** 0.5
    assert abs(float(one_by_one) / truth - 1) > 1e-6  # the control: adding them up in fp32 loses digits


def test_without_a_gradient_the_norm_is_zero_on_the_parameters_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # a run on CPUs of a host with GPUs
    norm = grad_norm([nn.Parameter(torch.zeros(2, dtype=torch.float64))])
    assert (norm.item(), norm.device.type, norm.dtype) == (0.0, "cpu", torch.float64)
