"""Where the residual stream begins and ends to live on shards of the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from colrow.derive.blocks import BlockFinder
from colrow.derive.flow import Flows
from colrow.derive.infer import is_float, shape_of
from colrow.derive.split import Split
from colrow.derive.trace import Trace, is_boundary, label_of
from colrow.plans.patterns import is_within


@dataclass(frozen=True)
class StreamKind:
    """From where to where the stream is sharded, and along what.

    Attributes:
        starts_at_embedding: the embedding's reduction gives shards; else the first layer's input is split.
        ends_before_norm: it is gathered before the last norm, and the head takes gathered activations; else the head
            gathers.
        flattened_tokens: shards of [batch * sequence], not of each sequence.
    """

    starts_at_embedding: bool
    ends_before_norm: bool
    flattened_tokens: bool


class NoStreamError(Exception):
    """The stream cannot be sharded along the sequence; the text says why."""


@dataclass(frozen=True)
class Ends:
    """Boundaries where the layout of the tokens changes."""

    start: frozenset[Node]
    """Gathered activations are split here; none when the embedding's reduction starts the stream."""
    finish: frozenset[Node]
    """The stream is gathered here, for a module that every rank runs alike."""
    entries: frozenset[Node]
    """A block begins, and gathers."""
    exits: frozenset[Node]
    """A block's sum is reduced to this rank's tokens."""
    leave: frozenset[Node] = frozenset()
    """Inputs of a module between the ends that every rank runs alike on all tokens: gathered here."""
    rejoin: frozenset[Node] = frozenset()
    """Outputs of such a module: each rank goes on with its own tokens."""

    @property
    def outward(self) -> frozenset[Node]:
        """Where the stream continues behind the boundary; at all others it ends before it."""
        return self.start | self.exits | self.rejoin

    @property
    def all(self) -> frozenset[Node]:
        return self.outward | self.finish | self.entries | self.leave


def find_ends(traced: Trace, split: Split, kind: StreamKind) -> Iterator[Ends]:
    """Where the stream may start and finish, and the borders of blocks between.

    A stream of flattened tokens that starts at a layer may start further out too: the residual may bypass the module
    around the first block.
    """
    flows, finder = split.flows, split.finder
    entries, exits = split.borders()
    lookups = {b for b in exits if finder.is_lookup(b)}
    if kind.starts_at_embedding and not lookups:
        raise NoStreamError("the embedding is not split, so nothing reduces at the start of the stream")
    starts = iter([set[Node]()]) if kind.starts_at_embedding else _first_layers(flows, finder, entries)
    if kind.ends_before_norm:
        entries = entries - finder.head_entries()
        finish = _last_norm(traced, flows, finder, entries, exits)
    else:
        finish = _finish(traced, flows, entries, exits)
    exits = exits if kind.starts_at_embedding else exits - lookups
    for start in starts:  # the first that works is taken: each further out leaves less of the model on shards
        yield Ends(frozenset(start), frozenset(finish), frozenset(entries), frozenset(exits))
        if not kind.flattened_tokens:
            return


def _first_layers(flows: Flows, finder: BlockFinder, entries: set[Node]) -> Iterator[set[Node]]:
    """The activations that enter the parent of the first block, then those that enter the modules around it."""
    ordered = sorted((e for e in entries), key=lambda n: finder.order[n])
    if not ordered:
        raise NoStreamError("nothing is split")
    name, none = label_of(ordered[0]).module, True
    while name:
        name = name.rpartition(".")[0]
        found = {
            b for b in finder.inputs(name) if b not in flows.constant and b in flows.live and len(shape_of(b)) >= 3
        }
        if found:
            none = False
            yield found
    if none and (first := _behind_lookup(flows, finder)) is not None:
        yield {first}
    elif none:
        raise NoStreamError("no module stands around the first layer")


def _behind_lookup(flows: Flows, finder: BlockFinder) -> Node | None:
    """Where activations of the embedding first enter a module, in a model of which the vocabulary alone is split."""
    lookups = {b for b in finder.borders([])[1] if finder.is_lookup(b)}
    behind: set[Node] = set()
    for node in finder.nodes:
        if behind.intersection(node.all_input_nodes) or lookups.intersection(node.all_input_nodes):
            behind.add(node)
            enters = is_boundary(node) and label_of(node).direction == "in" and len(shape_of(node)) >= 3
            if enters and node in flows.live and is_float(node):
                return node
    return None


def _last_norm(traced: Trace, flows: Flows, finder: BlockFinder, entries: set[Node], exits: set[Node]) -> set[Node]:
    """The input of the first module with parameters after the last block."""
    last = max((finder.order[n] for n in exits | entries), default=0)
    for node in traced.nodes:
        if (
            finder.order[node] > last
            and is_boundary(node)
            and node in flows.live
            and label_of(node).direction == "in"
            and is_float(node)
        ):
            return {node}
    raise NoStreamError("no module stands after the last block")


def _finish(traced: Trace, flows: Flows, entries: set[Node], exits: set[Node]) -> set[Node]:
    """Where the stream must be gathered for a module that is not split: the input of the last module with a
    matrix, when that module is not an entry itself."""
    inside = {label_of(e).module for e in entries} | {label_of(e).module for e in exits}
    last = None
    for node in traced.nodes:
        if is_boundary(node) and node in flows.live and label_of(node).direction == "in" and is_float(node):
            # a module that is neither in a block nor around one
            name = label_of(node).module
            if not any(is_within(name, m) or is_within(m, name) for m in inside):
                matrices = [
                    n
                    for n, f in flows.inference.params.items()
                    if f.rpartition(".")[0] == name and len(shape_of(n)) == 2
                ]
                if matrices and len(shape_of(node)) >= 3:
                    last = node
    # a block behind the last unsplit matrix: the stream goes on, and its head gathers
    entered = [n for n in traced.nodes if n in entries or n in exits]
    if last is None or (entered and traced.nodes.index(entered[-1]) > traced.nodes.index(last)):
        return set()
    return {last}
