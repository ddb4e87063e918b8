"""Whether the residual stream can live on shards of the sequence, and from where to where.

The graph is read once more with its blocks cut out: at each entry the block gathers, at each exit it reduce-scatters,
so the sequence inside is another axis than the one outside. What is left must act on each token by itself. Then norms
and residual additions run on a rank's tokens, and the parameters they use get gradients that must be summed.

Under the fast styles a rank's tokens are a shard of the flattened tokens [batch * sequence], whatever sequence they are
of. Then what is left must not depend on the sequences either, and may view both axes as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch.fx import Node

from colrow.derive.axes import Atom, Dim, leaves
from colrow.derive.blocks import Split
from colrow.derive.flow import Flows
from colrow.derive.infer import AxisInference, Dims, is_float, shape_of
from colrow.derive.stream_ends import NoStreamError, StreamKind, find_ends
from colrow.derive.table import infer
from colrow.derive.trace import Trace, label_of


@dataclass
class Stream:
    """The part of the graph that runs on shards of the sequence (dimension 1)."""

    kind: StreamKind
    start: set[Node]
    """Boundaries at which gathered activations are split; empty when the embedding's reduction starts the stream."""
    finish: set[Node]
    """Boundaries at which the stream is gathered for a module that every rank runs alike."""
    nodes: set[Node] = field(default_factory=set)
    """Nodes that hold a shard of the sequence."""
    axis: dict[Node, int] = field(default_factory=dict)
    """Their dimensions that are shorter on a rank; 1 where none is given."""
    summed: set[str] = field(default_factory=set)
    """Parameters that these nodes use."""


@dataclass(frozen=True)
class Graph:
    """What the checks look at: the graph with its blocks cut out."""

    traced: Trace
    flows: Flows
    inference: AxisInference
    batches: set[Atom]
    """The batch axes, where tokens are flattened."""
    token_dims: list[tuple[Node, Dims, int]]
    """Every tensor with a token axis, its dimensions, and the one with the tokens."""

    def live(self, nodes: set[Node]) -> Iterator[Node]:
        return (node for node in nodes if node in self.flows.live)

    def module(self, node: Node) -> str:
        return self.flows.path[node] or "the model"


def find_stream(traced: Trace, split: Split, kind: StreamKind) -> Stream:
    """The residual stream on shards of the tokens, between the blocks.

    Raises:
        NoStreamError: some operation on the way looks at more than one token.
    """
    flows = split.flows
    start, finish, entries, exits = find_ends(traced, split, kind)
    inference, tokens, batches = infer_between(traced, start, finish, entries, exits, kind)
    graph = Graph(traced, flows, inference, batches, dims_with_tokens(traced, inference, tokens))
    stream = Stream(kind, start, finish)
    for node, _, position in graph.token_dims:
        stream.nodes.add(node)
        stream.axis[node] = position
    stream.summed = parameters_of(stream.nodes - finish - entries, flows)
    for check in CHECKS[kind.flattened_tokens]:
        if (why := check(stream, graph)) is not None:
            raise NoStreamError(why)
    return stream


def infer_between(
    traced: Trace, start: set[Node], finish: set[Node], entries: set[Node], exits: set[Node], kind: StreamKind
) -> tuple[AxisInference, set[Atom], set[Atom]]:
    """The axes of the graph with its blocks cut out: at each border begin fresh ones. With the atoms of the tokens and,
    where these are flattened, of the batch."""
    outside: dict[Node, Dim] = {}  # the tokens' dimension at each border, on the stream's side

    def border(node: Node, inference: AxisInference) -> Dims | None:
        if node not in entries | exits | start | finish:
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        shape = shape_of(node)
        fresh = inference.fresh(shape)
        dims = fresh if node in start or node in exits else inference.of(source)
        if (tokens := _token_dim(dims, shape, traced, kind)) is None:
            raise NoStreamError(f"{label_of(node).module} exchanges {shape}, not [batch, sequence, features]")
        outside[node] = tokens
        return fresh

    inference = infer(traced, fresh_at=border, free_inputs=True)
    tokens: set[Atom] = set()
    batches: set[Atom] = set()
    for node, dim in outside.items():
        atoms = leaves(dim)
        why = next((a.forbidden for a in reversed(atoms) if a.forbidden is not None), None)
        if len(atoms) != 1 + kind.flattened_tokens or why:
            raise NoStreamError(f"at {label_of(node).module or 'the model'}: {why or 'the sequence is gone'}")
        tokens.add(atoms[-1])
        batches.update(atoms[:-1])
    return inference, tokens, batches


def _token_dim(dims: Dims, shape: list[int], traced: Trace, kind: StreamKind) -> Dim | None:
    """The axes of the tokens in [batch, sequence, features], or in [batch * sequence, features] where these are
    flattened; None in another shape."""
    if kind.flattened_tokens and len(dims) == 2:
        return dims[0] if shape[0] == traced.batch * traced.seq else None
    if len(dims) < 3 or shape[1] != traced.seq:
        return None
    if not kind.flattened_tokens:
        return dims[1]
    return [*dims[0], *dims[1]] if len(dims) == 3 and shape[0] == traced.batch else None


def dims_with_tokens(traced: Trace, inference: AxisInference, tokens: set[Atom]) -> list[tuple[Node, Dims, int]]:
    """Each tensor that holds a token axis: its node, its dimensions, and the position of that one."""
    found = []
    for node in traced.nodes:
        dims = inference.dims.get(node)
        for part in dims if isinstance(dims, tuple) else (dims,):
            for position, dim in enumerate(part or ()):
                if any(a in tokens for a in leaves(dim)):
                    found.append((node, part or [], position))
    return found


def parameters_of(nodes: set[Node], flows: Flows) -> set[str]:
    """The parameters that these nodes use."""
    return set().union(*(flows.params_of.get(operand, set()) for node in nodes for operand in node.all_input_nodes))


# ---------------------------------------------------------------------- checks: each returns why there is no stream

Check = Callable[[Stream, Graph], str | None]


def tokens_are_dimension_one(stream: Stream, graph: Graph) -> str | None:
    for node, _, position in graph.token_dims:
        if position != 1 and node in graph.flows.live:
            return f"the sequence is not dimension 1 in {graph.module(node)}"
    return None


def tokens_are_flattened(stream: Stream, graph: Graph) -> str | None:
    """[batch, sequence, ...], or viewed as one dimension [batch * sequence, ...]: a shard is a run of tokens."""
    for node, dims, position in graph.token_dims:
        *before, _ = leaves(dims[position])
        batch = leaves(dims[0]) if position == 1 and not before else before if position == 0 else []
        if (len(batch) != 1 or batch[0] not in graph.batches) and node in graph.flows.live:
            return f"the sequence is not dimension 1 in {graph.module(node)}"
    return None


def no_value_of_a_sequence(stream: Stream, graph: Graph) -> str | None:
    """A rank's flattened tokens may be of several sequences."""
    for node in graph.live(stream.nodes):
        for operand in node.all_input_nodes:
            dims = graph.inference.dims.get(operand)
            if operand in stream.nodes or not isinstance(dims, list):
                continue
            if any(a in graph.batches for dim in dims for a in leaves(dim)):
                return f"the stream meets a value of each sequence in {graph.module(node)}"
    return None


def no_input_of_every_token(stream: Stream, graph: Graph) -> str | None:
    """Inputs and constants hold all tokens, and nothing splits them."""
    for node in stream.nodes:
        constant = node in graph.flows.constant and node in graph.flows.live and is_float(node)
        if node.op == "placeholder" or constant:
            return f"the stream meets {node.name}, which is not split along the sequence"
    return None


def no_position_or_mask(stream: Stream, graph: Graph) -> str | None:
    for node in graph.live(graph.flows.constant & stream.nodes):
        return f"a mask or position meets the stream in {graph.module(node)}"
    return None


def output_is_gathered(stream: Stream, graph: Graph) -> str | None:
    return "the caller gets activations split along the sequence" if graph.traced.output() in stream.nodes else None


def parameters_on_one_side_only(stream: Stream, graph: Graph) -> str | None:
    """One used on a rank's tokens and on all of them gets a gradient that is neither a partial sum nor complete."""
    flows = graph.flows
    rest = {n for n in graph.traced.nodes if n not in stream.nodes and n not in flows.params_of and n in flows.live}
    unsharded = {name for node, name in flows.inference.params.items() if not flows.is_sharded(node)}
    both = stream.summed & parameters_of(rest, flows) & unsharded
    return f"{min(both)} is used inside and outside the stream" if both else None


_COMMON: tuple[Check, ...] = (
    no_input_of_every_token,
    no_position_or_mask,
    output_is_gathered,
    parameters_on_one_side_only,
)
CHECKS: dict[bool, tuple[Check, ...]] = {
    False: (tokens_are_dimension_one, *_COMMON),
    True: (tokens_are_flattened, no_value_of_a_sequence, *_COMMON),
}
"""By whether tokens are flattened."""
