"""What is wrong with other values than those of one batch: a limit that is not reached, a branch that is not taken."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from colrow.verifying.report import Report
from colrow.verifying.verify import verify
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan
from helpers.unproven_models import FeatureMLP, on_stream

LIMIT = 500.0


def judged(mlp: nn.Module, vary: bool = True) -> Report:
    torch.manual_seed(0)
    return verify(m.Gpt(mlp=lambda: mlp, layers=1), gpt_plan(), 2, backend="local", vary=vary)


def clipped(h: Tensor, dim: int) -> Tensor:
    return h * (LIMIT / h.norm(dim=dim, keepdim=True)).clamp(max=1.0)


def test_a_limit_that_one_batch_does_not_reach() -> None:
    assert judged(FeatureMLP(lambda h: clipped(h, -1)), vary=False).ok  # the control: one batch shows nothing
    found = judged(FeatureMLP(lambda h: clipped(h, -1)))
    assert found.verdict == "wrong"
    assert found.cause.startswith("with large weights: ")
    assert found.max_grad_rel_err > 1e-3


@pytest.mark.exhaustive
def test_casts_to_single_precision_are_no_hindrance() -> None:
    cast = judged(FeatureMLP(lambda h: clipped(h.float(), -1).to(h.dtype)))
    assert (cast.tolerance, cast.verdict) == (1e-5, "wrong")
    assert cast.values == ("large weights",)


class Idle(m.MLP):
    """Adds one to tokens whose features are all small."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(torch.where(h.abs().amax(-1, keepdim=True) < 1e-3, h + 1, h))


@pytest.mark.exhaustive
def test_a_branch_for_small_values() -> None:
    assert judged(Idle(), vary=False).ok
    found = judged(Idle())
    assert found.verdict == "wrong"
    assert found.cause.startswith("with small weights and padding: ")


class Gate(nn.Module):
    """A gate of all that it sees, which is 1 unless the numbers are small."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(100 * x.square().sum())


class BiasedGate(nn.Module):
    """Likewise, of numbers of which a vector makes a large sum."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tanh(100 * (x + self.bias).square().sum())


@pytest.mark.parametrize("gate", [Gate, BiasedGate])
def test_a_gate_that_is_open_unless_all_parameters_are_small(gate: type[nn.Module]) -> None:
    case = on_stream(gate, sequence=True)
    torch.manual_seed(0)
    found = [verify(case.model(), case.plan(), 2, backend="local", vary=vary) for vary in (False, True)]
    assert found[0].ok  # the control
    assert found[1].verdict == "wrong"
    assert found[1].cause.startswith("with small parameters: ")


def test_what_is_right_with_all_values_stays_proved() -> None:
    assert judged(FeatureMLP(lambda h: clipped(h, 1))).ok  # of each feature, over tokens


def test_rounding_that_large_weights_amplify_is_no_error() -> None:
    """The fourth power of large features is an angle whose last digits are noise."""
    assert judged(FeatureMLP(lambda h: torch.sin(h**4))).ok
