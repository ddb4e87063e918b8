"""What code counts outside of its model is found, set on both models, and given back."""

from __future__ import annotations

import functools
import itertools
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from colrow.sharding.parameter_state import copied_model
from colrow.verifying.counters import Counts, Course, Kept, courses, set_counts
from colrow.verifying.kept_values import kept_values_restored, replay_all_iterators
from colrow.verifying.report import Report
from colrow.verifying.verify import verify
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan

CALLS, TABLE, OBJECT, ITERATOR, TENSOR = 0, {"run": [0]}, SimpleNamespace(calls=0), itertools.count(), torch.zeros(())
LOCAL, VARIABLE, ARRAY, GENERATOR = (
    threading.local(),
    ContextVar("calls", default=0),
    np.zeros(1),
    (n for n in itertools.count()),
)
LOCAL.calls = 0


class Registry:
    calls = 0


class Slots:
    __slots__ = ("calls",)


class Pair(NamedTuple):
    calls: int
    other: int


ELEMENTS, SLOTS, PAIR = torch.zeros(2, 2).flatten(), Slots(), Pair(0, 5)
SLOTS.calls = 0


def in_global() -> Any:
    global CALLS
    CALLS += 1
    return CALLS


def in_table() -> Any:
    TABLE["run"][0] += 1
    return TABLE["run"][0]


def in_object() -> Any:
    OBJECT.calls += 1
    return OBJECT.calls


def in_other_class() -> Any:
    Registry.calls += 1
    return Registry.calls


def in_function() -> Any:
    in_function.calls = getattr(in_function, "calls", 0) + 1  # type: ignore[attr-defined]
    return in_function.calls  # type: ignore[attr-defined]


def in_default(counted: list[int] = [0]) -> Any:  # noqa: B006
    counted[0] += 1
    return counted[0]


def in_iterator() -> Any:
    return next(ITERATOR) + 1


def in_tensor() -> Any:
    TENSOR.add_(1)
    return TENSOR.item()


def in_thread_local() -> Any:
    LOCAL.calls += 1
    return LOCAL.calls


def in_context_variable() -> Any:
    VARIABLE.set(VARIABLE.get() + 1)
    return VARIABLE.get()


def in_array() -> Any:
    ARRAY[:] += 1
    return ARRAY[0]


def in_elements() -> Any:
    ELEMENTS[1] += 1
    return ELEMENTS[1].item()


def in_slots() -> Any:
    SLOTS.calls += 1
    return SLOTS.calls


def in_tuple() -> Any:
    global PAIR
    PAIR = PAIR._replace(calls=PAIR.calls + 1)
    return PAIR.calls


def in_environment() -> Any:
    os.environ["COLROW_TEST_CALLS"] = str(int(os.environ.get("COLROW_TEST_CALLS", "0")) + 1)
    return int(os.environ["COLROW_TEST_CALLS"])


def in_generator() -> Any:
    return next(GENERATOR) + 1


def _closing() -> Callable[[], Any]:
    calls = 0

    def count() -> Any:
        nonlocal calls
        calls += 1
        return calls

    return count


in_closure = _closing()
PLACES = [in_global, in_table, in_object, in_other_class, in_function, in_default, in_iterator, in_tensor, in_closure]
PLACES += [
    in_thread_local,
    in_context_variable,
    in_array,
    in_generator,
    in_environment,
    in_elements,
    in_slots,
    in_tuple,
]


def counted(count: Callable[[], Any]) -> Callable[[Any], Any]:
    """A decorator, as users write them: the counter is behind what it closes over."""

    def decorate(forward: Any) -> Any:
        @functools.wraps(forward)
        def run(self: Any, x: Tensor) -> Any:
            return forward(self, x, count())

        return run

    return decorate


def counting(count: Callable[[], Any], wrong: Callable[[int], bool]) -> m.MLP:
    """A softmax over a rank's features where `wrong` says so of the count."""

    class Counting(m.MLP):
        @counted(count)
        def forward(self, x: Tensor, calls: int) -> Tensor:
            h = self.up(x)
            return self.down(h.softmax(-1) if wrong(calls) else h * min(1.0, calls / 4))

    return Counting()


def judged(mlp: m.MLP) -> Report:
    torch.manual_seed(0)
    return verify(m.Gpt(mlp=lambda: mlp, layers=1), gpt_plan(), 2, backend="local")


@pytest.mark.parametrize("count", PLACES, ids=lambda count: count.__qualname__)
def test_a_counter_is_found_set_and_given_back(count: Callable[[], Any]) -> None:
    model, x = counting(count, lambda n: False), torch.randn(1, 2, m.D)
    replay_all_iterators(model)
    before = Kept.of(model).counts
    with kept_values_restored(model):
        seen = list[Counts]()
        for _ in range(3):
            model(x)
            seen.append(Kept.of(model).counts)
        found = courses(*seen)
        assert list(found.values()) == [Course(1)]
        set_counts(copied_model(model), dict.fromkeys(found, 41))
        assert count() in (42, 42.0)
    assert Kept.of(model).counts == before


class Frozen(dict[str, float]):
    def clear(self) -> None:
        raise TypeError("it is frozen")


OPTIONS = Frozen(scale=2.0)


class Configured(m.MLP):
    """Reads a mapping that cannot be changed, as packages make them for their decorators."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * OPTIONS["scale"]


def test_what_cannot_be_changed_is_left_alone() -> None:
    with kept_values_restored(Configured()):
        Configured()(torch.randn(1, 2, m.D))
    assert OPTIONS == {"scale": 2.0}


def test_what_forward_adds_to_the_environment_is_gone_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLROW_TEST_CALLS", raising=False)
    with kept_values_restored(m.MLP()):
        in_environment()
    assert "COLROW_TEST_CALLS" not in os.environ


@pytest.mark.parametrize(
    "count",
    [in_global, *(pytest.param(count, marks=pytest.mark.exhaustive) for count in PLACES[1:])],
    ids=lambda count: count.__qualname__,
)
def test_a_branch_of_what_is_counted_outside(count: Callable[[], Any]) -> None:
    before = count()
    found = judged(counting(count, lambda n: n > 1000))
    assert found.verdict == "wrong"
    assert found.cause.startswith("with counters at 1000: ")
    assert count() == before + 1


@pytest.mark.exhaustive
@pytest.mark.parametrize("count", PLACES, ids=lambda count: count.__qualname__)
def test_what_is_right_at_every_count_stays_proved(count: Callable[[], Any]) -> None:
    """Both models are compared at the same counts: a factor grows over the first calls."""
    assert judged(counting(count, lambda n: False)).ok


class Scheduled(m.MLP):
    """A softmax over a rank's features where its schedule says so."""

    def __init__(self, schedule: Iterator[Any]) -> None:
        super().__init__()
        self.schedule = schedule

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h.softmax(-1) if next(self.schedule) else h)


def seldom(at: int) -> Iterator[bool]:
    for i in itertools.count():
        yield i == at


@pytest.mark.parametrize(
    "make", [seldom, pytest.param(lambda at: iter([*([0] * at), 1, *([0] * 900)]), marks=pytest.mark.exhaustive)]
)
def test_an_item_that_an_iterator_seldom_gives(make: Callable[[int], Iterator[Any]]) -> None:
    assert judged(Scheduled(make(99))).cause.startswith("with schedule 99 items later: ")


def test_copies_of_a_model_take_the_same_items() -> None:
    model = Scheduled(seldom(2))
    copied = copied_model(model)
    assert [next(copied.schedule) for _ in range(3)] == [next(model.schedule) for _ in range(3)] == [False, False, True]
    assert next(copied_model(copied).schedule) is next(pickle.loads(pickle.dumps(copied.schedule))) is False


@pytest.mark.exhaustive
def test_an_iterator_that_gives_no_such_item_stays_proved() -> None:
    assert judged(Scheduled(seldom(10_000_000))).ok


def test_what_a_user_sets_on_a_module_of_torch_is_kept() -> None:
    model: Any = m.MLP()
    model.up.calls = 3
    assert Kept.of(model).counts == {("up", "calls"): 3}


class Locked:
    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0


def test_what_cannot_be_copied_is_shared_and_what_is_beside_it_is_not() -> None:
    model: Any = m.MLP()
    model.held = Locked()
    copied: Any = copied_model(model)
    copied.held.calls += 1
    assert copied.held.lock is model.held.lock
    assert model.held.calls == 0


class Lazy:
    """Has no length yet."""

    def __len__(self) -> int:
        raise RuntimeError("not loaded")


def test_what_has_no_value_is_no_counter() -> None:
    model: Any = m.MLP()
    model.data, model.table, model.done, model.history = Lazy(), torch.zeros((), device="meta"), False, [1.0, 2.0]
    found = Kept.of(model)
    with kept_values_restored(model):
        assert found.counts == {("", "history", "0"): 1.0, ("", "history", "1"): 2.0}
    assert found.sizes[("", "history")] == 2


def backward_calls(wrong: Callable[[int], bool]) -> m.MLP:
    """Counts in backward; then the gradient gets a softmax over a rank's features."""

    class Counted(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            Counted.calls += 1
            return grads[0].softmax(-1) if wrong(Counted.calls) else grads[0]

    class Counting(m.MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(Counted.apply(self.up(x)))

    return Counting()


@pytest.mark.exhaustive
def test_a_branch_of_what_backward_counts() -> None:
    assert judged(backward_calls(lambda n: 500 < n < 600)).cause.startswith("with counters at 500: ")


@pytest.mark.exhaustive
def test_what_backward_counts_stays_proved() -> None:
    assert judged(backward_calls(lambda n: False)).ok
