"""Which operators a model's code runs, to see whether it takes another way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

from torch import Tensor, nn

from colrow.dryrun.block_kinds import shape_or_value
from colrow.dryrun.calls import Inputs
from colrow.sharding.parameter_state import copied_model
from colrow.torch_compat import TorchDispatchMode, frames, path_in_torch, tree_leaves
from colrow.verifying.clocks import Clocks, SystemDraws, moments, system_draws
from colrow.verifying.counters import set_counts
from colrow.verifying.dropout import without_dropout
from colrow.verifying.host_draws import HostDraws
from colrow.verifying.kept_values import kept_values_restored, numbers_in_code
from colrow.verifying.step import Task, call

Operators = frozenset[tuple[tuple[Any, Hashable, Hashable], int]]
"""Each operator with its arguments and its place, numbered."""
_MOST_MET = 8
_COLROW = str(Path(__file__).parents[1])


class OperatorsRun(TorchDispatchMode):
    """Args:
    zeros: tell numbers, and tensors of one element, that are zero from those that are not: code may take another way
        by `where(calls > 1000, x, y)`, or by a factor that was zero.

    Attributes:
        found: each operator with its shapes and integers and the place in the code that called it, as often as it ran.
    """

    def __init__(self, *, zeros: bool = False) -> None:
        super().__init__()
        self.found = Counter[tuple[Any, Hashable, Hashable]]()
        self._argument = _zero_or_other if zeros else shape_or_value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = tuple(map(self._argument, tree_leaves((args, kwargs))))
        self.found[func, arguments, _place()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def operators(self) -> Operators:
        """Each as often as it ran."""
        return frozenset((operator, i) for operator, times in self.found.items() for i in range(times))


def _zero_or_other(leaf: Any) -> Hashable:
    is_number = isinstance(leaf, float) or (isinstance(leaf, Tensor) and leaf.numel() == 1 and not leaf.is_meta)
    return (shape_or_value(leaf), bool(leaf)) if is_number else shape_or_value(leaf)


def operators_run(task: Task) -> Operators:
    """Of a forward and backward of the unsharded model; each as often as it ran."""
    return operators_in_turn(task, 1)[0]


def operators_in_turn(task: Task, times: int) -> list[Operators]:
    """Of each of so many forwards and backwards of the unsharded model in turn."""
    found = []
    with unsharded(task) as model:
        for _ in range(times):
            with OperatorsRun(zeros=True) as ran:
                _run_both_ways(task, model)
            found.append(ran.operators)
    return found


def decides_alone(task: Task, read: Iterable[str]) -> bool:
    """Whether the unsharded model computes something else when clocks say something else, or the system draws other
    numbers ([Note: clocks]).

    Args:
        read: what its code reads of them.
    """
    is_clock = [name.startswith(("time.", "date")) for name in read]
    return (any(is_clock) and _decides_by_clock(task)) or (not all(is_clock) and _decides_by_draws(task))


def _decides_by_clock(task: Task) -> bool:
    usual, seen, met = _run(task, Clocks(task.model, lambda readings: time.time()), 2), False, set[float]()
    for moment in moments():
        clocks = Clocks(task.model, moment)
        seen |= _run(task, clocks, 2) != usual
        met |= clocks.met
    return seen or any(_run(task, Clocks(task.model, at), 2) != usual for at in moments(sorted(met)[:_MOST_MET]))


def _decides_by_draws(task: Task) -> bool:
    first = Clocks(task.model, draws=SystemDraws(0))
    usual = _run(task, first)
    tried = system_draws(numbers_in_code(task.model), first.bounds)
    return any(_run(task, Clocks(task.model, draws=draws)) != usual for draws in tried)


def _run(task: Task, clocks: Clocks, forwards: int = 1) -> tuple[Operators, float]:
    """The operators of some forwards and backwards, and the last loss."""
    with clocks, unsharded(task) as model, OperatorsRun() as ran:
        loss = [_run_both_ways(task, model) for _ in range(forwards)][-1]
    return ran.operators, loss


def _run_both_ways(task: Task, model: nn.Module) -> float:
    loss = task.loss(call(task, model), Inputs.of(task.inputs).given)
    loss.backward()  # code of hooks and of autograd functions decides too
    return loss.detach().item()


@contextmanager
def unsharded(task: Task) -> Iterator[nn.Module]:
    """A copy of the unsharded model, as it is before the task's step."""
    model = copied_model(task.model)
    with (
        kept_values_restored(model),
        HostDraws(model, task.seed, task.draws_at),
        without_dropout(model, off=task.draws is None),
    ):
        for _ in range(task.forwards):
            call(task, model)
        set_counts(model, task.counts)
        yield model


def _place() -> tuple[CodeType, int] | None:
    """The code outside of torch and of this project that runs, and its instruction: a line may hold two branches."""
    for frame in frames():
        if path_in_torch(frame) is None and not frame.f_code.co_filename.startswith(_COLROW):
            return frame.f_code, frame.f_lasti
    return None
