"""What a model computes where a random number decides so is compared too."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from colrow.sharding.parameter_state import copied_model
from colrow.verifying.host_draws import LEAST, MOST, HostDraws, places
from colrow.verifying.other_ways import other_ways
from colrow.verifying.report import Report
from colrow.verifying.step import Task, reference_step
from colrow.verifying.verify import verify
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan


class Deciding(m.MLP):
    """Seldom a softmax over a rank's features."""

    def __init__(self, decide: Callable[[], bool]) -> None:
        super().__init__()
        self.decide = decide

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h.softmax(-1) if self.decide() else h)


class Skipping(m.Block):
    """A layer that is left out half of the time."""

    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else super().forward(x)


def judged(model: m.Gpt) -> Report:
    torch.manual_seed(0)
    return verify(model, gpt_plan(), 2, backend="local")


@pytest.mark.parametrize(
    ("seldom", "seen_at"),
    [
        pytest.param(lambda: random.random() < 1e-4, "least", marks=pytest.mark.exhaustive),
        pytest.param(lambda: bool(np.random.uniform() > 0.9999), "most", marks=pytest.mark.exhaustive),
        pytest.param(lambda: random.choice(range(5000)) == 4999, "most", marks=pytest.mark.exhaustive),
        pytest.param(lambda: bool(torch.rand(1) < 1e-4), "least", marks=pytest.mark.exhaustive),
    ],
    ids=["python", "numpy", "choice", "torch"],
)
def test_a_branch_that_is_seldom_taken(seldom: Callable[[], bool], seen_at: str) -> None:
    found = judged(m.Gpt(mlp=lambda: Deciding(seldom), layers=1))
    assert found.verdict == "wrong"
    assert found.cause.startswith(f"with random numbers at their {seen_at}: ")


@pytest.mark.exhaustive
def test_layers_that_chance_leaves_out_stay_proved() -> None:
    random.seed(3)
    before = random.getstate()
    found = judged(m.Gpt(block=Skipping))
    assert found.ok
    assert found.values == ("random numbers at their least", "random numbers at their most")
    assert random.getstate() == before


def test_the_first_draws_are_extreme() -> None:
    drawn = {}
    for extreme, at in (("least", LEAST), ("most", MOST), ("middle", 0.45)):
        with HostDraws(m.MLP(), 0, (at,)) as host:
            drawn[extreme] = (
                random.random(),
                float(np.random.rand()),
                random.choice(range(20)),
                int(np.random.randint(20)),
                torch.rand(1).item(),
                torch.randint(2, 9, (1,)).item(),
                torch.randint(9, ()).item(),
                torch.bernoulli(torch.tensor([0.5])).item(),
            )
        assert host.drew
    assert drawn["least"] == (0, 0, 0, 0, 0, 2, 0, 0)
    assert drawn["most"] == pytest.approx((1, 1, 19, 19, 1, 8, 8, 1))
    middle = (drawn["middle"][i] for i in (0, 1, 2, 4, 5, 6))
    assert tuple(middle) == pytest.approx((0.45, 0.45, 9, 0.45, 5, 4), abs=1e-3)
    with HostDraws(m.MLP(), 0) as host:
        torch.rand(2)  # of a tensor, not to decide
    assert not host.drew


def test_later_draws_stay_random() -> None:
    """Code that draws until a number fits ends."""
    with HostDraws(m.MLP(), 0, (LEAST,)) as host:
        first, many = random.random(), [random.random() for _ in range(200)]
        normal = random.normalvariate(0.0, 1.0), np.random.standard_normal()
    assert first == 0.0
    assert max(many) > 0.5
    assert all(abs(x) < 20 for x in normal)
    assert host.drew


def between(low: float, draw: Callable[[], float], high: float) -> Callable[[], bool]:
    return lambda: low < draw() < high


OWN = random.Random(3)
NUMPYS = np.random.default_rng(3)


@pytest.mark.parametrize(
    "seldom",
    [
        *(
            pytest.param(each, marks=pytest.mark.exhaustive)
            for each in (
                between(0.4, random.random, 0.41),
                between(0.4, lambda: torch.rand(()).item(), 0.41),
                between(0.4, np.random.rand, 0.41),
                between(0.4, OWN.random, 0.41),
                between(0.4, NUMPYS.random, 0.41),
                lambda: 4.2 < random.uniform(0, 10) < 4.25,
                lambda: random.randrange(1000) == 417,
                lambda: int(np.random.randint(1000)) == 417,
                lambda: random.random() > 0.9 and random.random() < 0.2,
                lambda: random.choice(["right"] * 5 + ["wrong"] + ["right"] * 5) == "wrong",
            )
        ),
    ],
)
def test_a_branch_of_the_middle(seldom: Callable[[], bool]) -> None:
    found = judged(m.Gpt(mlp=lambda: Deciding(seldom), layers=1))
    assert found.verdict == "wrong"
    assert found.cause.startswith("with random numbers ")
    assert "their" not in found.cause


def test_the_ways_that_are_compared() -> None:
    model = Deciding(between(0.4, random.random, 0.41))
    task = Task(model, (torch.randn(1, 2, m.D),), lambda output, inputs: output.square().sum(), 2)
    found = [other.name for other in other_ways(task, reference_step(task, copied_model(model)))]
    assert found == ["random numbers at their least", "random numbers at their most", "random numbers at 0.405"]


@pytest.mark.exhaustive
def test_what_is_drawn_without_a_branch_costs_no_more() -> None:
    found = judged(m.Gpt(mlp=lambda: Deciding(lambda: random.random() > 2), layers=1))
    assert found.ok
    assert found.values == ("random numbers at their least", "random numbers at their most")


def test_the_places_of_draws() -> None:
    """Between all numbers of the code, and where an integer is one of them."""
    found = places([0.4, 0.41, 417], [1000])
    assert any(0.4 < at < 0.41 for at in found)
    assert {417 + 0.5} <= {round(at * 1000, 6) for at in found}
