"""Choose which axis classes to shard, and say how each parameter is laid out.

The choice is greedy by the volume of parameters that a class holds, one class for each tensor, which gives Megatron's
column and row split; reductions follow from the contractions over chosen classes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch.fx import Node

from colrow.derive.axes import Atom, Dim, find, leaves, size_of
from colrow.derive.infer import AxisInference, Dims, is_float, is_lookup, shape_of


@dataclass(frozen=True)
class Segment:
    """A run of indices of a dimension: cut into tp shards, or held whole by every rank."""

    size: int
    sharded: bool
    kv: Atom | None = None
    """The kv heads of a segment that stays whole because they do not divide: a rank uses those of its query heads."""


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
            if atom in self.atoms:
                size *= atom.size // self.tp
            elif atom in self.groups:
                local, share = self.query_heads(atom)
                size *= local // share
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
        """The global indices that a rank's part of the dimension holds, in its local order."""
        atoms = leaves(dim)
        out, position = [0], 0
        while position < len(atoms):
            atom = atoms[position]
            following = atoms[position + 1] if position + 1 < len(atoms) else None
            size = atom.size
            if atom in self.groups and following is not None and find(self.groups[atom]) is following:
                size, position = atom.size * following.size, position + 1
                mine = list(range(rank * size // self.tp, (rank + 1) * size // self.tp))
            elif atom in self.groups:
                group = find(self.groups[atom]).size
                local, share = self.query_heads(atom)
                mine = [(rank * local + j * share) // group for j in range(local // share)]
            elif atom in self.atoms:
                mine = list(range(rank * size // self.tp, (rank + 1) * size // self.tp))
            elif atom.segments:
                mine, offset = [], 0
                for segment in atom.segments:
                    mine += [offset + i for i in self.indices(segment, rank)]
                    offset += size_of(segment)
            else:
                mine = list(range(self.local_size([atom])))
            out = [i * size + j for i in out for j in mine]
            position += 1
        return out

    def segments(self, dim: Dim) -> list[Segment]:
        """The dimension as a concatenation: [(q, sharded), (k, sharded), (v, sharded)] for a fused qkv."""
        atoms = leaves(dim)
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
    """Neighbouring whole segments are one."""
    out: list[Segment] = []
    for segment in segments:
        if out and not segment.sharded and not out[-1].sharded and segment.kv is None and out[-1].kv is None:
            out[-1] = Segment(out[-1].size + segment.size, False)
        else:
            out.append(segment)
    return out


def _atoms_in(dim: Dim) -> list[Atom]:
    out = []
    for atom in leaves(dim):
        if atom.segments:
            for segment in atom.segments:
                out += _atoms_in(segment)
        else:
            out.append(atom)
    return out


@dataclass
class ClassFacts:
    """What the graph says about each axis class."""

    where: dict[Atom, set[Node]] = field(default_factory=lambda: defaultdict(set))
    volume: Counter[Atom] = field(default_factory=Counter)
    twice: set[Atom] = field(default_factory=set)
    """Classes that stand in two dimensions of one tensor."""


def class_facts(inference: AxisInference) -> ClassFacts:
    facts = ClassFacts()
    for node, result in inference.dims.items():
        for dims in result if isinstance(result, tuple) else (result,):
            seen: Counter[Atom] = Counter()
            for dim in dims or ():
                for atom in dict.fromkeys(_atoms_in(dim)):
                    seen[atom] += 1
            for atom, count in seen.items():
                facts.where[atom].add(node)
                if count > 1:
                    facts.twice.add(atom)
                if node in inference.params:
                    facts.volume[atom] += math.prod(shape_of(node))
    return facts


def head_groups(inference: AxisInference, kv: Atom) -> Atom | None:
    """The atom that directly follows `kv` wherever it stands in a dimension with it, if that is one free atom."""
    found: set[Atom] = set()
    for result in inference.dims.values():
        for dims in result if isinstance(result, tuple) else (result,):
            for dim in dims or ():
                found |= _followers(dim, kv)
    free = {atom for atom in found if atom.block is None and atom.segments is None}
    if len(free) != 1:
        return None
    (group,) = free
    for result in inference.dims.values():
        for dims in result if isinstance(result, tuple) else (result,):
            for number, dim in enumerate(dims or ()):
                assert dims is not None
                if not _preceded(dim, group, kv, dims[number - 1] if number else []):
                    return None
    return group


def _followers(dim: Dim, kv: Atom) -> set[Atom]:
    atoms = leaves(dim)
    out = {after for atom, after in itertools.pairwise(atoms) if atom is kv}
    for atom in atoms:
        for segment in atom.segments or ():
            out |= _followers(segment, kv)
    return out


def _preceded(dim: Dim, group: Atom, kv: Atom, before: Dim) -> bool:
    atoms = leaves(dim)
    last = leaves(before)[-1:]
    for position, atom in enumerate(atoms):
        if atom is group:
            previous = atoms[position - 1] if position else (last[0] if last else None)
            if previous is not kv:
                return False
        for segment in atom.segments or ():
            if not _preceded(segment, group, kv, []):
                return False
    return True


def choose(inference: AxisInference, tp: int, soft: bool = True, vocabulary: bool = True) -> Choice:
    """The classes to shard at degree `tp`."""
    facts = class_facts(inference)
    choice = Choice(tp)
    used: set[Node] = set()
    lookups = {a for n in inference.graph.nodes for a in _lookup_rows(inference, n)}
    outputs = _output_classes(inference)

    def free(atom: Atom) -> bool:
        return atom.block is None and atom not in positions and atom not in facts.twice and not facts.where[atom] & used

    def take(atom: Atom) -> None:
        group = None
        if atom.size % tp:
            group = head_groups(inference, atom)
            if group is None or atom.size * group.size % tp or not free(group):
                return
            choice.groups[atom] = group
            used.update(facts.where[group])
        else:
            choice.atoms.add(atom)
            if atom in lookups or atom in outputs:
                choice.vocabulary.add(atom)
        used.update(facts.where[atom])

    positions = {a for n in inference.graph.nodes if not _by_token(inference, n) for a in _lookup_rows(inference, n)}
    # kv heads before the query heads inside one of their groups: in a fused weight they hold equally much
    ranked = sorted(facts.volume, key=lambda a: (-facts.volume[a], -len(facts.where[a])))
    first = [a for a in ranked if a.soft is None and (vocabulary or a not in lookups | outputs)]
    for atom in first:
        if free(atom):
            take(atom)
    for atom in ranked if soft else ():
        if atom.soft is not None and free(atom) and atom.size % tp == 0 and _narrow(inference, atom):
            take(atom)
    return choice


def _lookup_rows(inference: AxisInference, node: Node) -> list[Atom]:
    if is_lookup(node):
        return leaves(inference.of(node.args[0])[0])
    return []


def _by_token(inference: AxisInference, node: Node) -> bool:
    """Whether a lookup's indices come from the caller; a table of positions is small and read in order."""
    todo, seen = list(node.args[1:2]), set()
    while todo:
        at = todo.pop()
        if not isinstance(at, Node) or at in seen:
            continue
        if at.name in inference._inputs:
            return True
        seen.add(at)
        todo += at.all_input_nodes
    return False


def _output_classes(inference: AxisInference) -> set[Atom]:
    out = next(n for n in inference.graph.nodes if n.op == "output")
    found: set[Atom] = set()
    for node in out.all_input_nodes:
        if isinstance(dims := inference.dims.get(node), list):
            found |= {a for dim in dims for a in _atoms_in(dim)}
    return found


def _narrow(inference: AxisInference, atom: Atom) -> bool:
    """A normalised axis is worth sharding when it is not the residual stream: no tensor that carries it feeds two
    products over it, no lookup makes it, and the caller does not get it."""
    if atom in _output_classes(inference):
        return False
    feeds: Counter[Node] = Counter()
    for node, dims in inference.contracted.items():
        if any(atom in _atoms_in(dim) for dim in dims):
            for operand in node.all_input_nodes:
                if operand not in inference.from_params and is_float(operand):
                    feeds[operand] += 1
    for node, result in inference.dims.items():
        if is_lookup(node) and isinstance(result, list) and atom in _atoms_in(result[-1]):
            return False
    return all(count < 2 for count in feeds.values())


def legal_degrees(inference: AxisInference, choice: Choice, limit: int = 1024) -> list[int]:
    """Degrees that divide every chosen class: heads (query heads where kv heads can be repeated), ffn, experts' ffn.
    The vocabulary does not restrict them: an undivided vocabulary stays whole."""
    sizes = []
    for atom in choice.atoms - choice.vocabulary:
        group = head_groups(inference, atom)
        sizes.append(atom.size * group.size if group is not None else atom.size)
    sizes += [kv.size * find(group).size for kv, group in choice.groups.items()]
    if not sizes:
        return [1]
    common = math.gcd(*sizes)
    return [d for d in range(1, min(common, limit) + 1) if common % d == 0]
