"""Axes: which factors of which tensor dimensions belong together.

A dimension is an ordered list of atoms, major to minor, whose sizes multiply to its extent: the 64 columns of a query
are [8 heads, 8 head_dim]. An atom is a node of a union-find forest. `unify` says that two dimensions must be sharded
alike, `forbid` that one must not be sharded, `regroup` follows a view. An axis class is a set of merged atoms: to shard
it is to shard each dimension in which it stands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Dim = list["Atom"]


class Atom:
    """One factor of a tensor dimension."""

    __slots__ = ("forbidden", "normalised", "parent", "parts", "segments", "size")

    def __init__(self, size: int, forbidden: str | None = None) -> None:
        self.size = size
        self.parent: Atom | None = None
        """The atom that this one was merged into."""
        self.parts: Dim | None = None
        """Ordered factors, once the atom was split."""
        self.segments: list[Dim] | None = None
        """Dimensions of unequal extent whose concatenation this atom is."""
        self.forbidden = forbidden
        """Why this axis must not be sharded, or None."""
        self.normalised: str | None = None
        """The normalisation that spans this axis: sharding it costs a small reduction there."""

    def __repr__(self) -> str:
        return f"Atom({self.size}{', ' + self.forbidden if self.forbidden else ''})"


def find(atom: Atom) -> Atom:
    """The representative of the atom's class."""
    while atom.parent is not None:
        atom = atom.parent
    return atom


def leaves(dim: Sequence[Atom]) -> Dim:
    """Representatives of a dimension, fully split, without those of size 1; a concatenation stays one leaf."""
    out: Dim = []
    for atom in dim:
        root = find(atom)
        if root.parts:
            out += leaves(root.parts)
        elif root.size != 1:
            out.append(root)
    return out


def atoms_in(dim: Sequence[Atom]) -> Dim:
    """Representatives of a dimension, those inside concatenations in the place of these."""
    return [
        a
        for atom in leaves(dim)
        for a in ([b for s in atom.segments for b in atoms_in(s)] if atom.segments else [atom])
    ]


def size_of(dim: Sequence[Atom]) -> int:
    return math.prod(find(atom).size for atom in dim)


def forbid(dim: Sequence[Atom], why: str) -> None:
    """No axis of `dim` may be sharded; the first reason is kept."""
    for atom in leaves(dim):
        for segment in atom.segments or ():
            forbid(segment, why)
        if atom.forbidden is None:
            atom.forbidden = why


def mark_normalised(dim: Sequence[Atom], why: str) -> None:
    """Each axis of `dim` is normalised over: it can be sharded, at the cost of a reduction in that normalisation."""
    for atom in leaves(dim):
        for segment in atom.segments or ():
            mark_normalised(segment, why)
        if atom.normalised is None:
            atom.normalised = why


def split(atom: Atom, sizes: Sequence[int]) -> None:
    root = find(atom)
    assert math.prod(sizes) == root.size
    assert root.parts is None
    assert root.segments is None
    root.parts = [Atom(size, root.forbidden) for size in sizes]
    for part in root.parts:
        part.normalised = root.normalised


def unify(one: Sequence[Atom], other: Sequence[Atom], why: str) -> None:
    """Two dimensions must be sharded alike. Factors are split until they line up; where they cannot, both are
    forbidden."""
    # Both dims are read major to minor, like two rulers: equal factors merge, and a longer one is split at the mark
    # where the shorter ends. What cannot line up (6 beside 4) is given up from there on.
    first, second = leaves(one), leaves(other)
    while first or second:
        if not first or not second:
            return forbid(first + second, f"sizes that do not line up: {why}")
        a, b = first[0], second[0]
        if a is b:
            first.pop(0)
            second.pop(0)
        elif a.size == b.size:
            first.pop(0)
            second.pop(0)
            _merge(a, b, why)
        elif a.segments or b.segments:
            # a factor of the other dim would end inside a segment
            return forbid(first + second, f"a view cuts a concatenation: {why}")
        elif a.size > b.size and a.size % b.size == 0:
            split(a, [b.size, a.size // b.size])
            first, second = leaves(first), leaves(second)
        elif b.size > a.size and b.size % a.size == 0:
            split(b, [a.size, b.size // a.size])
            first, second = leaves(first), leaves(second)
        else:
            return forbid(first + second, f"sizes that do not line up: {why}")
    return None


def unify_dims(
    dims: Sequence[Sequence[Atom]],
    others: Sequence[Sequence[Atom]],
    why: str,
    apart: int | None = None,
    reason: str = "",
) -> None:
    """Two tensors' dimensions must be sharded alike, but for number `apart`, which is forbidden in both."""
    for k, (dim, other) in enumerate(zip(dims, others, strict=True)):
        if k == apart:
            forbid(dim, reason)
            forbid(other, reason)
        else:
            unify(dim, other, why)


def _merge(a: Atom, b: Atom, why: str) -> None:
    # The root keeps the segments: `leaves` gives the root, and its readers look for them there.
    if b.segments and not a.segments:
        a, b = b, a
    pairs: list[tuple[Dim, Dim]] = []
    if a.segments and b.segments:
        if [size_of(s) for s in a.segments] != [size_of(s) for s in b.segments]:
            forbid([a], f"two different concatenations meet: {why}")
            forbid([b], f"two different concatenations meet: {why}")
            return
        pairs = list(zip(a.segments, b.segments, strict=True))
    reason, soft = a.forbidden or b.forbidden, a.normalised or b.normalised
    b.parent = a
    if reason:
        forbid([a], reason)
    if soft:
        mark_normalised([a], soft)
    for s, t in pairs:
        unify(s, t, why)


def regroup(dims: Sequence[Sequence[Atom]], shape: Sequence[int]) -> list[Dim] | None:
    """Follow a view: the factors, major to minor, over a new shape of the same number of elements; None where an
    extent of the new shape cuts through a factor."""
    todo = [atom for dim in dims for atom in leaves(dim)]
    out: list[Dim] = []
    for extent in shape:
        current: Dim = []
        rest = extent
        while rest > 1:
            if not todo:
                return None
            atom = todo.pop(0)
            if atom.size <= rest and rest % atom.size == 0:
                # the factor lies in this extent
                current.append(atom)
                rest //= atom.size
            elif atom.segments:
                return None
            # the extent ends inside of the factor
            elif atom.size > rest and atom.size % rest == 0:
                split(atom, [rest, atom.size // rest])
                head, *tail = leaves([atom])
                current.append(head)
                todo, rest = leaves(tail) + leaves(todo), 1
            else:
                # 6 into an extent of 4: 2 of this factor, the other 2 of what follows
                common = math.gcd(atom.size, rest)
                if common == 1:
                    return None
                split(atom, [common, atom.size // common])
                todo = leaves([atom]) + leaves(todo)
        out.append(current)
    return out if not todo else None
