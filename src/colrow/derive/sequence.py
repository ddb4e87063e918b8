"""Whether the residual stream can live on shards of the sequence, and from where to where.

The graph is read once more with its blocks cut out: at each entry the block gathers, at each exit it reduce-scatters,
so the sequence inside is another axis than the one outside. What is left must act on each token alone. Then norms and
residual additions run on a rank's tokens, and the parameters they use get gradients that must be summed.

Under the fast styles a rank's tokens are a part of all tokens in a row, whatever sequence they are of. Then what is
left must not know the sequences either, and may view both axes as one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

from colrow.derive.axes import Atom, Dim, leaves
from colrow.derive.blocks import BlockFinder
from colrow.derive.flow import Flows
from colrow.derive.infer import AxisInference, Dims, is_float, is_lookup, shape_of
from colrow.derive.table import infer
from colrow.derive.trace import Trace, is_boundary, label_of


@dataclass
class Stream:
    """The part of the graph that runs on shards of the sequence (dimension 1)."""

    start: set[Node]
    """Boundaries at which whole activations are cut; empty when the embedding's reduction starts the stream."""
    finish: set[Node]
    """Boundaries at which the stream is gathered for a module that every rank runs alike."""
    nodes: set[Node] = field(default_factory=set)
    """Nodes that hold a shard of the sequence."""
    axis: dict[Node, int] = field(default_factory=dict)
    """Their dimensions that are shorter on a rank; 1 unless said here."""
    summed: set[str] = field(default_factory=set)
    """Parameters that these nodes use."""
    whole_head: bool = False
    """The stream is gathered before the last norm, and the head takes whole activations."""


class NoStreamError(Exception):
    """The stream cannot be cut along the sequence; the text says why."""


def find_stream(
    traced: Trace,
    flows: Flows,
    finder: BlockFinder,
    entries: set[Node],
    exits: set[Node],
    early: bool,
    whole_head: bool,
    row: bool = False,
) -> Stream:
    """The stream from the embedding (`early`) or from the first layer's input, to the head or (`whole_head`) to the
    last norm before it. `row`: on parts of all tokens in a row, not of each sequence.

    Raises:
        NoStreamError: some operation on the way looks at more than one token.
    """
    start = set() if early else _first_layer(flows, finder, entries)
    lookups = {b for b in exits if _is_lookup(finder, b)}
    if early and not lookups:
        raise NoStreamError("the embedding is not split, so nothing reduces at the start of the stream")
    heads = finder.head_entries()
    if whole_head:
        entries = entries - heads
        finish = _last_norm(traced, flows, finder, entries, exits)
    else:
        finish = _finish(traced, flows, entries, exits)
    cuts = entries | (exits - (set() if early else lookups)) | start | finish
    outer: dict[Node, Dim] = {}

    def cut(node: Node, inference: AxisInference) -> Dims | None:
        if node not in cuts:
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        fresh = inference.fresh(shape_of(node))
        side = fresh if node in start or node in exits else inference.of(source)
        shape = shape_of(node)
        if row and len(side) == 2 and shape[0] == traced.batch * traced.seq:
            outer[node] = side[0]
        elif len(side) < 3 or shape[1] != traced.seq or (row and (len(side) > 3 or shape[0] != traced.batch)):
            raise NoStreamError(f"{label_of(node).module} exchanges {shape}, not [batch, sequence, features]")
        else:
            outer[node] = [*side[0], *side[1]] if row else side[1]
        return fresh

    inference = infer(traced, cut=cut, free_inputs=True)
    atoms: set[Atom] = set()
    batches: set[Atom] = set()
    for node, dim in outer.items():
        found = leaves(dim)
        blocked = next((a.block for a in reversed(found) if a.block is not None), None)
        if len(found) != 1 + row or blocked:
            raise NoStreamError(f"at {label_of(node).module or 'the model'}: {blocked or 'the sequence is gone'}")
        atoms.add(found[-1])
        batches.update(found[:-1])
    stream = Stream(start, finish, whole_head=whole_head)
    for node in traced.nodes:
        dims = inference.dims.get(node)
        for part in dims if isinstance(dims, tuple) else (dims,):
            for position, dim in enumerate(part or ()):
                if any(a in atoms for a in leaves(dim)):
                    in_row = row and _in_row(part or [], position, batches)
                    if (not in_row if row else position != 1) and node in flows.live:
                        raise NoStreamError(f"the sequence is not dimension 1 in {flows.path[node] or 'the model'}")
                    stream.nodes.add(node)
                    stream.axis[node] = position
    if row:
        _knows_no_sequence(stream, inference, flows, batches)
    for node in stream.nodes:
        if node.op == "placeholder" or (node in flows.constant and node in flows.live and is_float(node)):
            raise NoStreamError(f"the stream meets {node.name}, which is not cut along the sequence")
    for node in flows.constant & stream.nodes & flows.live:
        raise NoStreamError(f"a mask or position meets the stream in {flows.path[node] or 'the model'}")
    if traced.output() in stream.nodes:
        raise NoStreamError("the caller gets activations cut along the sequence")
    for node in stream.nodes:
        if node in finish or node in entries:
            continue
        for operand in node.all_input_nodes:
            stream.summed |= flows.params_of.get(operand, set())
    outside = set()
    for node in traced.nodes:
        if node not in stream.nodes and node not in flows.params_of and node in flows.live:
            for operand in node.all_input_nodes:
                outside |= flows.params_of.get(operand, set())
    whole = {f for n, f in flows.inference.params.items() if not flows.is_sharded(n)}
    both = stream.summed & outside & whole
    if both:
        raise NoStreamError(f"{min(both)} is used inside and outside the stream")
    return stream


def _in_row(dims: Dims, position: int, batches: set[Atom]) -> bool:
    """Whether the tokens stand as [batch, sequence, ...] or, viewed as one dimension, as [batch × sequence, ...]."""
    *before, _ = leaves(dims[position])
    if position == 0:
        return len(before) == 1 and before[0] in batches
    return position == 1 and not before and len(leaves(dims[0])) == 1 and leaves(dims[0])[0] in batches


def _knows_no_sequence(stream: Stream, inference: AxisInference, flows: Flows, batches: set[Atom]) -> None:
    """Raise NoStreamError where the stream meets what belongs to a sequence: a rank's tokens may be of several."""
    for node in (n for n in stream.nodes if n in flows.live):
        for operand in node.all_input_nodes:
            dims = inference.dims.get(operand)
            if operand in stream.nodes or not isinstance(dims, list):
                continue
            if any(a in batches for dim in dims for a in leaves(dim)):
                raise NoStreamError(f"the stream meets a value of each sequence in {flows.path[node] or 'the model'}")


def _is_lookup(finder: BlockFinder, boundary: Node) -> bool:
    name = label_of(boundary).module
    return any(owner == name and is_lookup(node) for node, owner in finder.owners.items())


def _first_layer(flows: Flows, finder: BlockFinder, entries: set[Node]) -> set[Node]:
    """The activations that enter the parent of the first block."""
    ordered = sorted((e for e in entries), key=lambda n: finder.order[n])
    if not ordered:
        raise NoStreamError("nothing is split")
    name = label_of(ordered[0]).module
    while name:
        name = name.rpartition(".")[0]
        found = {
            b
            for b in finder.boundaries.get(name, [])
            if label_of(b).kind == "in" and b not in flows.constant and b in flows.live and len(shape_of(b)) >= 3
        }
        if found:
            return found
    raise NoStreamError("no module stands around the first layer")


def _last_norm(traced: Trace, flows: Flows, finder: BlockFinder, entries: set[Node], exits: set[Node]) -> set[Node]:
    """The input of the first module with parameters after the last block."""
    last = max((finder.order[n] for n in exits | entries), default=0)
    for node in traced.nodes:
        if (
            finder.order[node] > last
            and is_boundary(node)
            and node in flows.live
            and label_of(node).kind == "in"
            and is_float(node)
        ):
            return {node}
    raise NoStreamError("no module stands behind the last block")


def _finish(traced: Trace, flows: Flows, entries: set[Node], exits: set[Node]) -> set[Node]:
    """Where the stream must be whole again for a module that is not split: the input of the last module with a
    matrix, when that module is not an entry itself."""
    inside = {label_of(e).module for e in entries} | {label_of(e).module for e in exits}
    last = None
    for node in traced.nodes:
        if is_boundary(node) and node in flows.live and label_of(node).kind == "in" and is_float(node):
            name = label_of(node).module
            if not any(name == m or name.startswith(m + ".") or m.startswith(name + ".") for m in inside):
                matrices = [
                    n
                    for n, f in flows.inference.params.items()
                    if f.rpartition(".")[0] == name and len(shape_of(n)) == 2
                ]
                if matrices and len(shape_of(node)) >= 3:
                    last = node
    entered = [n for n in traced.nodes if n in entries or n in exits]
    if last is None or (entered and traced.nodes.index(entered[-1]) > traced.nodes.index(last)):
        return set()
    return {last}
