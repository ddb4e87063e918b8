"""The classes at fault where an error of a plan names no module (one in backward, for one): those without which the
plan has no error."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable

from colrow.derive.axes import Atom
from colrow.derive.choice import Choice
from colrow.derive.infer import AxisInference
from colrow.plans.patterns import with_stars

TRIED = 8
"""Kinds of classes: each costs a rank's trace and a check."""


def parameters_of_each(inference: AxisInference, choice: Choice) -> dict[Atom, set[str]]:
    """The parameters in which each chosen class stands."""
    found = defaultdict[Atom, set[str]](set)
    for node, name in inference.params.items():
        for atom in choice.chosen(inference.of(node)):
            found[atom].add(name)
    return found


def at_fault(inference: AxisInference, choice: Choice, is_right: Callable[[Choice], bool]) -> set[Atom]:
    """The classes of one kind, the same in every layer, without which a choice is right; empty where more than one
    kind is at fault. The vocabulary is tried first: most errors without a module are of code that takes the logits.

    Args:
        is_right: whether the plan of a choice has no error.
    """
    kinds = defaultdict[frozenset[str], set[Atom]](set)
    for atom, names in parameters_of_each(inference, choice).items():
        kinds[frozenset(map(with_stars, names))].add(atom)
    in_turn = sorted(kinds.values(), key=choice.vocabulary.isdisjoint)
    for atoms in itertools.islice(in_turn, TRIED):
        groups = {kv: heads for kv, heads in choice.groups.items() if kv not in atoms}
        rest = Choice(choice.tp, choice.atoms - atoms, groups, choice.vocabulary - atoms)
        # a choice of nothing is always right, and says nothing of what is at fault
        if (rest.atoms or rest.groups) and is_right(rest):
            return atoms
    return set()
