"""Choose which axis classes to shard.

The choice is greedy by the volume of parameters that a class holds, one class for each tensor, which gives Megatron's
column and row split; reductions follow from the contractions over chosen classes.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from colrow.derive.axes import Atom, Dim, atoms_in, find, leaves
from colrow.derive.choice import Choice
from colrow.derive.infer import AxisInference, Dims, facts_of, is_float, is_lookup, shape_of
from colrow.derive.trace import is_boundary
from colrow.mesh import divisors
from colrow.sharding.layout import chunk_sizes


@dataclass
class ClassFacts:
    """What the graph says about each axis class."""

    where: dict[Atom, set[Node]] = field(default_factory=lambda: defaultdict(set))
    volume: Counter[Atom] = field(default_factory=Counter)
    twice: set[Atom] = field(default_factory=set)
    """Classes that stand in two dimensions of one tensor."""
    beside_others: set[Atom] = field(default_factory=set)
    """Classes that are a factor or a segment of a dimension, not all of it."""


def class_facts(
    inference: AxisInference, volume: Callable[[Mapping[str, int]], int] = lambda volumes: sum(volumes.values())
) -> ClassFacts:
    facts, volumes = ClassFacts(), defaultdict[Atom, Counter[str]](Counter)
    for node in inference.dims:
        for dims in inference.tensors(node):
            for dim in dims:
                # such a class cannot have shards of unequal size: another factor or segment would be cut
                if len(leaves(dim)) > 1 or any(atom.segments for atom in leaves(dim)):
                    facts.beside_others.update(atoms_in(dim))
            for atom, dims_with_it in Counter(a for dim in dims for a in dict.fromkeys(atoms_in(dim))).items():
                facts.where[atom].add(node)
                if dims_with_it > 1:
                    facts.twice.add(atom)
                if node in inference.params:
                    volumes[atom][inference.params[node]] += math.prod(shape_of(node))
    facts.volume.update({atom: volume(by_parameter) for atom, by_parameter in volumes.items()})
    return facts


def head_groups(inference: AxisInference, kv: Atom) -> Atom | None:
    """The atom that directly follows `kv` wherever it stands in a dimension with it, if that is one free atom."""
    tensors = [dims for node in inference.dims for dims in inference.tensors(node)]
    found = {atom for dims in tensors for dim in dims for atom in _followers(dim, kv)}
    free = {atom for atom in found if atom.forbidden is None and atom.segments is None}
    if len(free) != 1:
        return None
    (group,) = free
    for dims in tensors:
        # the kv heads may stand in the dim before: [batch, kv heads, heads of a group, head_dim]
        if not all(_preceded(dim, group, kv, before) for before, dim in itertools.pairwise([[], *dims])):
            return None
    return group


def _followers(dim: Dim, kv: Atom) -> set[Atom]:
    """What stands right behind `kv` in the dimension, or in a segment of it."""
    atoms = leaves(dim)
    out = {after for atom, after in itertools.pairwise(atoms) if atom is kv}
    for atom in atoms:
        for segment in atom.segments or ():
            out |= _followers(segment, kv)
    return out


def _preceded(dim: Dim, group: Atom, kv: Atom, before: Dim) -> bool:
    """Whether `group` stands right behind `kv` wherever it stands in the dimension; `before`: the one to its left."""
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


def choose(
    inference: AxisInference,
    tp: int,
    normalised: bool = True,
    vocabulary: bool = True,
    preferred: Collection[Atom] = (),
    volume: Callable[[Mapping[str, int]], int] = lambda volumes: sum(volumes.values()),
) -> Choice:
    """The classes to shard at degree `tp`; the preferred ones before larger ones, whose size is `volume` of what they
    have in each parameter."""
    search = _Search(inference, tp, class_facts(inference, volume))
    facts, vocabularies = search.facts, search.lookups | search.outputs
    # kv heads before the query heads inside one of their groups: in a fused weight they hold equally much
    ranked = sorted(facts.volume, key=lambda a: (a not in preferred, -facts.volume[a], -len(facts.where[a])))
    first = [a for a in ranked if a.normalised is None and (vocabulary or a not in vocabularies)]
    residual = residual_classes(inference)
    first.sort(key=lambda a: (a not in preferred, a in residual))
    for atom in first:
        if search.is_free(atom):
            search.take(atom)
    # Axes under a norm come last, and only where they are not the residual stream: each costs that norm a reduction.
    for atom in ranked if normalised else ():
        if atom.normalised is not None and search.is_free(atom) and atom.size % tp == 0 and _narrow(inference, atom):
            search.take(atom)
    return search.choice


class _Search:
    """What is chosen so far, and whether a class may still be."""

    def __init__(self, inference: AxisInference, tp: int, facts: ClassFacts) -> None:
        self.inference, self.tp, self.facts = inference, tp, facts
        self.choice = Choice(tp)
        self.lookups: set[Atom] = set()
        """Rows of tables that indices pick, as those of an embedding."""
        self.positions: set[Atom] = set()
        """Rows of tables that the caller's inputs do not index: positions, which are read in order."""
        for node in inference.graph.nodes:
            rows = _lookup_rows(inference, node)
            self.lookups.update(rows)
            if rows and not _by_token(inference, node):
                self.positions.update(rows)
        self.outputs = _output_classes(inference)
        self._chosen_in: dict[Node, set[Atom]] = defaultdict(set)

    def is_free(self, atom: Atom) -> bool:
        """Whether nothing forbids the class, and no tensor would be sharded twice."""
        # In two dims of one tensor (q k^T over one class) a shard would be a diagonal block, which no placement says.
        if atom.forbidden is not None or atom in self.positions or atom in self.facts.twice:
            return False
        shared = self.facts.where[atom] & self._chosen_in.keys()
        return all(_in_other_segments(self.inference.tensors(node), atom, self._chosen_in[node]) for node in shared)

    def take(self, atom: Atom) -> None:
        """Choose the class, or kv heads that tp does not divide with the query heads of each, where that goes."""
        # GQA with fewer kv heads than ranks: query heads [kv, group] are split as one dim, kv heads are repeated.
        if atom.size % self.tp and not self._shards_unevenly(atom):
            group = head_groups(self.inference, atom)
            if group is None or atom.size * group.size % self.tp or not self.is_free(group):
                return
            self.choice.groups[atom] = group
            self._mark(group)
        else:
            self.choice.atoms.add(atom)
            if atom in self.lookups or atom in self.outputs:
                self.choice.vocabulary.add(atom)
        self._mark(atom)

    def _mark(self, atom: Atom) -> None:
        for node in self.facts.where[atom]:
            self._chosen_in[node].add(atom)

    def _shards_unevenly(self, atom: Atom) -> bool:
        """Rows of an embedding or outputs of a head, and each rank gets some: see [Note: uneven vocabulary]."""
        sizes = {row.size for row in self.lookups}
        is_vocabulary = atom in self.lookups or (atom in self.outputs and atom.size in sizes)
        return is_vocabulary and atom not in self.facts.beside_others and chunk_sizes(atom.size, self.tp)[-1] > 0


def residual_classes(inference: AxisInference) -> set[Atom]:
    """Classes of the residual stream, of every x + f(x) where f contracts. Without a norm over it nothing else tells
    such a class from others, and it holds the most: all that reads or writes the stream. It is taken last: each of the
    products between would need a reduction."""
    found: set[Atom] = set()
    # for each node the operands of sums that it depends on, and those that it depends on through a contraction
    reached: dict[Node, set[Node]] = {}
    products: dict[Node, set[Node]] = {}
    sums = [n for n in inference.graph.nodes if facts_of(n).addends == (0, 1) and len(n.all_input_nodes) == 2]
    terms = {_source(i) for n in sums for i in n.all_input_nodes if i not in inference.from_params}
    for node in inference.graph.nodes:
        reached[node] = set().union(*(reached[i] for i in node.all_input_nodes))
        products[node] = set().union(*(products[i] for i in node.all_input_nodes))
        if node in inference.contracted:
            products[node] |= reached[node]
        if node in terms:
            reached[node].add(node)
        # x + f(x): one operand of the sum is what the other was computed from, through a product
        if node in sums:
            one, other = (_source(i) for i in node.all_input_nodes)
            dims = inference.dims.get(node)
            if (one in products[other] or other in products[one]) and isinstance(dims, list):
                found |= {a for dim in dims for a in atoms_in(dim)}
    return found


def _source(node: Node) -> Node:
    """What the node is, before markers and copies."""
    while node.op == "call_function" and (facts_of(node).identity or is_boundary(node)) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _in_other_segments(tensors: list[Dims], atom: Atom, taken: set[Atom]) -> bool:
    """Whether a class and those taken stand in different segments of one dimension wherever they meet: a fused weight
    of attention and MLP is split by heads in one part and by features in the other."""
    for dims in tensors:
        for other in taken:
            places = [dim for dim in dims if {atom, other} & {*atoms_in(dim)}]
            met = {a for dim in places for a in atoms_in(dim)} >= {atom, other}
            if met and (len(places) > 1 or not any(_apart(leaf, atom, other) for leaf in leaves(places[0]))):
                return False
    return True


def _apart(leaf: Atom, one: Atom, other: Atom) -> bool:
    inside = [{*atoms_in(segment)} & {one, other} for segment in leaf.segments or ()]
    return {one} in inside and {other} in inside and {one, other} not in inside


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
            found |= {a for dim in dims for a in atoms_in(dim)}
    return found


def _narrow(inference: AxisInference, atom: Atom) -> bool:
    """A normalised axis is worth sharding when it is not the residual stream: no tensor with this axis feeds two
    products over it, no lookup makes it, and the caller does not get it."""
    if atom in _output_classes(inference):
        return False
    feeds: Counter[Node] = Counter()
    for node, dims in inference.contracted.items():
        if any(atom in atoms_in(dim) for dim in dims):
            for operand in node.all_input_nodes:
                if operand not in inference.from_params and is_float(operand):
                    feeds[operand] += 1
    for node, result in inference.dims.items():
        if is_lookup(node) and isinstance(result, list) and atom in atoms_in(result[-1]):
            return False
    return all(count < 2 for count in feeds.values())


def legal_degrees(inference: AxisInference, choice: Choice) -> list[int]:
    """Degrees that divide every chosen class: heads (query heads where kv heads can be repeated), ffn, experts' ffn.
    The vocabulary does not restrict them: its shards need not be equal."""
    sizes = []
    for atom in choice.atoms - choice.vocabulary:
        group = head_groups(inference, atom)
        sizes.append(atom.size * group.size if group is not None else atom.size)
    sizes += [kv.size * find(group).size for kv, group in choice.groups.items()]
    if not sizes:
        return [1]
    common = math.gcd(*sizes)  # a degree divides all sizes where it divides this
    return divisors(common)
