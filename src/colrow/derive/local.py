"""The trace on local shapes: does the model's Python code run on local shapes, and do what the plan says?

A copy of the model gets a rank's shapes of parameters and the extents that the plan's styles hand over at module
boundaries, and is traced again. Node by node it must be the global graph with local extents. Code that states a
global size (`view(..., self.num_heads, ...)`) shows here; integer attributes that hold such sizes are then tried, and
the ones that fix it become a part of the plan.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, Node

from colrow.derive.attributes import Attributes, AttributeSearch, Group
from colrow.derive.axes import find, leaves, size_of
from colrow.derive.choice import Choice
from colrow.derive.emit_modules import Emission
from colrow.derive.failure import ALIKE, Misfit, TraceError, does_not_fit
from colrow.derive.flattened import NotFlattenedError
from colrow.derive.flow import Flows
from colrow.derive.infer import NoRuleError, argument, computation, computes, facts_of, op_name, shape_of
from colrow.derive.reads import reads
from colrow.derive.rules_channels import channel_groups, channels_of
from colrow.derive.rules_pieces import PieceOfDim, slice_piece
from colrow.derive.sequence import Stream
from colrow.derive.sizes import Rules, find_sizes
from colrow.derive.trace import (
    Calls,
    Label,
    Rescale,
    Scale,
    Trace,
    decomposed,
    is_boundary,
    label_of,
    operators_like,
)
from colrow.derive.undecomposed import computing_nodes
from colrow.plans.patterns import is_within
from colrow.sharding.operators import Filling
from colrow.sharding.parameter_state import copied_model
from colrow.styles.base import set_attribute
from colrow.styles.local_sizes import write_local_sizes


@dataclass(frozen=True)
class Repairs:
    """What makes the model's code right on a rank's shapes."""

    attributes: Attributes = field(default_factory=dict)
    sizes: Rules = field(default_factory=dict)

    def write_to(self, modules: dict[str, dict[str, Any]]) -> None:
        """Into the styles of a plan."""
        for option, values in (("attributes", self.attributes), ("sizes", self.sizes)):
            for name, value in values.items():
                modules.setdefault(name, {"style": "replicate"})[option] = value


class LocalCheck:
    """Compares a rank's trace with the global one."""

    def __init__(
        self, model: nn.Module, traced: Trace, flows: Flows, emission: Emission, stream: Stream | None, inputs: Any
    ) -> None:
        self.model, self.traced, self.inputs = model, traced, inputs
        self.flows, self.emission, self.stream = flows, emission, stream
        self.choice: Choice = flows.choice
        self.visible = Choice(self.choice.tp, self.choice.atoms - self.choice.vocabulary, self.choice.groups)
        self.blocks = [name for name in emission.modules if emission.style(name).gathers_for_children]
        self.local_code = {name for name in emission.modules if emission.style(name).local}
        """Modules whose own code runs on shards, the modules inside of them left out."""
        self.expected: dict[Node, list[int] | None] = {}
        self.misfits: list[Misfit] = []
        """Why each set of repairs that was tried is not right."""
        for node in traced.nodes:
            if is_boundary(node):
                self.expected[node] = self.local_extents(node)

    def local_extents(self, node: Node) -> list[int] | None:
        dims = self.flows.inference.dims.get(node)
        if not isinstance(dims, list):
            return None
        # A mask or a table of positions is complete everywhere, but for what the code of a local block makes or gets:
        # there it has a rank's heads.
        if node in self.flows.constant and not (
            self.flows.path[node] in self.local_code
            or any(is_within(self.flows.path[node], b) for b in self.blocks)
            or self.flows.made_in(node, self.blocks)
        ):
            return shape_of(node)
        shape = self.visible.local_shape(dims)
        if self.stream is not None and node in self.stream.nodes and self._outer(node):
            shape[self.stream.axis.get(node, 1)] //= self.choice.tp
        return shape

    def piece(self, node: Node) -> tuple[PieceOfDim, PieceOfDim] | None:
        """What a slice takes of a sharded dim, and that on the first rank: start, length and the dim's extent."""
        try:
            source, dim, (start, length), step = slice_piece(node)
            sharded = self.flows.inference.of(source)[dim]
        except NoRuleError:
            return None
        if step != 1 or not self.visible.sharded(sharded):
            return None
        held = self.visible.indices(sharded, 0)
        first, end = (sum(i < bound for i in held) for bound in (start, start + length))
        return (start, length, size_of(sharded)), (first, end - first, len(held))

    def parts(self, node: Node) -> list[list[int]]:
        """The extents of all results of the operator that gives the node as one of them."""
        dims = self.flows.inference.dims.get(node.args[0]) if op_name(node) == "getitem" else None  # type: ignore[arg-type]
        return [self.visible.local_shape(each or []) for each in dims] if isinstance(dims, tuple) else []

    def _outer(self, node: Node) -> bool:
        """Nodes of the stream, except a boundary at which it is gathered."""
        if not is_boundary(node):
            return True
        scale = self.emission.scales.get(str(label_of(node)))
        return scale is None or scale[1] == 1

    # ------------------------------------------------------------------ the copy

    def local_model(self, repairs: Repairs) -> nn.Module:
        """The model with a rank's shapes; parameters that are not sharded are shared with the original."""
        clone = self.local_copy()
        for node, name in self.flows.inference.params.items():
            dims = self.flows.inference.of(node)
            if not self.visible.any_sharded(dims):
                continue
            names = [name, *(o for o, first in self.traced.ties.items() if first == name)]
            old = clone.get_parameter(name)
            new = nn.Parameter(old.new_empty(self.visible.local_shape(dims)), requires_grad=old.requires_grad)
            for each in names:
                parent, _, last = each.rpartition(".")
                clone.get_submodule(parent)._parameters[last] = new
        for name, node in self.emission.buffers.items():
            owner, _, last = name.rpartition(".")
            shape = self.visible.local_shape(self.flows.inference.of(node))
            clone.get_submodule(owner)._buffers[last] = clone.get_buffer(name).new_empty(shape)
        # LayerNorm checks its input's last dim against normalized_shape. Under sharded_norm DTensor's rule runs it on
        # the complete dim; this copy has plain tensors, so the shard's extent must stand there.
        for name in self.flows.wide:
            norm: Any = clone.get_submodule(name)
            if len(getattr(norm, "normalized_shape", ())) == 1 and norm.weight is not None:
                norm.normalized_shape = tuple(norm.weight.shape)
        for name, values in repairs.attributes.items():
            module = clone.get_submodule(name)
            for key, value in values.items():
                set_attribute(module, key, value, self.choice.tp)
        for name, sizes in repairs.sizes.items():
            write_local_sizes(clone.get_submodule(name), sizes, self.choice.tp)
        return clone

    def rescale(self) -> Rescale:
        return lambda label: self.emission.scales.get(label)

    # ------------------------------------------------------------------ comparing

    def mismatch(self, repairs: Repairs, *, boundaries: bool = True) -> Misfit | None:
        """Why a rank's trace is not the global one with local extents; None when it is.

        Args:
            boundaries: what modules get and return is compared first.
        """
        if (why := self._misfit(repairs, boundaries)) is not None:
            self.misfits.append(why)
        return why

    def fails_like(self, other: LocalCheck) -> bool:
        """Whether all modules that did not fit in `other`, of the same split, run here before the first node of which a
        rank has other extents than there: then none of what was tried there fits here."""
        failed = {misfit.module or "" for misfit in other.misfits}
        changed = (self.emission.attributes, self.emission.buffers) != (
            other.emission.attributes,
            other.emission.buffers,
        )
        for node in self.traced.nodes:
            changed = changed or self._demands(node) != other._demands(node)
            if changed and any(is_within(self.flows.path[node], module) for module in failed):
                return False
        return bool(failed) and "" not in failed  # of the model's own code it is not known where it fails

    def _demands(self, node: Node) -> tuple[list[int] | None, Scale | None]:
        return self.local_extents(node), self.emission.scales.get(str(label_of(node))) if is_boundary(node) else None

    def _misfit(self, repairs: Repairs, boundaries: bool) -> Misfit | None:
        model = self.local_model(repairs)
        try:
            found, calls = operators_like(self.traced, model, self.inputs, self.rescale())
            if boundaries and (wrong := self._wrong_boundary(calls)) is not None:
                return wrong
            if self._is_alike(found.graph):
                return None
            rank_nodes = [n for n in decomposed(found).graph.nodes if computes(n)]
        except NotFlattenedError:
            return Misfit("a rank's code writes into memory in another way", None)
        except TraceError as error:
            return does_not_fit(model, error.__cause__ or error)
        # Both graphs come from the same Python code, so their operators correspond one to one, unless that code
        # branches on a size that is now a rank's.
        nodes = [n for n in self.traced.nodes if computes(n)]
        for node, on_rank in zip(nodes, rank_nodes, strict=False):
            where = self.flows.path[node] or "the model"
            why = self._difference(node, on_rank, where)
            if why is not None:
                return Misfit(why, self.flows.path[node])
        if len(nodes) != len(rank_nodes):
            return Misfit(f"a rank runs {len(rank_nodes)} operations, the unsharded model {len(nodes)}", None)
        return None

    def _is_alike(self, graph: Graph) -> bool:
        """Whether a rank's graph before decompositions is right. Where that cannot be said of it, the decomposed graph
        says it: see [Note: undecomposed graphs]."""
        known, rank_nodes = self.traced.undecomposed, computing_nodes(graph)
        if len(rank_nodes) != len(known.nodes) or not known.shows(self._differs, self._needs_itself):
            return False
        for node, on_rank in zip(known.nodes, rank_nodes, strict=True):
            if computation(node) != computation(on_rank) or _numbers(node) != _numbers(on_rank):
                return False
            result = known.result.get(node)
            if result is not None and self._value_difference(result, on_rank, "") is not None:
                return False
        return True

    def _differs(self, node: Node) -> bool:
        extents = self.local_extents(node)
        return extents is not None and extents != shape_of(node)

    def _needs_itself(self, node: Node) -> bool:
        facts = facts_of(node)
        of_positions = facts.fills is Filling.POSITION or facts.takes_part
        return facts.groups is not None or bool(_numbers(node)) or (of_positions and node in self.flows.constant)

    def _difference(self, node: Node, on_rank: Node, where: str) -> str | None:
        if computation(node) != computation(on_rank):
            return f"{where} runs {op_name(on_rank)} on a rank where the unsharded model runs {op_name(node)}"
        if (why := self._value_difference(node, on_rank, where)) is not None:
            return why
        if _numbers(node) != _numbers(on_rank):
            return f"{op_name(node)} in {where} computes with {_numbers(on_rank)} on a rank, not {_numbers(node)}"
        return None

    def _value_difference(self, node: Node, on_rank: Node, where: str) -> str | None:
        extents = self.local_extents(node)
        value = on_rank.meta.get("val")
        if node in self.flows.constant and isinstance(value, Tensor):  # outside of blocks it may have either
            dims = self.flows.inference.dims.get(node)
            if isinstance(dims, list) and list(value.shape) == self.visible.local_shape(dims):
                extents = list(value.shape)
        if extents is not None and isinstance(value, Tensor) and list(value.shape) != extents:
            what = f"{op_name(node)} in {where}"
            if is_boundary(node):
                what = f"the {'input' if label_of(node).direction == 'in' else 'output'} of {where}"
            return f"{what} has the shape {list(value.shape)} on a rank, not {extents}"
        if extents is not None and extents != shape_of(node) and self._same_on_all(node, on_rank):
            return f"{op_name(node)} in {where} {ALIKE}"
        # Depthwise and grouped convolutions, group norms: shapes fit with the wrong number of groups too.
        if (position := facts_of(node).groups) is not None:
            groups = channel_groups(node, self.visible.local_size(channels_of(self.flows.inference, node)))
            if (local := argument(on_rank, position, "groups", 1)) != groups:
                return f"{op_name(node)} in {where} has {local} groups on a rank, not {groups}"
        return None

    def _same_on_all(self, node: Node, on_rank: Node) -> bool:
        """Whether a constant that differs along its split axis is made, or sliced, alike on all ranks: the first heads'
        slopes where each rank needs its own."""
        facts = facts_of(node)
        if node not in self.flows.constant:
            return False
        if facts.fills is Filling.POSITION:
            return True
        if not facts.takes_part:  # pieces of a split are compared with the complete tensor's by their extents
            return False
        source, local = node.args[0], on_rank.args[0]
        return isinstance(source, Node) and isinstance(local, Node) and shape_of(source) == shape_of(local)

    def local_copy(self) -> nn.Module:
        """A copy that shares the parameters and buffers."""
        shared = {id(t): t for t in itertools.chain(self.model.parameters(), self.model.buffers())}
        return copied_model(self.model, shared)

    def _wrong_boundary(self, calls: Calls) -> Misfit | None:
        # a module may be called several times: its boundaries are compared in the order of the calls
        wanted: dict[str, list[list[int] | None]] = {}
        for node in self.expected:
            wanted.setdefault(str(label_of(node)), []).append(self._before(node))
        for label, shape in calls.shapes:
            extents = wanted[label].pop(0) if wanted.get(label) else None
            if extents is not None and list(shape) != extents:
                at = Label.parse(label)
                what = "input" if at.direction == "in" else "output"
                return Misfit(f"{at.module} has an {what} of {list(shape)} on a rank, not {extents}", at.module)
        return None

    def _before(self, node: Node) -> list[int] | None:
        """The extents at a boundary before its change."""
        extents = self.expected[node]
        scale = self.emission.scales.get(str(label_of(node)))
        if extents is None or scale is None:
            return extents
        extents = list(extents)
        extents[scale[0]] = extents[scale[0]] * scale[2] // scale[1]
        return extents

    # ------------------------------------------------------------------ attributes, and sizes in code

    def repair(self, known: Repairs | None = None) -> Repairs:
        """The smallest set of integer attributes that makes a rank's trace right, or where none does, the sizes in code
        that do; only `known` is tried if given.

        Raises:
            TraceError: nothing does; the text is what is wrong without any.
        """
        if known is not None:
            why = self.mismatch(known)
            if why is not None:
                raise TraceError(why.why, why.module)
            return known
        search = AttributeSearch(
            self.model,
            self.emission.attributes,
            lambda found: self.mismatch(Repairs(found)),
        )
        if (attributes := search.found(self.candidates)) is not None:
            return Repairs(attributes)
        with_sizes = self.with_sizes(search.first)
        if isinstance(with_sizes, Repairs):
            return with_sizes
        first = with_sizes or search.first
        assert first is not None
        raise TraceError(first.why, first.module)

    def with_sizes(self, first: Misfit | None) -> Repairs | Misfit | None:
        """Sizes in code that make a rank's trace right, or what is wrong behind them; None where they change nothing
        in the module that does not fit `first`."""
        # First rules that leave open what a rank writes too; then, where those match calls that they should not, with
        # these sizes as well.
        tried: Rules | None = {}
        last: Misfit | None = None
        for literal in (False, True):
            sizes = find_sizes(self, self.local_model(Repairs(self.emission.attributes)), literal=literal)
            if sizes and sizes != tried:
                repairs = Repairs(self.emission.attributes, sizes)
                if (why := self.mismatch(repairs, boundaries=False)) is None:
                    return repairs
                last = why if first is not None and first.module in sizes else last
            tried = sizes
        return last

    def counts(self, module: str) -> set[int]:
        """The sizes of the classes that are sharded in the parameters of a module and those inside it."""
        params = self.flows.inference.params
        dims = [d for n, f in params.items() if f.startswith(f"{module}.") for d in self.flows.inference.of(n)]
        return {atom.size for atom in self.visible.chosen(dims)}

    def candidates(self) -> dict[Group, dict[str, Any]]:
        """Attributes that a block's forward reads and that hold a size of which a rank has less:
        (class, attribute) to module name to local value."""
        sizes: dict[int, Any] = {}
        for node in self.traced.nodes:
            for dim in itertools.chain(*self.flows.inference.tensors(node)):
                # 64 columns of [8 heads, 8 head_dim] shard the sizes 8 and 64: code may hold either.
                for piece in [[atom] for atom in leaves(dim)] + [dim]:
                    if self.visible.sharded(piece):
                        size, local = size_of(piece), self.visible.local_size(piece)
                        sizes.setdefault(size, "/tp" if local * self.choice.tp == size else local)
        for kv, group in self.visible.groups.items():
            local, share = self.visible.query_heads(kv)
            sizes[kv.size], sizes[find(group).size] = local // share, share
            sizes[kv.size * find(group).size] = "/tp"
        found: dict[Group, dict[str, Any]] = {}
        owners = frozenset(
            f.rpartition(".")[0]
            for n, f in self.flows.inference.params.items()
            if self.visible.any_sharded(self.flows.inference.of(n))
        )
        if (read := self.traced.reads.get(owners)) is None:
            read = self.traced.reads[owners] = reads(self.local_copy(), owners, self._run)
        for name, key, value in read:
            # Of 8 heads of 8 the head's width has a size of which a rank seems to have less. It never has: heads are
            # split, not their width.
            if value in sizes and key.rpartition(".")[2] != "head_dim":
                class_name = type(self.model.get_submodule(name)).__name__
                found.setdefault((class_name, key), {})[name] = sizes[value]
        return found

    def _run(self, model: nn.Module) -> None:
        """A copy of the model, with the unsharded sizes."""
        operators_like(self.traced, model, self.inputs)


def _numbers(node: Node) -> list[float]:
    """Numbers among the arguments that go into values: scales, epsilons, a count that is divided by."""
    out: list[float] = []
    number_types = (float, int) if facts_of(node).counts else (float,)

    def walk(value: Any) -> None:
        if isinstance(value, number_types):
            out.append(value)
        elif isinstance(value, (tuple, list)):
            for item in value:
                walk(item)
        elif isinstance(value, dict):
            for item in value.values():
                walk(item)

    walk(node.args)
    walk(dict(node.kwargs))
    return out
