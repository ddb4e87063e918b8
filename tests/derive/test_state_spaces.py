"""State-space models: a layer's step, input and output are sums over all channels that each channel then uses."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.derive.derivation import derive
from colrow.verifying.verify import parity

D, STATES = 8, 3


class SelectiveScan(nn.Module):
    """A Mamba layer in plain code, with its norm and its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = 2 * D
        self.norm, self.into = nn.LayerNorm(D), nn.Linear(D, 2 * self.inner)
        self.conv = nn.Conv1d(self.inner, self.inner, 2, padding=1, groups=self.inner)
        self.select, self.step = nn.Linear(self.inner, 1 + 2 * STATES), nn.Linear(1, self.inner)
        self.decay, self.skip = nn.Parameter(torch.rand(self.inner, STATES)), nn.Parameter(torch.rand(self.inner))
        self.back = nn.Linear(self.inner, D)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.into(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        step, write, read = self.select(u).split([1, STATES, STATES], -1)
        step = F.softplus(self.step(step))
        state = torch.zeros(x.shape[0], self.inner, STATES, dtype=x.dtype)
        out = []
        for t in range(x.shape[1]):
            kept = torch.exp(-step[:, t, :, None] * self.decay)
            state = kept * state + (step * u)[:, t, :, None] * write[:, t, None]
            out.append((state * read[:, t, None]).sum(-1))
        return x + self.back((torch.stack(out, 1) + u * self.skip) * F.silu(gate))


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
