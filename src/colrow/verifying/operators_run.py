"""Which operators a model's code runs, to see whether it takes another way."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from types import CodeType
from typing import Any

from colrow.dryrun.block_kinds import shape_or_value
from colrow.dryrun.calls import Inputs
from colrow.sharding.parameter_state import copied_model
from colrow.torch_compat import TorchDispatchMode, frames, path_in_torch, tree_leaves
from colrow.verifying.clocks import Clocks, Moment, moments
from colrow.verifying.counters import set_counts
from colrow.verifying.dropout import without_dropout
from colrow.verifying.host_draws import HostDraws
from colrow.verifying.kept_values import kept_values_restored
from colrow.verifying.step import Task, call

Operators = frozenset[Hashable]
_MOST_MET = 8
_COLROW = str(Path(__file__).parents[1])


class OperatorsRun(TorchDispatchMode):
    """Attributes:
    found: each operator with its shapes and integers and the place in the code that called it, as often as it ran.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[Hashable]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = tuple(map(shape_or_value, tree_leaves((args, kwargs))))
        self.found[func, arguments, _place()] += 1
        return func(*args, **(kwargs or {}))


def operators_run(task: Task) -> Operators:
    """Of a forward of the unsharded model; each as often as it ran."""
    return _run(task)[0]


def decides_by_clock(task: Task) -> bool:
    """Whether the unsharded model computes something else when clocks say something else ([Note: clocks])."""
    usual, seen, met = _run(task, lambda readings: time.time(), 2), False, set[float]()
    for moment in moments():
        seen |= _run(task, moment, 2, met) != usual
    return seen or any(_run(task, moment, 2) != usual for moment in moments(sorted(met)[:_MOST_MET]))


def _run(
    task: Task, moment: Moment | None = None, forwards: int = 1, met: set[float] | None = None
) -> tuple[Operators, float]:
    """The operators of some forwards and the loss of the last, with clocks at a moment, and the numbers they met."""
    model, off = copied_model(task.model), task.draws is None
    with (
        kept_values_restored(model),
        Clocks(model, moment) as clocks,
        HostDraws(model, task.seed, task.draws_at),
        without_dropout(model, off=off),
    ):
        for _ in range(task.forwards):
            call(task, model)
        set_counts(model, task.counts)
        with OperatorsRun() as ran:
            outputs = [call(task, model) for _ in range(forwards)]
        loss = task.loss(outputs[-1], Inputs.of(task.inputs).given).item()
    if met is not None:
        met |= clocks.met
    return frozenset((operator, i) for operator, times in ran.found.items() for i in range(times)), loss


def _place() -> tuple[CodeType, int] | None:
    """The code outside of torch and of this project that runs, and its instruction: a line may hold two branches."""
    for frame in frames():
        if path_in_torch(frame) is None and not frame.f_code.co_filename.startswith(_COLROW):
            return frame.f_code, frame.f_lasti
    return None
