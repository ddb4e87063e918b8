"""Other ways that a model's code takes by what it counts, draws and keeps, and by numbers that other code sets.

[Note: other ways]
Code decides by such numbers, and the two forwards of a comparison show few of them. A forward and backward of the
unsharded model is cheap beside a comparison. So it is run with many numbers, and where it runs an operator that no
comparison has run, at that place, of these shapes and with these zeros, the models are compared. See [Note: counters]
and [Note: deciding draws].
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor

from colrow.sharding.parameter_state import copied_model
from colrow.sharding.replayed_iterators import ReplayedIterator
from colrow.verifying.comparison import Reference
from colrow.verifying.counters import Ahead, Counts, Kept, TensorsRecord, recording, set_counts
from colrow.verifying.host_draws import LEAST, MOST, PAIRS, places
from colrow.verifying.kept_values import Path, kept_values, numbers_in_code, set_names
from colrow.verifying.operators_run import Operators, operators_in_turn, operators_run, unsharded
from colrow.verifying.other_values import OtherValues, with_reference
from colrow.verifying.step import Task, call, reference_step

_MOST_WAYS = 8
"""Most other ways of the code that are compared."""
_USUAL = (*range(3, 65), *(digit * 10**i for i in range(2, 6) for digit in (1, 2, 5)))
"""Counts that are tried beside those that stand in the code."""
_SEEDS = 32
"""Of random numbers that differ from draw to draw."""
_MOST_SET = 100
"""Most numbers that other code may set, of all places."""
_MOST_ITEMS, _FURTHEST = 1024, 100_000
"""Items of an iterator that are looked at, and how many later it is tried."""
_LATER = (2, 4, 6, 30)
"""Forwards before the step, where no branch says more: histories are short."""


def other_ways(task: Task, reference: Reference) -> Iterator[OtherValues]:
    """All of them, each with the unsharded model's step."""
    yield from _counted(task, reference)
    yield from _iterated(task, reference)
    yield from _set_elsewhere(task, reference)
    yield from _decided(task, reference)
    yield from _later(task, reference)


def _counted(task: Task, reference: Reference) -> Iterator[OtherValues]:
    """With other numbers in the model's counters; none for a model without counters."""
    if not reference.counters:
        return
    if reference.late:
        task = replace(task, forwards=task.forwards + 1)
    starts, met = reference.starts, _met(task, reference.starts)

    def at(number: float) -> Counts:
        """The counters that come to this number."""
        return {c: number for c, start in starts.items() if reference.counters[c].leads_to(number, start)}

    def changed(counts: Mapping[Any, float]) -> Task:
        return replace(task, counts=task.counts | {c: type(starts[c])(n) for c, n in counts.items()})

    changes = [(n, at(n)) for n in dict.fromkeys([*met, *_near(numbers_in_code(task.model)), *_USUAL])]
    # code counts before or after it compares
    back = [(n, {c: reference.counters[c].back(n) for c in counts}) for n, counts in changes[: len(met)]]
    tried = ((f"counters at {n:.7g}", changed(counts)) for n, counts in (*changes, *back) if counts)
    yield from _new_ways(tried, operators_run(task))
    far = {counter: reference.counters[counter].far(start) for counter, start in starts.items()}
    if (found := with_reference(f"counters at {next(iter(far.values())):.7g}", changed(far))) is not None:
        yield found


def _near(numbers: Iterable[float]) -> Iterator[float]:
    return (near for n in numbers for near in (n - 1, n, n + 1))


def _iterated(task: Task, reference: Reference) -> Iterator[OtherValues]:
    """With later items of iterators that count nothing: where an item is another one, and far behind."""
    held, taken = dict[Path, ReplayedIterator](), list[Path]()
    with suppress(Exception), unsharded(task) as model:
        held |= {kept.path: it for kept in kept_values(model) if isinstance(it := kept.value, ReplayedIterator)}
        before = {path: it.place for path, it in held.items()}
        call(task, model)
        taken += [path for path, it in held.items() if it.place != before[path] and path not in reference.counters]
        for path in taken:
            held[path].go_to(before[path])

    def tried() -> Iterator[tuple[str, Task]]:
        for path in taken:
            first = dict[str, int]()
            for i, item in enumerate(held[path].coming(_MOST_ITEMS)):
                if item is None or isinstance(item, bool | int | float | str | tuple):
                    first.setdefault(repr(item), i)
            far = (n for n in (*_near(numbers_in_code(task.model)), *_USUAL) if 0 < n <= _FURTHEST)
            for items in map(Ahead, dict.fromkeys([*list(first.values())[:_MOST_SET], *far])):
                yield f"{path[-1]} {items} items later", replace(task, counts=task.counts | {path: items})

    if taken:
        yield from _new_ways(tried(), operators_run(task))


def _set_elsewhere(task: Task, reference: Reference) -> Iterator[OtherValues]:
    """With numbers that no forward changes and other code sets (a step that a loop gives the model), at those that they
    meet."""
    names, found = set_names(task.model), Kept.of(task.model)
    free = {path: n for path, n in found.counts.items() if path[-1] in names and path not in reference.counters}
    if not free:
        return
    tensors = {kept.path for kept in kept_values(task.model) if isinstance(kept.value, Tensor)}
    by_tensors, met = set[float](), {path: set[float]() for path in free}
    _record(task, {path: recording(number, met[path]) for path, number in free.items()}, by_tensors)

    def tried() -> Iterator[tuple[str, Task]]:
        for path, number in free.items():
            for near in _near(sorted(by_tensors if path in tensors else met[path], key=abs)):
                name, counts = f"{path[-1]} at {near:.7g}", {path: type(number)(near)}
                if path in found.outside:
                    yield name, replace(task, counts=task.counts | counts)
                else:  # before the plan is applied: a style may change such a number
                    set_counts(changed := copied_model(task.model), counts)
                    yield name, replace(task, model=changed)

    yield from _new_ways(itertools.islice(tried(), _MOST_SET), operators_run(task))


def _decided(task: Task, reference: Reference) -> Iterator[OtherValues]:
    """With the random numbers that the model's code draws on the host at their least, at their most, and between."""
    if not reference.decided:
        return
    seen = operators_run(task) | operators_run(replace(task, seed=task.seed + 1))
    for name, at in (("their least", LEAST), ("their most", MOST)):
        changed = replace(task, draws_at=(at,))
        seen |= _operators(changed)
        if (found := with_reference(f"random numbers at {name}", changed)) is not None:
            yield found
    at_one = ((at,) for at in places(numbers_in_code(task.model), reference.bounds))
    tried = {"at " + ", ".join(f"{x:.4g}" for x in at): replace(task, draws_at=at) for at in (*at_one, *PAIRS)}
    tried |= {f"of seed {seed}": replace(task, seed=seed) for seed in range(task.seed + 2, task.seed + 2 + _SEEDS)}
    yield from _new_ways(((f"random numbers {name}", changed) for name, changed in tried.items()), seen)


def _later(task: Task, reference: Reference) -> Iterator[OtherValues]:
    """After more forwards, of a model that keeps what grows with each: where one runs what none before it ran."""
    if not reference.grows:
        return
    try:
        ran = operators_in_turn(task, _LATER[-1] + 1)
    except Exception:  # code may refuse so many
        return
    # what grows in shape runs new operators each time: a branch is a place that ran none of them before
    branches = [{(func, place) for (func, _, place), _ in each} for each in ran]
    later = [i for i in range(2, len(ran)) if not branches[i] <= set().union(*branches[:i])][:_MOST_WAYS]
    later += [i for i in _LATER if not ran[i] <= frozenset().union(*ran[:i])]
    for forwards in dict.fromkeys(later):
        found = with_reference(f"{forwards} forwards before", replace(task, forwards=forwards))
        if found is not None:
            yield found


def _new_ways(tried: Iterable[tuple[str, Task]], seen: Operators) -> Iterator[OtherValues]:
    """Those with which the unsharded model runs an operator that was not seen before."""
    ways = 0
    for name, changed in tried:
        if (operators := _operators(changed)) <= seen:
            continue
        seen |= operators
        if (found := with_reference(name, changed)) is not None:
            yield found
        if (ways := ways + 1) == _MOST_WAYS:
            return


def _operators(task: Task) -> Operators:
    """None where the model raises, as code may with such values."""
    with suppress(Exception):
        return operators_run(task)
    return frozenset()


def _met(task: Task, counts: Counts) -> list[float]:
    """The numbers that these meet in a step, the smallest first."""
    met = set[float]()
    _record(task, {counter: recording(number, met) for counter, number in counts.items()}, met)
    return sorted(met, key=abs)


def _record(task: Task, recorded: Counts, by_tensors: set[float]) -> None:
    """A step with numbers that record; `by_tensors` gets those that tensors of one element meet."""
    with TensorsRecord(by_tensors), suppress(Exception):  # code may refuse numbers that record
        reference_step(replace(task, next_forward=False, counts=task.counts | recorded), copied_model(task.model))
