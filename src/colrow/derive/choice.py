"""A choice of axis classes to shard, and what a rank then holds of a dimension: extent, indices, segments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from colrow.derive.axes import Atom, Dim, atoms_in, find, leaves, size_of
from colrow.derive.infer import Dims
from colrow.sharding.layout import chunk_sizes


@dataclass(frozen=True)
class Segment:
    """A run of indices of a dimension: split into tp shards, or held by every rank."""

    size: int
    sharded: bool
    kv: Atom | None = None
    """The kv heads of an unsharded segment, because they do not divide by tp: a rank uses those of its query heads."""


@dataclass
class Choice:
    """The classes to shard, at one degree."""

    tp: int
    atoms: set[Atom] = field(default_factory=set)
    groups: dict[Atom, Atom] = field(default_factory=dict)
    """kv heads to the query heads inside one kv group, where kv heads alone do not divide: query heads are split
    contiguously and a rank uses the kv heads that its query heads need."""
    vocabulary: set[Atom] = field(default_factory=set)
    """Chosen classes of embedding rows or of the head's outputs."""

    # ------------------------------------------------------------------ questions about a dimension

    def chosen(self, dims: Iterable[Dim]) -> set[Atom]:
        """The chosen classes that stand in these dimensions."""
        return {a for dim in dims for a in atoms_in(dim) if a in self.atoms or a in self.groups}

    def sharded(self, dim: Dim) -> bool:
        return any(
            atom in self.atoms or atom in self.groups or any(self.sharded(s) for s in atom.segments or ())
            for atom in leaves(dim)
        )

    def any_sharded(self, dims: Iterable[Dim]) -> bool:
        return any(self.sharded(dim) for dim in dims)

    def query_heads(self, kv: Atom) -> tuple[int, int]:
        """Query heads on one rank, and how many of them share one local kv head."""
        group = find(self.groups[kv]).size
        local = kv.size * group // self.tp
        return local, math.gcd(group, local)

    def local_size(self, dim: Dim) -> int:
        """The extent of the dimension on one rank."""
        size = 1
        for atom in leaves(dim):
            if atom in self.atoms:  # of a vocabulary the first rank's: see [Note: uneven vocabulary]
                size *= chunk_sizes(atom.size, self.tp)[0]
            elif atom in self.groups:
                local, share = self.query_heads(atom)
                size *= local // share
            # heads of a kv group: as many as share one of the rank's kv heads
            elif any(atom is find(group) for group in self.groups.values()):
                kv = next(k for k, group in self.groups.items() if find(group) is atom)
                size *= self.query_heads(kv)[1]
            elif atom.segments:
                size *= sum(self.local_size(segment) for segment in atom.segments)
            else:
                size *= atom.size
        return size

    def local_shape(self, dims: Dims) -> list[int]:
        return [self.local_size(dim) for dim in dims]

    def indices(self, dim: Dim, rank: int) -> list[int]:
        """The global indices that a rank's shard of the dimension holds, in its local order."""
        atoms = leaves(dim)
        out, position = [0], 0
        while position < len(atoms):
            atom, following = atoms[position], atoms[position + 1 : position + 2]
            if atom in self.groups and following == [find(self.groups[atom])]:
                # kv heads times the query heads of each: split as one dim
                size = atom.size * following[0].size
                own = list(range(rank * size // self.tp, (rank + 1) * size // self.tp))
                position += 1
            else:
                size, own = atom.size, self._indices_of(atom, rank)
            out = [i * size + j for i in out for j in own]
            position += 1
        return out

    def _indices_of(self, atom: Atom, rank: int) -> list[int]:
        if atom in self.groups:  # the kv heads that the rank's query heads need
            group = find(self.groups[atom]).size
            local, share = self.query_heads(atom)
            return [(rank * local + j * share) // group for j in range(local // share)]
        if atom in self.atoms:
            sizes = chunk_sizes(atom.size, self.tp)
            return list(range(sum(sizes[:rank]), sum(sizes[: rank + 1])))
        if atom.segments:
            starts = itertools.accumulate((size_of(segment) for segment in atom.segments), initial=0)
            return [
                start + i
                for start, segment in zip(starts, atom.segments, strict=False)
                for i in self.indices(segment, rank)
            ]
        return list(range(self.local_size([atom])))

    def segments(self, dim: Dim) -> list[Segment]:
        """The dimension as a concatenation: [(q, sharded), (k, sharded), (v, sharded)] for a fused qkv."""
        atoms = leaves(dim)
        # `outer` repeats of the split factor, each with `inner` contiguous indices: [2 (gate, up), f] is two segments
        for position, atom in enumerate(atoms):
            outer = math.prod(a.size for a in atoms[:position])
            inner = math.prod(a.size for a in atoms[position + 1 :])
            if atom in self.groups and atoms[position + 1 : position + 2] != [find(self.groups[atom])]:
                return [Segment(atom.size * inner, False, atom)] * outer
            if atom in self.atoms or atom in self.groups:
                return [Segment(atom.size * inner, True)] * outer
            if atom.segments and self.sharded([atom]):
                within = [s for segment in atom.segments for s in self.segments(segment)]
                return _join([Segment(s.size * inner, s.sharded, s.kv) for s in within] * outer)
        return [Segment(size_of(dim), False)]


def _join(segments: list[Segment]) -> list[Segment]:
    """Neighbouring unsharded segments are one."""
    out: list[Segment] = []
    for segment in segments:
        if out and not segment.sharded and not out[-1].sharded and segment.kv is None and out[-1].kv is None:
            out[-1] = Segment(out[-1].size + segment.size, False)
        else:
            out.append(segment)
    return out


def why_unsharded(dims: Dims, tp: int, notes: Collection[str], summed: bool) -> str:
    """Why a parameter of these dimensions is not sharded, in one line; what `notes` give up says most."""
    reasons = []
    for k, dim in enumerate(dims):
        for atom in leaves(dim):
            size = atom.size
            if atom.forbidden:
                reasons.append(f"dim {k} ({size}): {atom.forbidden}")
            elif atom.normalised:
                reasons.append(f"dim {k} ({size}): {atom.normalised}")
            elif size % tp:
                reasons.append(f"dim {k} ({size}): not divisible by {tp}")
            else:
                reasons.append(f"dim {k} ({size}): another dim is split in its place")
    # what was given up says most, and least that a part of a dim only tells q, k and v, or value and gate, apart
    reasons.sort(key=lambda why: (why.partition(": ")[2] not in notes, ": it counts " in why))
    text = "; ".join(dict.fromkeys(reasons)) or "a single element"
    return text + ("; gradient summed over tp" if summed else "")
