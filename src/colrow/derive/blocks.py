"""Find the blocks of a model: modules that take the stream in once and give one sum back.

A block is the smallest module around what shards one class (q, k, v and o; gate, up and down), widened as long as the
flow of gradients stays sound: a mixture of experts with its router and its shared expert is one block. Where there is
none, each column product is prepared on its own.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

from torch.fx import Node

from colrow.derive.axes import Atom
from colrow.derive.bare_heads import BareHead, bare_head, no_head
from colrow.derive.flow import Flow, Flows, SpmdType, ancestors
from colrow.derive.infer import is_float, is_lookup, op_name
from colrow.derive.trace import is_boundary, label_of
from colrow.plans.patterns import is_within


@dataclass
class SplitBlock:
    """A module, where it is entered, and what its outputs are."""

    module: str
    entries: set[Node] = field(default_factory=set)
    """Its inputs (or those of leaves inside it) that are used differently on each rank."""
    deferred: bool = False
    """Sums stay open until the block's output; otherwise each row product reduces its own."""
    leaf: bool = False
    """The entries are those of single column products."""
    flow: Flow = field(default_factory=Flow)


class SplitError(Exception):
    """A chosen class cannot be split soundly."""

    def __init__(self, atoms: set[Atom], why: str) -> None:
        super().__init__(why)
        self.atoms, self.why = atoms, why


class BlockFinder:
    """Blocks of a choice."""

    def __init__(self, flows: Flows, column_blocks: bool = False) -> None:
        self.inner: set[Node] = set()
        """See `use_inner_sums`."""
        self.from_inner: set[Node] = set()
        """Unsharded activations that are made of inner sums alone."""
        self.column_blocks = column_blocks
        """Gather for the module around column products, where their row product lies outside of it (BERT's attention):
        under flattened tokens that module's own code must see all tokens."""
        self.flows, self.inference, self.choice = flows, flows.inference, flows.choice
        self.nodes = list(self.inference.graph.nodes)
        self.boundaries: dict[str, list[Node]] = {}
        for node in self.nodes:
            if is_boundary(node):
                self.boundaries.setdefault(label_of(node).module, []).append(node)
        self.owners = self._weight_owners()
        self.order = {node: i for i, node in enumerate(self.nodes)}
        self._inside: dict[str, list[Node]] = {}
        self.bare_heads: dict[Node, BareHead] = {}

    # ------------------------------------------------------------------ components

    def _weight_owners(self) -> dict[Node, str]:
        """For each contraction over a sharded axis, the module that owns its weight."""
        owners = {}
        for node in self.nodes:
            if self.flows.is_reduction(node):
                names = set().union(*(self.flows.params_of.get(i, set()) for i in node.all_input_nodes))
                # of what the product is made of, the parameters that are split: not a scale or a bias beside them
                weights = {
                    n
                    for n in names
                    if any(f == n and self.flows.is_sharded(p) for p, f in self.inference.params.items())
                }
                path = self.flows.path[node]  # of tied weights the one that is used here
                here = any(path in self.flows.sharers[n] for n in weights)
                called = (self.flows.owners[n] for n in sorted(weights) if self.flows.owners[n] in self.boundaries)
                owners[node] = path if here else next(called, path)
        return owners

    def components(self) -> dict[str, list[Node]]:
        """The innermost common module of each connected sharded region, and the reductions that end it there."""
        found: dict[str, list[Node]] = {}
        for node in self.owners:
            if is_lookup(node):
                continue
            region = self.region(node)
            # Markers and constants are left out: they stand in the caller's code, and would widen the common module.
            paths = [
                self.flows.path[n].split(".") for n in region if not is_boundary(n) and self.flows.is_activation(n)
            ]
            found.setdefault(".".join(_common(paths)), []).append(node)
        return found

    def region(self, end: Node) -> set[Node]:
        """Sharded activations that end in this contraction, and the contraction itself."""
        seen, todo = {end}, [end]
        while todo:
            for node in todo.pop().all_input_nodes:
                if node in seen or node in self.inference.params or not self.flows.is_sharded(node):
                    continue
                seen.add(node)
                todo.append(node)
        return seen

    def columns(self, region: set[Node]) -> set[Node]:
        """Nodes that make shards out of unsharded activations."""
        # A product whose result is sharded and whose activations are not: x W^T with W split by its outputs. A
        # reduction ends a region, and what is made of inner sums alone needs no gather.
        return {
            node
            for node in region
            if self.flows.is_activation(node)
            and not is_boundary(node)
            and not self.flows.is_reduction(node)
            and any(
                self.flows.is_activation(i) and not self.flows.is_sharded(i) and i not in self.from_inner
                for i in node.all_input_nodes
            )
        }

    # ------------------------------------------------------------------ sums inside of a block

    def use_inner_sums(self) -> bool:
        """Take sums that a region makes of its own shards, and meets with them again, for REPLICATED values: the step,
        input and output of a state-space model, made of all channels and used by each. False: there are none."""
        regions = {node: self.region(node) for node in self.owners if not is_lookup(node)}
        shards = {node: {n for n in region if self.flows.is_activation(n)} for node, region in regions.items()}
        for end, region in shards.items():
            behind = ancestors(region)
            # `other` ends before `end` begins, and both regions hold the same shards: they meet again behind the sum
            for other in shards:
                if other is not end and other in behind and shards[other] & region - {other}:
                    self.inner |= set(self.outputs(self.owners[other]))
        self.from_inner |= self.inner
        for node in self.nodes:
            if node.op == "call_function" and self.flows.is_activation(node) and not self.flows.is_sharded(node):
                made_of = [i for i in node.all_input_nodes if self.flows.is_activation(i)]
                if made_of and all(i in self.from_inner for i in made_of):
                    self.from_inner.add(node)
        return bool(self.inner)

    def has_inner_sum(self, module: str) -> bool:
        return any(b in self.inner for b in self.outputs(module))

    # ------------------------------------------------------------------ blocks

    def inputs(self, module: str) -> list[Node]:
        """The boundaries at which tensors enter the module."""
        return [b for b in self.boundaries.get(module, []) if label_of(b).direction == "in"]

    def outputs(self, module: str) -> list[Node]:
        return [b for b in self.boundaries.get(module, []) if label_of(b).direction == "out"]

    def around(self, module: str) -> str:
        """The innermost module at or around this name whose inputs are marked; '' for the model."""
        while module and module not in self.boundaries:
            module = module.rpartition(".")[0]
        return module

    def is_lookup(self, boundary: Node) -> bool:
        """Whether the boundary's module looks up rows of a sharded table."""
        name = label_of(boundary).module
        return any(owner == name and is_lookup(node) for node, owner in self.owners.items())

    def interior(self, module: str) -> list[Node]:
        if module not in self._inside:
            self._inside[module] = [n for n in self.nodes if n.op == "call_function" and self.flows.inside(n, module)]
        return self._inside[module]

    def ends(self, reductions: list[Node]) -> set[Node]:
        """The output boundaries of the modules that own the reductions."""
        return {b for n in reductions for b in self.outputs(self.owners[n])}

    def attempt(self, module: str, reductions: list[Node], deferred: bool) -> SplitBlock | None:
        """The block at `module`, if gradients flow soundly in it."""
        inputs, outputs = self.inputs(module), self.outputs(module)
        differentiable = [b for b in inputs if b not in self.flows.constant]
        if not differentiable or not outputs:
            return None
        # The sum of a product that is the module's own can only be reduced at the module's output.
        own, interior = set(outputs), set(self.interior(module)) | set(outputs)
        deferred = deferred or any(self.owners[n] == module for n in reductions)
        exits = self.inner - own if deferred else self.ends(reductions) - own
        leaving = self._leaving(interior, own)
        found = self._flow_inside(module, inputs, exits, leaving)
        if found is None:
            return None
        flow, types = found
        # Types are sound inside. At the border, each of these would leave a gradient summed twice, or not at all.
        if self._uses_behind(module, flow) or self._ends_varying(own, flow):
            return None
        if self._leaves_past(interior, own, leaving, flow):
            return None
        entries = {b for b, spmd_type in types.items() if spmd_type is SpmdType.REPLICATED and b in self.flows.live}
        return SplitBlock(module, entries, deferred, False, flow)

    def _flow_inside(
        self, module: str, inputs: list[Node], exits: set[Node], leaving: set[Node]
    ) -> tuple[Flow, dict[Node, SpmdType]] | None:
        """The flow without clashes, and the types of the inputs with gradients: first all are gathered, then those that
        clash (a residual among them) are released, one after another."""
        constants = {b: self.flows.constant_type(b) for b in inputs if b in self.flows.constant}
        # Each round releases one input, so there are at most as many rounds as inputs, and one for the last check.
        types = dict.fromkeys((b for b in inputs if b not in self.flows.constant), SpmdType.REPLICATED)
        for _ in range(len(types) + 1):
            given = {**self._outside(module), **constants, **types}
            flow = self.flows.run([*self.interior(module), *self.outputs(module)], self.inner, exits, given, leaving)
            if not flow.clashes:
                return flow, types
            loose = self._to_release(flow, types)
            if loose is None:
                return None
            types[loose] = SpmdType.INVARIANT
        return None

    def _ends_varying(self, own: set[Node], flow: Flow) -> bool:
        """Whether an output differs between ranks. A shard may leave where only sharded operations use it: a row
        product in a sibling module."""
        ends = self.flows.live & own
        return any(
            flow.types[b] is SpmdType.REPLICATED or (flow.types[b] is SpmdType.SHARDED and not self.flows.is_sharded(b))
            for b in ends
        )

    def _leaves_past(self, interior: set[Node], own: set[Node], leaving: set[Node], flow: Flow) -> bool:
        """Whether an activation is used outside without passing the block's boundary."""
        return any(
            any(user not in interior and user.op != "output" for user in node.users)
            and (node not in leaving or flow.types[node] is not SpmdType.INVARIANT)
            for node in (interior - own) & self.flows.live
            if self.flows.is_activation(node)
        )

    def _uses_behind(self, module: str, flow: Flow) -> bool:
        """Whether a parameter of the module's own (a layer's scale) is used behind the reduction: the block lies inside
        of it, for a block sums the gradients of its parameters."""
        return any(self.flows.owners[name] == module for name in flow.same - flow.summed)

    def _leaving(self, interior: set[Node], own: set[Node]) -> set[Node]:
        """Outputs of the block, or of modules inside it, that auxiliary losses alone use, outside of it."""
        found = {n for n in interior & self.flows.live - self.flows.for_main if is_boundary(n)}
        return {n for n in found if label_of(n).direction == "out" and (n in own or not interior & n.users.keys())}

    def _outside(self, module: str) -> dict[Node, SpmdType]:
        """Parameters and constants that the interior uses from outside."""
        out = {}
        for node in self.interior(module):
            for i in node.all_input_nodes:
                if not self.flows.is_activation(i) and (i.op != "call_function" or not self.flows.inside(i, module)):
                    # a mask of the model, or a parameter that another module holds
                    rest = SpmdType.PARAMETER if i in self.inference.from_params else SpmdType.CONSTANT
                    out[i] = SpmdType.SHARDED if self.flows.is_sharded(i) else rest
        return out

    def _to_release(self, flow: Flow, types: dict[Node, SpmdType]) -> Node | None:
        """An input that clashes only with reduced activations: it belongs to the stream (a residual)."""
        # Back from the first clash, through operators of one operand, to the input that it comes from.
        node, _ = flow.clashes[0]
        for i in node.all_input_nodes:
            source = i
            while source not in types and source.op == "call_function" and len(source.all_input_nodes) == 1:
                source = source.all_input_nodes[0]
            if types.get(source) is SpmdType.REPLICATED and flow.types.get(i) is SpmdType.REPLICATED:
                return source
        return None

    def find(self) -> list[SplitBlock]:
        """Blocks for every component.

        Raises:
            SplitError: a component has no sound block; its classes must not be sharded.
        """
        components = self.components()
        blocks: dict[tuple[str, bool], SplitBlock] = {}
        inner: dict[str, SplitBlock] = {}
        for module, reductions in components.items():
            # inside a block that was found for another component: its entries and sums serve this one too
            if any(is_within(module, b.module) for b in blocks.values() if not b.leaf):
                continue
            block = self._widest_block(module, components)
            # Under flattened tokens the module around the columns gathers, and no column has to on its own.
            if block is None and self.column_blocks:
                around = [self._around_columns(module, node) for node in reductions]
                inner |= {b.module: b for b in around if b is not None}
                reductions = [node for node, b in zip(reductions, around, strict=True) if b is None]
                if not reductions:
                    continue
            if block is None:
                inner |= {b.module: b for b in self._around_meetings(reductions)}
            block = block or self.separate_columns(module, reductions)
            if block.leaf:
                # several components of one module: all their columns are entries
                old = blocks.get((block.module, True))
                block.entries |= old.entries if old else set()
            else:
                # the wider block takes the place of those inside of it
                blocks = {key: b for key, b in blocks.items() if not b.module.startswith(f"{block.module}.")}
            blocks[block.module, block.leaf] = block
        outer = [b for b in blocks.values() if not b.leaf]
        for block in blocks.values():
            if block.leaf:
                block.entries = {
                    e
                    for e in block.entries
                    if not any(is_within(label_of(e).module, m) for m in inner)
                    # another block has gathered it: values of its heads that a later layer mixes in (iTransformer)
                    and not any(b.flow.types.get(e) is SpmdType.REPLICATED for b in outer)
                }
        return [
            *(b for b in blocks.values() if b.entries or not b.leaf),
            *(b for b in inner.values() if not any(is_within(b.module, other.module) for other in outer)),
        ]

    def _widest_block(self, module: str, components: dict[str, list[Node]]) -> SplitBlock | None:
        """The first sound block at `module` or at most two levels around it, widened as long as it stays sound."""
        best, where = None, module
        while where:
            within = [n for m, ns in components.items() if is_within(m, where) for n in ns]
            # the sums of several weights are left open first: one reduction at the block's end in place of many
            several = len({self.owners[n] for n in within}) > 1 or (best is not None and best.deferred)
            block = self.attempt(where, within, several) or self.attempt(where, within, not several)
            if block is None and best is not None:
                break
            best, where = block or best, where.rpartition(".")[0]
            # Further out stands the layer itself, whose residual bypasses the block.
            if best is None and module.count(".") - where.count(".") > 2:
                break
        return best

    def _around_columns(self, module: str, reduction: Node) -> SplitBlock | None:
        """The block at the innermost module inside `module` that holds the column products of this reduction: shards
        leave it."""
        parents = [self.flows.path[node].split(".")[:-1] for node in self.columns(self.region(reduction))]
        where = ".".join(_common(parents))
        return self.attempt(where, [], False) if is_within(where, module) and where != module else None

    def _around_meetings(self, reductions: list[Node]) -> list[SplitBlock]:
        """Blocks at the modules whose own code makes shards out of two activations (queries and their angles), which
        no column product can gather; shards leave them."""
        found = []
        for node in self.columns(set().union(*(self.region(n) for n in reductions))):
            met = [i for i in node.all_input_nodes if self.inference.is_weight(i) and self.flows.is_sharded(i)]
            block = None if met or not self.flows.path[node] else self.attempt(self.flows.path[node], [], False)
            found += [block] if block is not None else []
        return found

    def separate_columns(self, module: str, reductions: list[Node]) -> SplitBlock:
        """Each column product is entered on its own; whoever else makes shards has no entry."""
        region = set().union(*(self.region(n) for n in reductions))
        entries = set()
        for node in self.columns(region):
            name = self.flows.path[node]
            ins = [b for b in self.inputs(name) if b not in self.flows.constant]
            if not ins:
                raise SplitError(
                    # of the regions of one module only that one: beside a timestep's frequencies, what they modulate
                    self.atoms_of({node}) or self.atoms_of(region),
                    f"no module stands between the stream and {op_name(node)} in {name or 'the model'}",
                )
            entries |= set(ins)
        return SplitBlock(module, entries, False, True)

    def atoms_of(self, nodes: set[Node]) -> set[Atom]:
        """Chosen classes that stand in these nodes."""
        return {atom for node in nodes for dims in self.inference.tensors(node) for atom in self.choice.chosen(dims)}

    def borders(self, blocks: list[SplitBlock]) -> tuple[set[Node], set[Node]]:
        """All boundaries where the stream enters blocks, and all where a sum over ranks is reduced."""
        entries = set().union(*(b.entries for b in blocks), self.head_entries(), self.inner)
        deferred = [b.module for b in blocks if b.deferred]
        reducing = [name for name in self.owners.values() if not any(is_within(name, module) for module in deferred)]
        exits = {b for module in (*deferred, *reducing) for b in self.outputs(module)} | self.inner
        return entries, exits.difference(*(b.flow.left for b in blocks))

    def head_entries(self) -> set[Node]:
        """Inputs of the modules that make the vocabulary's logits."""
        out = set()
        for node in self.nodes:
            if node.op != "call_function" or not self.flows.is_sharded(node) or is_boundary(node) or is_lookup(node):
                continue
            if (
                node in self.inference.from_params
                or self.flows.is_reduction(node)
                or not self.atoms_of({node}) & self.choice.vocabulary
            ):
                continue
            if any(not self.flows.is_sharded(i) and i not in self.flows.constant for i in node.all_input_nodes):
                name = self.flows.path[node]
                ins = [b for b in self.inputs(name) if is_float(b)]
                names = set().union(*(self.flows.params_of.get(i, set()) for i in node.all_input_nodes))
                # no module of its own makes the logits: `h @ embed.weight.T` in the model's code
                if not ins or not any(name in self.flows.sharers[n] for n in names):
                    if self.column_blocks or (head := bare_head(self, node)) is None:
                        raise SplitError(self.atoms_of({node}) & self.choice.vocabulary, no_head(self, node))
                    self.bare_heads[node] = head
                    ins = [head.entry]
                out |= set(ins)
        return out


def _common(paths: list[list[str]]) -> list[str]:
    alike = itertools.takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    return [parts[0] for parts in alike]
