"""A branch on a clock, or on what the system draws, cannot be proved; what is read for a log can."""

from __future__ import annotations

import datetime
import os
import random
import secrets
import time
import uuid
from collections.abc import Callable
from time import monotonic

import numpy as np
import pytest
import torch
from torch import Tensor

from colrow.sharding.parameter_state import copied_model
from colrow.verifying.clocks import Clocks
from colrow.verifying.operators_run import decides_alone
from colrow.verifying.step import Task, reference_step
from colrow.verifying.verify import verify
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan


class Timed(m.MLP):
    """A softmax where a clock says so."""

    def __init__(self, decide: Callable[[Timed], bool]) -> None:
        super().__init__()
        self.decide, self.start, self.last = decide, monotonic(), 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h.softmax(-1) if self.decide(self) else h)


def logs(own: Timed) -> bool:
    """Prints seldom, and keeps when."""
    if time.time() - own.last > 60:
        own.last = time.time()
    return False


DECIDE = {
    "after": lambda own: monotonic() - own.start > 600,
    "since": lambda own: time.perf_counter() - own.start > 3.5e9,
    "seldom": lambda own: time.time() % 3600 < 1,
    "of the hour": lambda own: datetime.datetime.now().hour == 3,
    "nanoseconds": lambda own: time.time_ns() % 1000 == 7,
    "by text": lambda own: time.strftime("%a") == "Sun",
}


DRAW = {
    "randbelow": lambda own: secrets.randbelow(1000) == 700,
    "urandom": lambda own: os.urandom(1)[0] < 2,
    "system": lambda own: RANDOM.random() > 0.995,
    "uuid": lambda own: uuid.uuid4().int % 16 == 3,
    "generator without a seed": lambda own: np.random.default_rng().random() < 0.01,
    "random without a seed": lambda own: random.Random().random() < 0.05,
    "process": lambda own: os.getpid() % 16 == 5,
    "torch's seed": lambda own: torch.seed() % 16 == 3,
    "what torch draws behind it": lambda own: torch.seed() >= 0 and torch.rand(()).item() < 0.05,
}
RANDOM = random.SystemRandom()


def decides(mlp: m.MLP) -> bool:
    task = Task(mlp, (torch.randn(1, 2, m.D),), lambda output, inputs: output.square().sum(), 2)
    return decides_alone(task, reference_step(task, copied_model(mlp)).clocks)


@pytest.mark.parametrize("name", ["randbelow", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in DRAW)])
def test_what_the_system_draws(name: str) -> None:
    assert decides(Timed(DRAW[name]))


def test_what_the_system_draws_for_a_log() -> None:
    assert not decides(Timed(lambda own: uuid.uuid4().hex == "" or secrets.token_hex() == ""))
    assert len({uuid.uuid4() for _ in range(4)}) == 4  # others' draws stay the system's


@pytest.mark.parametrize("name", ["seldom", *(pytest.param(k, marks=pytest.mark.exhaustive) for k in DECIDE)])
def test_what_a_clock_decides(name: str) -> None:
    assert decides(Timed(DECIDE[name]))


def test_what_is_read_for_a_log() -> None:
    mlp = Timed(logs)
    assert not decides(mlp)
    with Clocks(mlp) as clocks:
        mlp(torch.randn(1, 2, m.D))
    assert clocks.read == {"time.time"}
    assert isinstance(datetime.datetime.now(), datetime.datetime)


@pytest.mark.exhaustive
def test_a_plan_that_cannot_be_proved() -> None:
    found = verify(m.Gpt(mlp=lambda: Timed(DECIDE["after"]), layers=1), gpt_plan(), 2, backend="local")
    assert found.verdict == "inconclusive"
    assert found.failure.startswith(
        "what the model computes depends on time.monotonic, which each rank reads for itself"
    )
    assert verify(m.Gpt(mlp=lambda: Timed(logs), layers=1), gpt_plan(), 2, backend="local").ok
