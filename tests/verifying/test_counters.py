"""What a model computes after a number of forwards is compared too."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.verifying.counters import Counts, Course, Kept, TensorsRecord, courses, recording, set_counts
from colrow.verifying.report import Report
from colrow.verifying.verify import verify
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan


class Counting(m.MLP):
    """A softmax over a rank's features where `wrong` says so of the count; it counts in an attribute or in a buffer."""

    calls: Any

    def __init__(self, wrong: Callable[[int], bool], kept: str = "attribute") -> None:
        super().__init__()
        self.wrong = wrong
        if kept == "buffer":
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        else:
            self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        calls = self.calls.item() if isinstance(self.calls, Tensor) else self.calls
        h = self.up(x)
        return self.down(h.softmax(-1) if self.wrong(calls) else h)


def judged(mlp: m.MLP) -> Report:
    torch.manual_seed(0)
    return verify(m.Gpt(mlp=lambda: mlp, layers=1), gpt_plan(), 2, backend="local")


@pytest.mark.parametrize(
    ("wrong", "kept", "seen_at"),
    [
        pytest.param(lambda n: n > 1000, "attribute", "counters at 1000", marks=pytest.mark.exhaustive),
        pytest.param(lambda n: n > 1000, "buffer", "counters at 1000", marks=pytest.mark.exhaustive),
        pytest.param(lambda n: n % 7 == 4, "attribute", "counters at 3", marks=pytest.mark.exhaustive),
        pytest.param(lambda n: n / 50 > 12000.5, "attribute", "counters at 1000000", marks=pytest.mark.exhaustive),
    ],
    ids=["after", "after-buffer", "every", "far"],
)
def test_a_branch_after_many_forwards(wrong: Callable[[int], bool], kept: str, seen_at: str) -> None:
    found = judged(Counting(wrong, kept))
    assert found.verdict == "wrong"
    assert found.cause.startswith(f"with {seen_at}: ")


class Selecting(Counting):
    """Computes both, and takes one of them by a tensor: the same operators run at every count."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h, wrong = self.up(x), (self.calls > 1000) & (self.calls < 2000)
        return self.down(torch.where(wrong, h.softmax(-1), h))


@pytest.mark.exhaustive
def test_a_count_selects_by_a_tensor() -> None:
    assert judged(Selecting(lambda n: False, "buffer")).cause.startswith("with counters at 1000: ")


class CountingFromItsClass(Counting):
    calls = 0

    def __init__(self, wrong: Callable[[int], bool], kept: str) -> None:
        super().__init__(wrong)
        del self.calls  # the class has one, until the first forward adds to it


@pytest.mark.parametrize("kept", ["attribute", "class", "buffer"])
def test_the_numbers_that_a_counter_meets(kept: str) -> None:
    counting = CountingFromItsClass if kept == "class" else Counting
    model = counting(lambda n: n * 0.001 > 1 or n % 7 == 4, kept)
    x = torch.randn(1, 2, m.D)

    def forward() -> Counts:
        model(x)
        return Kept.of(model).counts

    found = courses(Kept.of(model).counts, forward(), forward())
    assert found == {("", "calls"): Course(1)}
    met = set[float]()
    set_counts(model, {("", "calls"): recording(2, met)})
    with TensorsRecord(met):
        model(x)
    assert {1000, 7, 4} <= met


def test_what_no_counter_is() -> None:
    """A number that stays, and one that changes by what a batch holds."""
    first, second, third = ({("", "size"): 4, ("", "norm"): norm} for norm in (0.0, 3.5, 2.9))
    assert courses(first, second, third) == {}
    halved = [{("", "rate"): 2.0**-i} for i in range(3)]
    assert courses(*halved) == {("", "rate"): Course(0.5, is_factor=True)}


class Cooling(m.MLP):
    """A temperature that falls with each forward; below `limit` a rank's features get a softmax."""

    def __init__(self, limit: float, by: float = 0.9) -> None:
        super().__init__()
        self.state, self.limit, self.by = {"temperature": 1.0}, limit, by

    def forward(self, x: Tensor) -> Tensor:
        self.state["temperature"] *= self.by
        h = self.up(x)
        return self.down(h.softmax(-1) if self.state["temperature"] < self.limit else h)


@pytest.mark.exhaustive
def test_a_branch_of_a_falling_temperature() -> None:
    assert judged(Cooling(0.2)).cause.startswith("with counters at 0.2: ")
    assert judged(Cooling(0.2, by=1.0)).ok  # the control: it never falls


class Warm(Counting):
    """Grows a factor over a hundred forwards: right on any shard."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.down(self.up(x) * min(1.0, self.calls / 100))


@pytest.mark.exhaustive
def test_what_is_right_at_every_count_stays_proved() -> None:
    found = judged(Warm(lambda n: False))
    assert found.ok
    assert found.values == ("counters at 1000000",)


@pytest.mark.exhaustive
def test_a_model_that_counts_nothing_costs_no_more() -> None:
    assert judged(m.MLP()).values == ()


class Remembering(m.MLP):
    """Adds what it saw before; a softmax over a rank's features once `at` are kept."""

    def __init__(self, at: int, kept: Callable[[Any, Tensor], Any], most: int = 100) -> None:
        super().__init__()
        self.history, self.at, self.kept, self.most = None, at, kept, most

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.history is None or len(self.history) < self.most:
            self.history = self.kept(self.history, h.detach())
        return self.down(h.softmax(-1) if len(self.history) >= self.at else h)


def in_list(history: Any, h: Tensor) -> Any:
    return [*(history or ()), h]


def in_tensor(history: Any, h: Tensor) -> Any:
    return h[:1] if history is None else torch.cat([history, h[:1]])


@pytest.mark.parametrize(
    ("kept", "at", "seen_at"),
    [(in_list, 4, 3), pytest.param(in_tensor, 8, 7, marks=pytest.mark.exhaustive)],
    ids=["list", "tensor"],
)
def test_a_branch_of_a_long_history(kept: Callable[[Any, Tensor], Any], at: int, seen_at: int) -> None:
    found = judged(Remembering(at, kept))
    assert found.verdict == "wrong"
    assert found.cause.startswith(f"with {seen_at} forwards before: ")


@pytest.mark.exhaustive
def test_a_history_that_does_not_grow_costs_no_more() -> None:
    assert judged(Remembering(4, in_list, most=1)).values == ()
    assert judged(Remembering(1000, in_list)).values == ()
    assert len(judged(Remembering(1000, in_tensor)).values) == 4


class Informed(m.MLP):
    """A loop gives it the step; after a thousand a rank's features get a softmax."""

    def __init__(self, *, known: bool = True) -> None:
        super().__init__()
        self.step, self.known = 0, known

    def on_step(self, step: int) -> None:
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h.softmax(-1) if self.step > 1000 and self.known else h)


@pytest.mark.exhaustive
def test_a_branch_of_a_number_that_other_code_sets() -> None:
    assert judged(Informed()).cause.startswith("with step at 1001: ")
    assert judged(Informed(known=False)).ok


@pytest.mark.exhaustive
def test_a_branch_of_what_is_computed_of_a_count() -> None:
    """No number of it meets the counter itself."""
    assert judged(Counting(lambda n: math.log2(n) == 6)).cause.startswith("with counters at 63: ")
