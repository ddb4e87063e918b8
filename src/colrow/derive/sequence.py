"""Whether the residual stream can live on shards of the sequence, and from where to where.

The graph is read once more with its blocks cut out: at each entry the block gathers, at each exit it reduce-scatters,
so the sequence inside is another axis than the one outside. What is left must act on each token by itself. Then norms
and residual additions run on a rank's tokens, and the parameters they use get gradients that must be summed.

Under the fast styles a rank's tokens are a shard of the flattened tokens [batch * sequence], whatever sequence they are
of. Then what is left must not depend on the sequences either, and may view both axes as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace

from torch.fx import Node

from colrow.derive.axes import Atom, Dim, leaves, size_of
from colrow.derive.flow import Flows, SpmdType
from colrow.derive.infer import AxisInference, Dims, is_float, shape_of
from colrow.derive.split import Split
from colrow.derive.stream_ends import Ends, NoStreamError, StreamKind, find_ends
from colrow.derive.table import infer
from colrow.derive.trace import Trace, label_of
from colrow.plans.patterns import is_within


@dataclass
class Stream:
    """The part of the graph that runs on shards of the sequence (dimension 1)."""

    kind: StreamKind
    ends: Ends
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

    Where tokens are flattened, modules of which nothing is split and that look at more than one token (a convolution,
    attention that stays unsharded) may lie between: every rank runs them alike on all tokens.

    Raises:
        NoStreamError: some other operation on the way looks at more than one token.
    """
    first: NoStreamError | None = None
    for ends in find_ends(traced, split, kind):
        # in order of cost: each module in between, or input beside the stream, takes a gather and a split
        for attempt in (as_it_is, around_mixing_modules, with_side_inputs):
            try:
                if attempt is as_it_is or kind.flattened_tokens:
                    return attempt(traced, split, ends, kind)
            except NoStreamError as error:
                first = first or error
    assert first is not None
    raise first


def as_it_is(traced: Trace, split: Split, ends: Ends, kind: StreamKind) -> Stream:
    return stream_between(traced, split.flows, ends, kind)


def stream_between(traced: Trace, flows: Flows, ends: Ends, kind: StreamKind) -> Stream:
    """The stream between these ends. Raises NoStreamError where it may not be on shards of the tokens."""
    inference, sides = infer_between(traced, ends, kind)
    # Behind a patch embedding there are other counts of tokens than in the input, which tp was made to divide.
    for side in sides:
        if (count := size_of(side.dim)) % flows.choice.tp:
            module = label_of(side.border).module or "the model"
            raise NoStreamError(f"{count} tokens at {module}, which tp={flows.choice.tp} does not divide")
    tokens: set[Atom] = set()
    batches: set[Atom] = set()
    for side in sides:
        if side.outside:
            if (why := side.why_not(kind)) is not None:
                raise NoStreamError(f"at {label_of(side.border).module or 'the model'}: {why}")
            tokens.add(leaves(side.dim)[-1])
            batches.update(leaves(side.dim)[:-1])
    graph = Graph(traced, flows, inference, batches, dims_with_tokens(traced, inference, tokens))
    stream = stream_of(graph, ends, kind)
    for check in CHECKS[kind.flattened_tokens]:
        for _, why in check(stream, graph):
            raise NoStreamError(why)
    return stream


def stream_of(graph: Graph, ends: Ends, kind: StreamKind) -> Stream:
    stream = Stream(kind, ends)
    for node, _, position in graph.token_dims:
        stream.nodes.add(node)
        stream.axis[node] = position
    stream.summed = parameters_of(stream.nodes - ends.finish - ends.entries - ends.leave, graph.flows)
    return stream


@dataclass(frozen=True)
class Side:
    """The tokens' dimension on one side of a border."""

    border: Node
    dim: Dim
    outside: bool
    """The side of the stream."""

    def why_not(self, kind: StreamKind) -> str | None:
        """Why it cannot be sharded, or None."""
        atoms = leaves(self.dim)
        why = next((a.forbidden for a in reversed(atoms) if a.forbidden is not None), None)
        return why or (None if len(atoms) == 1 + kind.flattened_tokens else "the sequence is gone")


def infer_between(traced: Trace, ends: Ends, kind: StreamKind) -> tuple[AxisInference, list[Side]]:
    """The axes of the graph with its blocks cut out: at each border begin fresh ones. With the tokens' dimensions on
    the stream's side of each border, and on both sides of modules that are run on all tokens."""
    sides: list[Side] = []
    outward, borders, alike = ends.outward, ends.all, ends.leave | ends.rejoin

    def border(node: Node, inference: AxisInference) -> Dims | None:
        if node not in borders:
            return None
        source = node.args[0]
        assert isinstance(source, Node)
        shape = shape_of(node)
        fresh = inference.fresh(shape)
        # Outward borders (a block's exit) start fresh axes outside; inward ones end the axes that came so far.
        if (tokens := _token_dim(fresh if node in outward else inference.of(source), shape, traced, kind)) is None:
            raise NoStreamError(f"{label_of(node).module} exchanges {shape}, not [batch, sequence, features]")
        sides.append(Side(node, tokens, outside=True))
        if node in alike:  # every rank runs the module between on all tokens, whose axes must be sound too
            within = _token_dim(inference.of(source) if node in outward else fresh, shape, traced, kind)
            assert within is not None
            sides.append(Side(node, within, outside=False))
        return fresh

    return infer(traced, fresh_at=border, free_inputs=True), sides


def _token_dim(dims: Dims, shape: list[int], traced: Trace, kind: StreamKind) -> Dim | None:
    """The axes of the tokens in [batch, sequence, features], or in [batch * sequence, features] where these are
    flattened; None in another shape."""
    if kind.flattened_tokens and len(dims) == 2:
        return dims[0] if shape[0] == traced.batch * traced.seq else None
    if len(dims) < 3:
        return None
    # behind a patch embedding there are other tokens than in the input, and a decoder has other ones than its encoder
    if shape[1] != traced.seq and (kind.flattened_tokens or len(dims) > 3 or shape[1] == traced.batch):
        return None
    if not kind.flattened_tokens:
        return dims[1]
    return [*dims[0], *dims[1]] if shape[0] == traced.batch else None


def dims_with_tokens(traced: Trace, inference: AxisInference, tokens: set[Atom]) -> list[tuple[Node, Dims, int]]:
    """Each tensor that holds a token axis: its node, its dimensions, and the position of that one."""
    found = []
    for node in traced.nodes:
        for dims in inference.tensors(node):
            for position, dim in enumerate(dims):
                if any(a in tokens for a in leaves(dim)):
                    found.append((node, dims, position))
    return found


def parameters_of(nodes: set[Node], flows: Flows) -> set[str]:
    """The parameters that these nodes use."""
    return set().union(*(flows.params_of.get(operand, set()) for node in nodes for operand in node.all_input_nodes))


# ---------------------------------------------------------------------- modules that look at more than one token


def around_mixing_modules(traced: Trace, split: Split, ends: Ends, kind: StreamKind) -> Stream:
    """The stream, gathered around the outermost unsplit modules that look at more than one token.

    All modules of which nothing is split are cut out first, each at its own borders: so it shows in whose own code, not
    in that of modules inside it, the tokens meet.
    """
    unsplit = unsplit_modules(traced, split, ends, kind)
    ins = {name: borders[0] for name, borders in unsplit.items()}
    outs = {name: borders[1] for name, borders in unsplit.items()}
    # a trial: borders around every unsplit module, of which only those stay in whose code tokens meet
    probe = replace(ends, leave=frozenset().union(*ins.values()), rejoin=frozenset().union(*outs.values()))
    inference, sides = infer_between(traced, probe, kind)
    mixing: set[str] = set()
    tokens: set[Atom] = set()
    batches: set[Atom] = set()
    for side in sides:
        if side.why_not(kind) is None:
            tokens.add(leaves(side.dim)[-1])
            batches.update(leaves(side.dim)[:-1])
        else:
            name = label_of(side.border).module
            mixing.add(split.finder.around(name.rpartition(".")[0]) if side.outside else name)
    graph = Graph(traced, split.flows, inference, batches, dims_with_tokens(traced, inference, tokens))
    stream = stream_of(graph, probe, kind)
    for check in CHECKS[kind.flattened_tokens]:
        mixing |= {split.finder.around(split.flows.path[node]) for node, _ in check(stream, graph) if node is not None}
    mixing &= unsplit.keys()
    outermost = [m for m in mixing if not any(m.startswith(f"{other}.") for other in mixing)]
    if not outermost:
        raise NoStreamError("no unsplit module looks at more than one token")
    leave = frozenset[Node]().union(*(ins[name] for name in outermost))
    rejoin = frozenset[Node]().union(*(outs[name] for name in outermost))
    return stream_between(traced, split.flows, replace(ends, leave=leave, rejoin=rejoin), kind)


def with_side_inputs(traced: Trace, split: Split, ends: Ends, kind: StreamKind) -> Stream:
    """The stream, where modules on it split what they take from before its start (embeddings of each layer)."""
    behind, sides = behind_start(ends), set[Node]()
    for name in split.finder.boundaries:
        inputs = of_tokens(split.finder.inputs(name), traced, split, kind)
        if inputs & (behind | ends.start):
            sides |= inputs - behind - ends.all
    if not sides:
        raise NoStreamError("no module on the stream takes anything from before its start")
    wider = replace(ends, start=ends.start | sides)
    with suppress(NoStreamError):
        return as_it_is(traced, split, wider, kind)
    return around_mixing_modules(traced, split, wider, kind)


def behind_start(ends: Ends) -> frozenset[Node]:
    """What depends on the stream."""
    behind, todo = set[Node](), [*ends.start, *ends.exits]
    while todo:
        for user in todo.pop().users:
            if user not in behind and user not in ends.finish:
                behind.add(user)
                todo.append(user)
    return frozenset(behind)


def of_tokens(boundaries: list[Node], traced: Trace, split: Split, kind: StreamKind) -> frozenset[Node]:
    """The boundaries at which activations of all tokens pass, equal on all ranks."""
    return frozenset(
        node
        for node in boundaries
        if node in split.flows.live
        and is_float(node)
        and split.flow.types.get(node) is SpmdType.INVARIANT
        and _token_dim([[] for _ in shape_of(node)], shape_of(node), traced, kind) is not None
    )


def unsplit_modules(
    traced: Trace, split: Split, ends: Ends, kind: StreamKind
) -> dict[str, tuple[frozenset[Node], frozenset[Node]]]:
    """Modules between the ends of which nothing is split: where tokens enter and where they leave."""
    finder, types, live = split.finder, split.flow.types, split.flows.live
    behind = behind_start(ends)
    cut = {label_of(node).module for node in ends.all}
    alike = (SpmdType.INVARIANT, SpmdType.PARAMETER, SpmdType.CONSTANT)
    found = {}
    for name in finder.boundaries:
        if any(is_within(module, name) for module in cut):
            continue
        enter = of_tokens(finder.inputs(name), traced, split, kind) & behind
        leave = of_tokens(finder.outputs(name), traced, split, kind) & behind
        if enter and leave and all(types.get(node) in alike for node in finder.interior(name) if node in live):
            found[name] = enter, leave
    return found


# ---------------------------------------------------------------------- checks: each returns why there is no stream

Check = Callable[[Stream, Graph], Iterator[tuple[Node | None, str]]]
"""At which nodes there is no stream, and why."""


def tokens_are_dimension_one(stream: Stream, graph: Graph) -> Iterator[tuple[Node, str]]:
    for node, _, position in graph.token_dims:
        if position != 1 and node in graph.flows.live:
            yield node, f"the sequence is not dimension 1 in {graph.module(node)}"


def tokens_are_flattened(stream: Stream, graph: Graph) -> Iterator[tuple[Node, str]]:
    """[batch, sequence, ...], or viewed as one dimension [batch * sequence, ...]: a shard is a run of tokens."""
    for node, dims, position in graph.token_dims:
        *before, _ = leaves(dims[position])
        batch = leaves(dims[0]) if position == 1 and not before else before if position == 0 else []
        if (len(batch) != 1 or batch[0] not in graph.batches) and node in graph.flows.live:
            yield node, f"the sequence is not dimension 1 in {graph.module(node)}"


def no_value_of_a_sequence(stream: Stream, graph: Graph) -> Iterator[tuple[Node, str]]:
    """A rank's flattened tokens may be of several sequences."""
    for node in graph.live(stream.nodes):
        for operand in node.all_input_nodes:
            dims = graph.inference.dims.get(operand)
            if operand in stream.nodes or not isinstance(dims, list):
                continue
            if any(a in graph.batches for dim in dims for a in leaves(dim)):
                yield node, f"the stream meets a value of each sequence in {graph.module(node)}"


def no_input_of_every_token(stream: Stream, graph: Graph) -> Iterator[tuple[Node, str]]:
    """Inputs and constants hold all tokens, and nothing splits them."""
    for node in stream.nodes:
        constant = node in graph.flows.constant and node in graph.flows.live and is_float(node)
        if node.op == "placeholder" or constant:
            yield node, f"the stream meets {node.name}, which is not split along the sequence"


def no_position_or_mask(stream: Stream, graph: Graph) -> Iterator[tuple[Node, str]]:
    for node in graph.live(graph.flows.constant & stream.nodes):
        yield node, f"a mask or position meets the stream in {graph.module(node)}"


def output_is_gathered(stream: Stream, graph: Graph) -> Iterator[tuple[None, str]]:
    if graph.traced.output() in stream.nodes:
        yield None, "the caller gets activations split along the sequence"


def parameters_on_one_side_only(stream: Stream, graph: Graph) -> Iterator[tuple[None, str]]:
    """One used on a rank's tokens and on all of them gets a gradient that is neither a partial sum nor complete."""
    flows = graph.flows
    rest = {n for n in graph.traced.nodes if n not in stream.nodes and n not in flows.params_of and n in flows.live}
    unsharded = {name for node, name in flows.inference.params.items() if not flows.is_sharded(node)}
    if both := stream.summed & parameters_of(rest, flows) & unsharded:
        yield None, f"{min(both)} is used inside and outside the stream"


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
"""The checks of a stream, by whether its tokens are flattened."""
