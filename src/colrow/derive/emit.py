"""Write a choice with its blocks as styles of a plan, module by module."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import Node

from colrow.derive.axes import Atom, Dim, find, leaves
from colrow.derive.blocks import Block, BlockFinder, SplitError
from colrow.derive.choose import Choice
from colrow.derive.flow import Flow, Flows
from colrow.derive.infer import is_lookup, op_name, shape_of
from colrow.derive.sequence import Stream
from colrow.derive.trace import Scale, Trace, label_of, module_path
from colrow.styles.activations import PrepareInput
from colrow.styles.base import STYLES, Style
from colrow.styles.local_block import LocalShards
from colrow.styles.packed import PackedColwise
from colrow.styles.replicated import LEFT_OUT

NORM = re.compile(r"norm", re.IGNORECASE)


@dataclass
class Emission:
    """The styles of one plan, and where a rank's own trace changes extents."""

    modules: dict[str, dict[str, Any]] = field(default_factory=dict)
    scales: dict[str, Scale] = field(default_factory=dict)
    loss: str = "replicated"
    attributes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Attributes that are certain to need a local value."""

    def style(self, name: str) -> type[Style]:
        """The class of a module's style; that of modules left out of the plan where it has none."""
        return STYLES[self.modules.get(name, {}).get("style", LEFT_OUT.name)]


class Emitter:
    """Turns blocks and a stream into styles."""

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        flows: Flows,
        finder: BlockFinder,
        blocks: list[Block],
        flow: Flow,
        stream: Stream | None,
    ) -> None:
        self.model, self.traced, self.flows, self.finder = model, traced, flows, finder
        self.blocks, self.flow, self.stream = blocks, flow, stream
        self.choice: Choice = flows.choice
        self.tp = self.choice.tp
        self.inside = "shard(1)" if stream is not None else "replicate"
        self.early = stream is not None and not stream.start
        self.out = Emission()
        self.dims = {name: flows.inference.of(node) for node, name in flows.inference.params.items()}
        self.owned: dict[str, list[str]] = defaultdict(list)
        for name in self.dims:
            if self.choice.any_sharded(self.dims[name]):
                for owner in {name, *(o for o, first in traced.ties.items() if first == name)}:
                    self.owned[owner.rpartition(".")[0]].append(owner.rpartition(".")[2])
        self.entries, self.exits = finder.borders(blocks)

    def run(self) -> Emission:
        """All styles. Raises SplitError where no style can say what the choice needs."""
        locals_ = {b.module for b in self.blocks if not b.leaf and not self._plain(b)}
        for name in self.owned:
            self._shards(name, locals_)
        for block in self.blocks:
            self._block(block, block.module in locals_)
        self._whole_parameters()
        self._never_summed_twice()
        if self.stream is not None:
            self._stream(self.stream)
        self._scales()
        return self.out

    # ------------------------------------------------------------------ modules with shards

    def _module(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def _dim_of(self, name: str, parameter: str) -> tuple[int, Dim]:
        full = f"{name}.{parameter}"
        dims = self.dims[self.traced.ties.get(full, full)]
        position = next(k for k, dim in enumerate(dims) if self.choice.sharded(dim))
        return position, dims[position]

    def _is_linear(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def _shards(self, name: str, locals_: set[str]) -> None:
        module = self._module(name)
        parameters = self.owned[name]
        block = next(
            (b for b in self.blocks if not b.leaf and (name == b.module or name.startswith(b.module + "."))), None
        )
        in_local = block is not None and block.module in locals_
        if name in locals_:
            self._put(name, style="local_block", shards={p: self._cut(name, p) for p in parameters})
            return
        if name in self.flows.wide:
            self._put(name, style="sharded_norm")
            return
        if isinstance(module, nn.Embedding):
            self._embedding(name)
            return
        position, dim = self._dim_of(name, "weight") if "weight" in parameters else (-1, [])
        two = "weight" in parameters and len(self.dims[self.traced.ties.get(f"{name}.weight", f"{name}.weight")]) == 2
        transposed = not isinstance(module, nn.Linear) and hasattr(module, "nf")
        if (
            not two
            or not (isinstance(module, nn.Linear) or transposed)
            or set(dict(module.named_parameters(recurse=False))) - {"weight", "bias"}
        ):
            if not in_local:
                raise SplitError(
                    self.finder.atoms_of(set(self.flows.inference.params)) & self._atoms(name),
                    f"{name} is not in a block that runs on local tensors",
                )
            self._put(name, style="local_shards", shards={p: self._cut(name, p) for p in parameters})
            return
        if self._atoms(name) & self.choice.vocabulary:
            self._head(name)
            return
        if position == (1 if transposed else 0):
            self._column(name, dim, in_local)
        else:
            self._row(name, dim, in_local, block)

    def _atoms(self, name: str) -> set[Atom]:
        out: set[Atom] = set()
        for parameter in self.owned[name]:
            full = f"{name}.{parameter}"
            for dim in self.dims[self.traced.ties.get(full, full)]:
                for atom in _flat(dim):
                    if atom in self.choice.atoms or atom in self.choice.groups:
                        out.add(atom)
        return out

    def _plain_kv(self, name: str, dim: Dim) -> Atom | None:
        """The kv heads of a k or v projection of its own, when they do not divide."""
        atoms = leaves(dim)
        if len(atoms) > 2 or atoms[0] not in self.choice.groups or not self._is_linear(self._module(name)):
            return None
        return None if atoms[1:] == [find(self.choice.groups[atoms[0]])] else atoms[0]

    def _cut(self, name: str, parameter: str) -> Any:
        position, dim = self._dim_of(name, parameter)
        segments = self.choice.segments(dim)
        if len(segments) == 1 and segments[0].sharded:
            return position
        cut: dict[str, Any] = {"dim": position, "segments": [s.size for s in segments]}
        if whole := [i for i, s in enumerate(segments) if not s.sharded and s.kv is None]:
            cut["replicated"] = whole
        if repeated := {i: s.kv for i, s in enumerate(segments) if s.kv is not None}:
            kv = next(iter(repeated.values()))
            if any(other is not kv for other in repeated.values()):
                raise SplitError(set(repeated.values()), f"{name}.{parameter} has kv heads of two kinds")
            cut |= {"kv": list(repeated), "kv_heads": kv.size, "heads": kv.size * find(self.choice.groups[kv]).size}
        return cut

    def _embedding(self, name: str) -> None:
        if self._read_in_vain(f"{name}.weight"):
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

    def _head(self, name: str) -> None:
        self._put(name, style="colwise", use_local_output=False)
        if self.stream is not None and not self.stream.whole_head:
            self._put(name, input="shard(1)")
        self.out.loss = "vocab_parallel"

    def _column(self, name: str, dim: Dim, in_local: bool) -> None:
        kv = self._plain_kv(name, dim)
        if kv is not None and not in_local:
            group = find(self.choice.groups[kv]).size
            rest = self._module(name).out_features // kv.size  # type: ignore[operator]
            self._put(name, style="kv_replicate", heads=kv.size * group, kv_heads=kv.size, head_dim=rest)
            return
        cut = self._cut(name, "weight")
        if isinstance(cut, int) and not in_local and self._is_linear(self._module(name)):
            self._put(name, style="colwise")
        else:
            self._put(name, style="packed_colwise")
            if hasattr(self._module(name), "nf"):  # transformers' Conv1D views its output with it
                even = isinstance(cut, int) or not {"replicated", "kv"} & cut.keys()
                self.out.attributes[name] = {"nf": "/tp" if even else self.choice.local_size(dim)}
            if isinstance(cut, dict):
                self._put(name, **{key: value for key, value in cut.items() if key != "dim"})

    def _row(self, name: str, dim: Dim, in_local: bool, block: Block | None) -> None:
        cut = self._cut(name, "weight")
        deferred = block is not None and block.deferred
        if isinstance(cut, dict) and {"replicated", "kv"} & cut.keys():
            raise SplitError(self._atoms(name), f"{name} takes a part of its input whole")
        if isinstance(cut, int) and not deferred and self._is_linear(self._module(name)):
            self._put(name, style="rowwise")
            if self.stream is not None:
                self._put(name, output=self.inside)
            return
        self._put(name, style="packed_rowwise", output="partial" if deferred else self.inside)
        if isinstance(cut, dict):
            self._put(name, segments=cut["segments"])

    # ------------------------------------------------------------------ blocks

    def _plain(self, block: Block) -> bool:
        """Whether torch's own styles can enter the block: a DTensor goes straight into plain column products."""
        if block.deferred or self._slices(block) or self.owned.get(block.module):
            return False
        if any(True for _ in self._module(block.module).parameters(recurse=False)):
            return False
        for entry in block.entries:
            for user in entry.users:
                if op_name(user) == "_assert_tensor_metadata":
                    continue
                if op_name(user) != "boundary" or label_of(user).path != "0":
                    return False
                name = label_of(user).module
                if not self.owned.get(name) or not self._is_linear(self._module(name)):
                    return False
                position, dim = self._dim_of(name, "weight")
                if position != 0 or (
                    self._plain_kv(name, dim) is None and not isinstance(self._cut(name, "weight"), int)
                ):
                    return False
        return True

    def _slices(self, block: Block) -> dict[str, dict[str, int]]:
        """Constant arguments of which a rank uses its heads' part."""
        out = {}
        for b in self.finder.boundaries.get(block.module, []):
            label = label_of(b)
            if label.kind != "in" or b not in self.flows.constant or not self.flows.is_sharded(b):
                continue
            if "." in label.path:
                raise SplitError(
                    self.finder.atoms_of({b}), f"argument {label.path} of {block.module} would have to be cut"
                )
            for k, dim in enumerate(self.flows.inference.of(b)):
                if self.choice.sharded(dim):
                    atoms = leaves(dim)
                    if atoms[-1] not in self.choice.atoms:
                        raise SplitError(
                            self.finder.atoms_of({b}), f"argument {label.path} of {block.module} would have to be cut"
                        )
                    out[label.path] = {"dim": k, "inner": atoms[-1].size}
        return out

    def _block(self, block: Block, local: bool) -> None:
        if block.leaf:
            for entry in block.entries:
                name = label_of(entry).module
                style_cls = self.out.style(name)
                if label_of(entry).path != "0" or not style_cls.gathers_own_input:
                    raise SplitError(
                        self.finder.atoms_of({*entry.users}), f"{name} is entered alone, which its style cannot do"
                    )
                if self.stream is not None or style_cls is PackedColwise:
                    self._put(name, input=self.inside)
            return
        positional: list[str] = ["none"] * self.traced.positional.get(block.module, 0)
        named: dict[str, str] = {}
        for entry in block.entries:
            path = label_of(entry).path
            if path.isdigit():
                positional[int(path)] = self.inside
            elif "." in path:
                raise SplitError(
                    self.finder.atoms_of(self.finder.region(entry)) or self.choice.atoms,
                    f"argument {path} of {block.module} is nested",
                )
            else:
                named[path] = self.inside
        style: dict[str, Any] = {"style": "local_block" if local else "prepare_input"}
        if any(p != "none" for p in positional):
            style["input"] = positional
            if not local:
                style["desired"] = ["replicate" if p != "none" else "none" for p in positional]
        elif positional and not local:
            style["input"] = style["desired"] = positional
        if named:
            style["input_kwargs"] = dict(sorted(named.items()))
            if not local:
                style["desired_kwargs"] = dict.fromkeys(style["input_kwargs"], "replicate")
        if local and (slices := self._slices(block)):
            style["slices"] = slices
        if local and block.deferred:
            style["output"] = self._outputs(block)
        self._put(block.module, **style)

    def _outputs(self, block: Block) -> list[str]:
        from colrow.derive.flow import Kind

        outputs = [b for b in self.finder.boundaries.get(block.module, []) if label_of(b).kind == "out"]
        wanted = ["none"] * max(1, self.traced.results.get(block.module, 1))
        for b in outputs:
            # an exit's kind in the whole flow is I already; the block's own flow knows that it was a sum
            if block.flow.kinds.get(b) is Kind.P:
                path = label_of(b).path
                if not path.isdigit():
                    raise SplitError(self.finder.atoms_of({b}), f"output {path} of {block.module} is nested")
                wanted[int(path)] = self.inside
        return wanted

    # ------------------------------------------------------------------ what stays whole

    def _whole_parameters(self) -> None:
        """Parameters used in a rank's own way, or on its tokens: their gradients are summed."""
        for name in sorted(self.flow.summed | (self.stream.summed if self.stream else set())):
            if self.choice.any_sharded(self.dims[name]):
                continue
            owner = name.rpartition(".")[0]
            style_cls = self.out.style(owner)
            if style_cls is LocalShards and self._added_to_sum(name):
                self.out.modules[owner]["shards"][name.rpartition(".")[2]] = {"scaled": True}
            if style_cls.sums_gradients:
                continue
            if owner in self.out.modules:
                raise SplitError(
                    set(self.choice.atoms),
                    f"{name} needs its gradient summed, and {owner} has the style {style_cls.name}",
                )
            self._summed(owner, self.stream is not None and name in self.stream.summed)
        for owner in self.out.modules:
            if self.out.style(owner) is LocalShards and owner in self.finder.owners.values():
                deferred = any(b.deferred and (owner + ".").startswith(b.module + ".") for b in self.blocks)
                self._put(owner, output="partial" if deferred else self.inside)

    def _summed(self, owner: str, stream: bool) -> None:
        module = self._module(owner)
        alone = not any(True for _ in module.children()) and self.traced.positional.get(owner) == 1
        if stream and alone and NORM.search(type(module).__name__):
            self._put(owner, style="sequence", use_local_output=True)
        else:
            self._put(owner, style="grad_sum")

    def _never_summed_twice(self) -> None:
        """A block sums the gradients of its own whole parameters: one used behind the reduction inside has it whole."""
        for name in sorted(self.flow.same - self.flow.summed):
            owner = name.rpartition(".")[0]
            if not self.out.style(owner).local or self.choice.any_sharded(self.dims[name]):
                continue
            inside = [dims for other, dims in self.dims.items() if other.startswith(f"{owner}.")]
            atoms = {atom for dims in inside for dim in dims for atom in leaves(dim)} & set(self.choice.atoms)
            raise SplitError(
                atoms or set(self.choice.atoms), f"{name} is used behind the reduction of {owner}, which would sum it"
            )

    def _added_to_sum(self, name: str) -> bool:
        from colrow.derive.flow import Kind

        node = next(n for n, f in self.flows.inference.params.items() if f == name)
        return any(self.flow.kinds.get(user) is Kind.P for user in node.users)

    # ------------------------------------------------------------------ the stream

    def _stream(self, stream: Stream) -> None:
        for node, before, after in [
            *((n, "replicate", "shard(1)") for n in stream.start),
            *((n, "shard(1)", "replicate") for n in stream.finish),
        ]:
            label = label_of(node)
            taken = label.module in self.out.modules and self.out.style(label.module) is not PrepareInput
            if taken or "." in label.path:
                raise SplitError(set(), f"{label.module} has a style already")
            style = self.out.modules.setdefault(label.module, {"style": "prepare_input", "use_local_output": True})
            if label.path.isdigit():
                count = self.traced.positional[label.module]
                style.setdefault("input", ["none"] * count)[int(label.path)] = before
                style.setdefault("desired", ["none"] * count)[int(label.path)] = after
            else:
                style.setdefault("input_kwargs", {})[label.path] = before
                style.setdefault("desired_kwargs", {})[label.path] = after
                if count := self.traced.positional.get(label.module, 0):
                    style.setdefault("input", ["none"] * count)
                    style.setdefault("desired", ["none"] * count)

    def _scales(self) -> None:
        """Where extents change in a rank's own trace: gathers and reduce-scatters of the stream, cut constants."""
        tp = self.tp
        if self.stream is not None:
            heads = self.finder.head_entries() if self.stream.whole_head else set()
            gathers = (self.entries - heads) | self.stream.finish
            scatters = {n for n in self.exits if self.early or not self._lookup(n)} | self.stream.start
            for node in gathers | scatters:
                axis = 0 if len(shape_of(node)) == 2 else 1
                self.out.scales[str(label_of(node))] = (axis, tp, 1) if node in gathers else (axis, 1, tp)
        for block in self.blocks:
            if not block.leaf:
                for path, said in self._slices(block).items():
                    self.out.scales[f"in|{block.module}|{path}"] = (said["dim"], 1, tp)

    def _lookup(self, node: Node) -> bool:
        name = label_of(node).module
        return any(owner == name and is_lookup(n) for n, owner in self.finder.owners.items())

    def _put(self, name: str, **options: Any) -> None:
        self.out.modules.setdefault(name, {}).update(options)


def _flat(dim: Dim) -> set[Atom]:
    out: set[Atom] = set()
    for atom in leaves(dim):
        out.add(atom)
        for segment in atom.segments or ():
            out |= _flat(segment)
    return out
