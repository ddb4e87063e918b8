"""The style of each module that holds sharded parameters: column, row, packed, head, embedding, norm."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from colrow.derive.axes import Atom, Dim, find, leaves
from colrow.derive.blocks import SplitBlock, SplitError
from colrow.derive.choice import Choice
from colrow.derive.infer import argument, facts_of, module_path
from colrow.derive.rules_channels import channels_of
from colrow.derive.sequence import Stream
from colrow.derive.split import Split
from colrow.derive.trace import Scale, Trace, label_of
from colrow.plans.patterns import is_within
from colrow.styles.base import STYLES, Style
from colrow.styles.fast.linear import is_linear
from colrow.styles.local_block import BlockShards, LocalShards
from colrow.styles.packed import is_transposed
from colrow.styles.replicated import LEFT_OUT, KvReplicate
from colrow.styles.shards import ShardSpec

_CHANNELS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.GroupNorm,
)


@dataclass
class Emission:
    """The styles of one plan, and where the trace on local shapes changes extents."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    loss: str = "replicated"
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Attributes that are certain to need a local value."""
    gathered: frozenset[str] = frozenset()
    """Parameters of layers whose output is gathered, and those gathered: see `derive.gathered`."""
    buffers: dict[str, Node] = field(default_factory=dict)
    """Buffers of which a rank uses some rows, by name, and their nodes."""

    def style(self, name: str) -> type[Style]:
        """The class of a module's style; that of modules left out of the plan where it has none."""
        return STYLES[self.modules.get(name, {}).get("style", LEFT_OUT.name)]

    def selects_rows(self, parameter: str, tp: int) -> bool:
        """Whether every rank holds all of a split parameter, and uses some rows: kv heads that tp does not divide."""
        owner, _, name = parameter.rpartition(".")
        options = self.modules.get(owner, {})
        spec = options.get("shards", {}).get(name) if "shards" in options else options
        selects = isinstance(spec, dict) and "segments" in spec and ShardSpec.declared(0, spec, 0).held(tp).uneven
        return selects or issubclass(self.style(owner), KvReplicate)


class ModuleEmitter:
    """Styles of modules that hold sharded parameters."""

    def __init__(self, model: nn.Module, traced: Trace, split: Split, stream: Stream | None) -> None:
        self.model, self.traced, self.stream = model, traced, stream
        self.flows, self.finder, self.blocks, self.flow = split.flows, split.finder, split.blocks, split.flow
        self.choice: Choice = self.flows.choice
        self.tp = self.choice.tp
        self.inside = "shard(1)" if stream is not None else "replicate"
        self.early = stream is not None and not stream.ends.start  # from the embedding on
        self.out = Emission()
        self.dims = {name: self.flows.inference.of(node) for node, name in self.flows.inference.params.items()}
        self.owned: dict[str, list[str]] = defaultdict(list)
        modules = {name for name, _ in model.named_modules()}  # a module with two names gets its styles by the first
        for name in self.dims:
            if self.choice.any_sharded(self.dims[name]):
                for owner in {name, *(o for o, first in traced.ties.items() if first == name)}:
                    module, _, parameter = owner.rpartition(".")
                    if module in modules:
                        self.owned[module].append(parameter)
        self.buffers = {
            traced.buffers[node.name]: node
            for node in self.flows.inference.graph.nodes
            if node.name in traced.buffers and self.flows.is_sharded(node)
        }
        self.entries, self.exits = split.borders()

    # ------------------------------------------------------------------ modules with shards

    def _put(self, name: str, **options: Any) -> None:
        self.out.modules.setdefault(name, {}).update(options)

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def _dims(self, name: str, parameter: str) -> list[Dim]:
        full = f"{name}.{parameter}"
        return self.dims[self.traced.ties.get(full, full)]

    def _dim_of(self, name: str, parameter: str) -> tuple[int, Dim]:
        """The dimension that is sharded, and its position."""
        dims = self._dims(name, parameter)
        position = next(k for k, dim in enumerate(dims) if self.choice.sharded(dim))
        return position, dims[position]

    def _is_linear(self, name: str) -> bool:
        """Whether torch's own styles can take the module; they know no transposed weights."""
        module = self._module(name)
        return isinstance(module, nn.Linear) and is_linear(module)

    def _shards(self, name: str, locals_: set[str]) -> None:
        """The style of a module with sharded parameters; `locals_` are the blocks that run on local tensors.

        What the module is decides, from the special to the general: the block itself, a norm over a sharded axis, an
        embedding whose rows are split, a product; anything else has no style that splits it, and must lie in a block
        that runs on local tensors, where its forward sees shards, or take one activation and hold what it reads.
        """
        module, parameters = self._module(name), self.owned[name]
        if not name:
            atoms = self.choice.chosen(dim for parameter in parameters for dim in self.dims[parameter])
            raise SplitError(atoms, f"the model itself holds {parameters[0]}, and styles split what its modules hold")
        block = next((b for b in self.blocks if not b.leaf and is_within(name, b.module)), None)
        in_local = block is not None and block.module in locals_
        # Vocabularies alone may be split unevenly: see [Note: uneven vocabulary].
        uneven = {atom for atom in self._atoms(name) & self.choice.atoms if atom.size % self.tp}
        if uneven and not (isinstance(module, nn.Embedding) or self._multiplies_by_weight(name)):
            raise SplitError(uneven, f"{name} is neither embedding nor head, whose shards alone need not be equal")
        if name in locals_:
            self._put(name, style="local_block", shards={p: self._shard_spec(name, p) for p in parameters})
        elif name in self.flows.wide:
            self._require_last_dim(name)
            self._put(name, style="sharded_norm")
        elif isinstance(module, nn.Embedding) and self._dim_of(name, "weight")[0] == 0:
            self._embedding(name)
        elif self._multiplies_by_weight(name) and (name in self.flows.called or not in_local):
            self._product(name, in_local, block)
        elif (outputs := self._atoms(name) & self.choice.vocabulary) and not self._holds_for_others(name):
            raise SplitError(outputs, f"{name} makes the model's output and is no linear layer")
        elif in_local or self._can_stand_alone(name) or self._reads_its_own(name) or self._holds_for_others(name):
            self._put(name, style="local_shards", shards={p: self._shard_spec(name, p) for p in parameters})
        else:
            raise SplitError(
                self.finder.atoms_of(set(self.flows.inference.params)) & self._atoms(name),
                f"{name} is not in a block that runs on local tensors",
            )

    def _require_last_dim(self, name: str) -> None:
        """Raise SplitError for a norm that transposes its input: style sharded_norm takes the last dim for sharded."""
        for boundary in self.finder.inputs(name):
            dims = self.flows.inference.dims.get(boundary)
            if isinstance(dims, list) and any(self.choice.sharded(dim) for dim in dims[:-1]):
                raise SplitError(self._atoms(name), f"{name} normalises over another dim of its input than the last")

    def _buffers(self) -> None:
        """Let a rank use its rows of a buffer, where the module that reads it runs on shards and nobody else reads
        it."""
        for name, node in self.buffers.items():
            owner, _, buffer = name.rpartition(".")
            if all(self.flows.path[user] == owner for user in node.users) and issubclass(
                self.out.style(owner), (LocalShards, BlockShards)
            ):
                self.dims[name] = self.flows.inference.of(node)
                self.out.modules[owner].setdefault("shards", {})[buffer] = self._shard_spec(owner, buffer)
                self.out.buffers[name] = node

    def _can_stand_alone(self, name: str) -> bool:
        """Whether the module takes one activation and no other code reads what it holds: it may lie outside a block,
        between column products that hand over local tensors. A linear layer that is no nn.Linear, a gate's weights."""
        module, inputs = self._module(name), self.finder.inputs(name)
        if isinstance(module, _CHANNELS):
            return True
        takes_one = [label_of(b).path for b in inputs] == ["0"]
        return next(module.children(), None) is None and takes_one and self._reads_its_own(name)

    def _reads_its_own(self, name: str) -> bool:
        """Whether no other code reads what the module holds. Then its forward may see shards of it, between products
        that hand over local tensors, though its input is the stream's: a state-space block with its residual."""
        own = {node for node, full in self.flows.inference.params.items() if self.flows.owners[full] == name}
        readers = {self.flows.path[user] for node in own for user in node.users}
        shared = any(self.flows.sharers[self.flows.inference.params[node]] != {name} for node in own)
        return name in self.flows.called and readers <= {name} and not shared

    def _holds_for_others(self, name: str) -> bool:
        """Whether all parameters of the module are tied to those of other modules, and its own code reads none of them:
        the bias of BERT's head, which its decoder adds."""
        names = [f"{name}.{parameter}" for parameter in self._module(name)._parameters]
        firsts = {self.traced.ties.get(full, full) for full in names}
        nodes = [node for node, full in self.flows.inference.params.items() if full in firsts]
        tied = all(self.flows.sharers.get(first, set()) - {name} for first in firsts)
        return tied and not any(self.flows.path[user] == name for node in nodes for user in node.users)

    def _groups(self) -> None:
        """A rank has fewer groups of channels: `groups` of a convolution, `num_groups` of a norm."""
        for node in self.flows.inference.graph.nodes:
            where = facts_of(node).groups
            if where is None or not self.choice.sharded(channels_of(self.flows.inference, node)):
                continue
            module = self._module(self.flows.path[node])
            for key in ("groups", "num_groups"):
                if getattr(module, key, None) == argument(node, where, "groups", 1) > 1:
                    self.out.attributes.setdefault(self.flows.path[node], {})[key] = "/tp"

    def _multiplies_by_weight(self, name: str) -> bool:
        """Whether the module holds a sharded matrix, a bias at most beside it, and is of a type that multiplies by it.
        A subclass of nn.Linear may have a forward of its own: whether a style can take it is decided later."""
        module = self._module(name)
        if "weight" not in self.owned[name] or len(self._dims(name, "weight")) != 2:
            return False
        known = isinstance(module, nn.Linear) or is_transposed(module)
        return known and {n for n, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}

    def _product(self, name: str, in_local: bool, block: SplitBlock | None) -> None:
        """y = x W^T. A vocabulary of outputs is a head; else outputs split: column, inputs split: row."""
        position, dim = self._dim_of(name, "weight")
        outputs = 1 if is_transposed(self._module(name)) else 0  # the weight's dimension of output features
        if self._atoms(name) & self.choice.vocabulary:
            self._head(name)
        elif position == outputs:
            self._column(name, dim, in_local)
        else:
            self._row(name, block)

    def _atoms(self, name: str) -> set[Atom]:
        """The chosen classes that stand in the module's parameters."""
        return self.choice.chosen(dim for parameter in self.owned[name] for dim in self._dims(name, parameter))

    def _plain_kv(self, name: str, dim: Dim) -> Atom | None:
        """The kv heads of a k or v projection of its own, when they do not divide."""
        atoms = leaves(dim)
        if len(atoms) > 2 or atoms[0] not in self.choice.groups or not self._is_linear(name):
            return None
        return None if atoms[1:] == [find(self.choice.groups[atoms[0]])] else atoms[0]

    def _shard_spec(self, name: str, parameter: str) -> Any:
        """How a style says where the parameter is split: a dimension, or the segments of one that is fused.

        Of q, k and v in one weight [(heads + 2 kv_heads) * head_dim, features] each segment is split by itself.
        `replicated` are segments that every rank holds, `kv` those of which a rank holds the heads that its query
        heads need.
        """
        position, dim = self._dim_of(name, parameter)
        segments = self.choice.segments(dim)
        if len(segments) == 1 and segments[0].sharded:
            return position
        spec: dict[str, Any] = {"dim": position, "segments": [s.size for s in segments]}
        if replicated := [i for i, s in enumerate(segments) if not s.sharded and s.kv is None]:
            spec["replicated"] = replicated
        if repeated := {i: s.kv for i, s in enumerate(segments) if s.kv is not None}:
            kv = next(iter(repeated.values()))
            if any(other is not kv for other in repeated.values()):
                raise SplitError(set(repeated.values()), f"{name}.{parameter} has kv heads of two kinds")
            spec |= {"kv": list(repeated), "kv_heads": kv.size, "heads": kv.size * find(self.choice.groups[kv]).size}
        return spec

    def _embedding(self, name: str) -> None:
        if self._read_in_vain(f"{name}.weight") or self.finder.bare_heads:
            if self.early:
                raise SplitError(self._atoms(name), f"code of another module reads {name}.weight")
            self._put(name, style="fast_embedding", all_tokens=True)
            return
        self._put(name, style="rowwise", input="replicate", output="shard(1)" if self.early else "replicate")

    def _read_in_vain(self, parameter: str) -> bool:
        """Whether another module's code reads it for a value that nothing uses: that must find a plain tensor."""
        name = self.traced.ties.get(parameter, parameter)
        node = next((n for n, first in self.flows.inference.params.items() if first == name), None)
        if node is None or name not in self.traced.outside:
            return False
        owners = {p.rpartition(".")[0] for p in (name, *(t for t, first in self.traced.ties.items() if first == name))}
        return all(module_path(user) in owners for user in node.users)

    def _bare_heads(self) -> None:
        """The module before a product with the embedding's weight gathers for it, and the product's own gathers it."""
        for head in self.finder.bare_heads.values():
            label = label_of(head.entry)
            taken = [name for name in (label.module, head.reader) if name in self.out.modules]
            if taken or not self.traced.single_output:
                raise SplitError(set(self.choice.vocabulary), f"{taken or 'the model'} cannot gather for the logits")
            if label.path.isdigit():
                before = ["none"] * int(label.path)
                self._put(label.module, style="local_block", input=[*before, self.inside])
            else:
                self._put(label.module, style="local_block", input_kwargs={label.path: self.inside})
            logits = f"shard({head.dims - 1})"
            self._put(head.reader, style="prepare_output", output=[logits], desired=["replicate"])

    def _head(self, name: str) -> None:
        self._put(name, style="colwise", use_local_output=False)
        if self.stream is not None and not self.stream.kind.ends_before_norm:
            self._put(name, input="shard(1)")
        self.out.loss = "vocab_parallel"

    def _column(self, name: str, dim: Dim, in_local: bool) -> None:
        kv = self._plain_kv(name, dim)
        if kv is not None and not in_local:
            group = find(self.choice.groups[kv]).size
            # behind the kv heads stands the rest of the dim: head_dim, or more of it where a weight stacks features
            rest = self._module(name).out_features // kv.size  # type: ignore[operator]
            self._put(name, style="kv_replicate", heads=kv.size * group, kv_heads=kv.size, head_dim=rest)
            return
        spec = self._shard_spec(name, "weight")
        # torch's colwise takes a linear that is split in one piece, outside of local code; packed_colwise anything
        # else.
        of_inner_sum = not in_local and any(b in self.finder.from_inner for b in self.finder.inputs(name))
        if isinstance(spec, int) and not in_local and not of_inner_sum and self._is_linear(name):
            self._put(name, style="colwise")
        else:
            self._put(name, style="packed_colwise")
            if of_inner_sum:
                self._put(name, used_inside=True)
            if is_transposed(self._module(name)):  # transformers' Conv1D views its output with its attribute nf
                even = isinstance(spec, int) or not {"replicated", "kv"} & spec.keys()
                self.out.attributes[name] = {"nf": "/tp" if even else self.choice.local_size(dim)}
            self._put_segments(name, spec)

    def _put_segments(self, name: str, spec: Any) -> None:
        """The segments of a fused weight as options; of a weight that is split as one there are none."""
        if isinstance(spec, dict):
            self._put(name, **{key: value for key, value in spec.items() if key != "dim"})

    def _row_spec(self, name: str) -> Any:
        """How the input features of a product are split. Raises SplitError where a rank would use some of them all."""
        spec = self._shard_spec(name, "weight")
        if isinstance(spec, dict) and {"replicated", "kv"} & spec.keys():
            raise SplitError(self._atoms(name), f"{name} takes a part of its input unsharded")
        return spec

    def _row(self, name: str, block: SplitBlock | None) -> None:
        spec = self._row_spec(name)
        inner = self.finder.has_inner_sum(name)
        # A deferred block reduces once, at its output: until there the product stays a partial sum.
        deferred = block is not None and block.deferred and not inner
        if isinstance(spec, int) and not deferred and not inner and self._is_linear(name):
            self._put(name, style="rowwise")
            if self.stream is not None:
                self._put(name, output=self.inside)
            return
        self._put(name, style="packed_rowwise", output="partial" if deferred else self.inside)
        if inner:
            self._put(name, output="replicate", used_inside=True)
        if isinstance(spec, dict):
            self._put(name, segments=spec["segments"])
