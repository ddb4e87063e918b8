"""Iterators that a model holds, made so that copies of the model each go on where it stood.

[Note: replayed iterators]
Code takes a scale, a flag or a step by `next(self.schedule)`. A generator cannot be copied, and copies of a model that
share an iterator take each other's items. So a `ReplayedIterator` takes its place, for good: what it gives is kept, and
each copy has its own position.
"""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_CHUNK = 256
"""Items that are taken at once: a generator may draw random numbers, which code around it must not miss later."""
_SECONDS = 0.2
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "transformers", "colrow"}
_DEEPEST = 4


class _Tape:
    """An iterator, and the items that it has given."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source, self.items = source, list[Any]()

    def reach(self, position: int, seconds: float) -> bool:
        """Whether there is an item at this position, taken within so many seconds (the next one always)."""
        if position < len(self.items):
            return True
        end = time.monotonic() + seconds
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            for item in self.source:
                self.items.append(item)
                if len(self.items) >= max(position + 1, _CHUNK) or time.monotonic() > end:
                    break
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])
        return position < len(self.items)


class ReplayedIterator:
    """An iterator whose copies each have their own position."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._tape, self._position = _Tape(source), 0

    def __iter__(self) -> ReplayedIterator:
        return self

    def __next__(self) -> Any:
        # more than one where the generator is quick, always one
        if not self._tape.reach(self._position, 0.0 if self._tape.items else _SECONDS):
            raise StopIteration
        self._position += 1
        return self._tape.items[self._position - 1]

    def send(self, value: Any) -> Any:
        """Of a generator that is sent nothing."""
        if value is not None:
            raise TypeError("a generator that is sent values cannot be replayed: keep what it keeps in a buffer")
        return next(self)

    def __copy__(self) -> ReplayedIterator:
        made = ReplayedIterator.__new__(ReplayedIterator)
        made.go_to(self.place)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> ReplayedIterator:
        return self.__copy__()

    def __reduce__(self) -> Any:
        self._tape.reach(self._position + 4 * _CHUNK, _SECONDS)
        return _over, (self._tape.items[self._position :],)

    @property
    def place(self) -> tuple[_Tape, int]:
        """Where it stands, for `go_to`."""
        return self._tape, self._position

    def go_to(self, place: tuple[_Tape, int]) -> None:
        self._tape, self._position = place

    def restart(self, source: Iterator[Any]) -> None:
        """Go on with the items of another iterator; copies keep theirs."""
        self.go_to((_Tape(source), 0))

    def ahead(self, items: int) -> bool:
        """Go on so many items later; whether there is one."""
        self._position += items
        return self._tape.reach(self._position, _SECONDS)

    def coming(self, most: int) -> list[Any]:
        """The next items, `most` at the most."""
        self._tape.reach(self._position + most - 1, _SECONDS)
        return self._tape.items[self._position : self._position + most]


def _over(items: list[Any]) -> ReplayedIterator:
    return ReplayedIterator(iter(items))


def is_iterator(value: Any) -> bool:
    """Whether it is an iterator of Python's own over items in memory: a generator, `iter(list)`, `itertools.cycle`."""
    return isinstance(value, Iterator) and type(value).__module__ in ("builtins", "itertools")


def replay_iterators(model: nn.Module) -> None:
    """Put replayed iterators in the places of those in the attributes of the model's modules, also in lists, dicts and
    objects of a user's own classes."""
    entered = set[int]()
    for module in model.modules():
        if not type(module).__module__.startswith("torch.nn."):
            _replay(vars(module), entered, _DEEPEST)


def _replay(holder: Any, entered: set[int], depth: int) -> None:
    if id(holder) in entered or depth == 0:
        return
    entered.add(id(holder))
    items = list(holder.items() if isinstance(holder, dict) else enumerate(itertools.islice(holder, 1024)))
    for key, value in items:
        if is_iterator(value):
            holder[key] = ReplayedIterator(value)
        elif type(value) in (dict, list):
            _replay(value, entered, depth - 1)
        elif hasattr(value, "__dict__") and not isinstance(value, nn.Module) and _is_users(type(value)):
            _replay(vars(value), entered, depth - 1)


def _is_users(cls: type) -> bool:
    return cls.__module__.partition(".")[0] not in _LIBRARIES
