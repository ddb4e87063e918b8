"""Which integer attributes make the model's code right on a rank's shapes: a search over sets of them.

A set that is tried costs a trace, so those are tried that may change what did not fit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from colrow.derive.failure import Misfit
from colrow.plans.patterns import is_within

Attributes = dict[str, dict[str, Any]]
"""Module name to attribute name to `/tp` or a number."""
Group = tuple[str, str]
"""A class and its attribute."""
LIKELY = re.compile("head|group|split")
HEAD_SIZE = re.compile(r"head\w*_(dim|size)$|(dim|size)_per_head")
"""What a rank has all of, though it may be as large as what it has a part of."""
MOST = 4
"""Attributes that are tried together, where not all of them fit."""


class AttributeSearch:
    """Sets of attributes that were tried.

    Args:
        given: attributes that are set in any case.
        misfit_of: how a rank's trace with some attributes differs from the unsharded one; None where it does not.
    """

    def __init__(self, model: nn.Module, given: Attributes, misfit_of: Callable[[Attributes], Misfit | None]) -> None:
        self.model, self.given, self.misfit_of = model, given, misfit_of
        self.candidates: dict[Group, dict[str, Any]] = {}
        """Module name to local value, by class and attribute."""
        self.first: Misfit | None = None
        """What is wrong without any; of later ones those that tell more."""
        self.places: set[str] = set()
        """Modules that did not fit."""
        self.known: dict[frozenset[Group], Misfit | None] = {}

    def found(self, candidates: Callable[[], dict[Group, dict[str, Any]]]) -> Attributes | None:
        """A set that fits, and of which none can be left out; None where there is none."""
        if self.misfit(()) is None:
            return self.attributes(())
        self.candidates = candidates()
        for chosen in self.in_turn():
            if self.misfit(chosen) is None:
                return self.attributes(self.without_idle(chosen))
        return None

    def attributes(self, chosen: Collection[Group]) -> Attributes:
        found: Attributes = {name: dict(values) for name, values in self.given.items()}
        for key in chosen:
            for name, value in self.candidates[key].items():
                found.setdefault(name, {})[key[1]] = value
        return found

    def misfit(self, chosen: Collection[Group]) -> Misfit | None:
        if (key := frozenset(chosen)) not in self.known:
            why = self.known[key] = self.misfit_of(self.attributes(chosen))
            if why is not None:
                self.first = why if self.first is None or (chosen and why.tells_more) else self.first
                self.places |= {why.module or ""}
        return self.known[key]

    def groups(self, near: bool) -> list[Group]:
        """Attributes that may change what did not fit so far: those of the modules that did not, of modules around
        them, and of modules beside them that hold no parameters. `near`: of all modules beside them."""
        found = [key for key, names in self.candidates.items() if any(self._may_change(n, near) for n in names)]
        return sorted(found, key=lambda key: (not LIKELY.search(key[1]), key))

    def _may_change(self, name: str, near: bool) -> bool:
        for place in self.places:
            around = place.rpartition(".")[0]
            beside = (
                name.rpartition(".")[0] == around and next(self.model.get_submodule(name).parameters(), None) is None
            )
            if beside or is_within(place, name) or is_within(name, around if near else place):
                return True
            if near and not around:  # `place` is a child of the model: all of it stands beside
                return True
        return False

    def in_turn(self) -> Iterator[tuple[Group, ...]]:
        """Sets of attributes to try, the likeliest first: each alone; all; all but the sizes of a head; small sets."""
        for key in self.groups(near=True):
            yield (key,)
        for near in (False, True):
            every: list[Group] = []
            while len(every) < len(groups := self.groups(near)):  # where the next module does not fit, its own come in
                every = groups
                yield tuple(every)
            yield tuple(key for key in every if not HEAD_SIZE.search(key[1]))
        for size in range(2, MOST + 1):
            yield from itertools.combinations(self.groups(near=True), size)

    def without_idle(self, chosen: tuple[Group, ...]) -> tuple[Group, ...]:
        """The chosen attributes without those that change nothing."""
        for key in reversed(chosen):
            rest = tuple(other for other in chosen if other != key)
            if rest and self.misfit(rest) is None:
                chosen = rest
        return chosen
