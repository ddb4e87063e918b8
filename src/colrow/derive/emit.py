"""Write a choice with its blocks as styles: what enters a block, what leaves it, and which gradients are summed."""

from __future__ import annotations

import re
from typing import Any

from colrow.derive.axes import leaves
from colrow.derive.blocks import SplitBlock, SplitError
from colrow.derive.emit_modules import Emission, ModuleEmitter
from colrow.derive.flow import SpmdType
from colrow.derive.infer import facts_of, op_name, shape_of
from colrow.derive.sequence import Stream
from colrow.derive.trace import label_of
from colrow.plans.patterns import is_within
from colrow.styles.activations import PrepareInput
from colrow.styles.local_block import BlockShards, LocalShards
from colrow.styles.packed import PackedColwise
from colrow.styles.replicated import LEFT_OUT

NORM = re.compile(r"norm", re.IGNORECASE)


class Emitter(ModuleEmitter):
    """Turns blocks and a stream into styles."""

    def run(self) -> Emission:
        """All styles. Raises SplitError where no style can say what the choice needs."""
        locals_ = {b.module for b in self.blocks if not b.leaf and not self._plain(b)}
        for name in self.owned:
            self._shards(name, locals_)
        for block in self.blocks:
            self._block(block, block.module in locals_)
        self._bare_heads()
        self._groups()
        self._buffers()
        self._unsharded_parameters()
        self._never_summed_twice()
        self._used_outside()
        if self.stream is not None:
            self._stream(self.stream)
        self._scales()
        return self.out

    # ------------------------------------------------------------------ blocks

    def _plain(self, block: SplitBlock) -> bool:
        """Whether torch's own styles can enter the block: a DTensor goes straight into plain column products."""
        if block.deferred or self._slices(block) or self.owned.get(block.module):
            return False
        if any(True for _ in self._module(block.module).parameters(recurse=False)):
            return False
        if any(name.rpartition(".")[0] == block.module for name in self.buffers):
            return False
        # `prepare_input` hands on a replicated DTensor: only torch's own colwise can take it, and no code between.
        for entry in block.entries:
            if "." in label_of(entry).path:
                return False
            for user in entry.users:
                if op_name(user) == "_assert_tensor_metadata":
                    continue
                if op_name(user) != "boundary" or label_of(user).path != "0":
                    return False
                name = label_of(user).module
                if not self.owned.get(name) or not self._is_linear(name):
                    return False
                position, dim = self._dim_of(name, "weight")
                if position != 0 or (
                    self._plain_kv(name, dim) is None and not isinstance(self._shard_spec(name, "weight"), int)
                ):
                    return False
        return True

    def _slices(self, block: SplitBlock) -> dict[str, dict[str, int]]:
        """Constant arguments of which a rank uses its heads' part."""
        out = {}
        others = [other.module for other in self.blocks if not other.leaf and other is not block]
        for b in self.finder.inputs(block.module):
            label = label_of(b)
            if b not in self.flows.constant or not self.flows.is_sharded(b) or self.flows.made_in(b, others):
                continue
            for k, dim in enumerate(self.flows.inference.of(b)):
                if self.choice.sharded(dim):
                    atoms = leaves(dim)
                    # A constant is sliced, not gathered: heads must be its innermost split factor, or a slice would not
                    # be one run.
                    if atoms[-1] not in self.choice.atoms:
                        raise SplitError(
                            self.finder.atoms_of({b}),
                            f"argument {label.path} of {block.module} would have to be sliced",
                        )
                    out[label.path] = {"dim": k, "inner": atoms[-1].size}
        return out

    def _block(self, block: SplitBlock, local: bool) -> None:
        if block.leaf:
            self._single_columns(block)
            return
        positional, named = self._gathered_arguments(block)
        gathers = any(p != "none" for p in positional)
        style: dict[str, Any] = {"style": "local_block" if local else "prepare_input"}
        if gathers or (positional and not local):  # prepare_input wants an entry for each positional argument
            style["input"] = positional
        if named:
            style["input_kwargs"] = dict(sorted(named.items()))
        if local:
            if slices := self._slices(block):
                style["slices"] = slices
            if block.deferred:
                style["output"] = self._outputs(block)
        else:
            if positional:
                style["desired"] = ["replicate" if p != "none" else "none" for p in positional]
            if named:
                style["desired_kwargs"] = dict.fromkeys(style["input_kwargs"], "replicate")
        self._put(block.module, **style)

    def _single_columns(self, block: SplitBlock) -> None:
        """Column products without a block around them: each gathers its own input."""
        for entry in block.entries:
            name = label_of(entry).module
            style_cls = self.out.style(name)
            if label_of(entry).path != "0" or not style_cls.gathers_own_input:
                raise SplitError(
                    self.finder.atoms_of({*entry.users}) or self.finder.atoms_of({*self.finder.interior(name)}),
                    f"{name} gets its input outside any block; only colwise, packed_colwise, kv_replicate and "
                    "local_shards can gather their own input",
                )
            if self.stream is not None or style_cls in (PackedColwise, LocalShards):
                self._put(name, input=self.inside)

    def _gathered_arguments(self, block: SplitBlock) -> tuple[list[str], dict[str, str]]:
        """The layouts of the block's positional and named arguments; `none` for those that are not its entries. One
        inside of a tuple is named by its path."""
        positional: list[str] = ["none"] * self.traced.positional.get(block.module, 0)
        named: dict[str, str] = {}
        for entry in block.entries:
            path = label_of(entry).path
            if path.isdigit():
                positional[int(path)] = self.inside
            else:
                named[path] = self.inside
        return positional, named

    def _outputs(self, block: SplitBlock) -> list[str]:
        wanted = ["none"] * max(1, self.traced.results.get(block.module, 1))
        for b in self.finder.outputs(block.module):
            # the flow of the complete graph has it as INVARIANT, reduced; the block's own flow knows that it was a sum
            if block.flow.types.get(b) is SpmdType.PARTIAL:
                path = label_of(b).path
                if not path.isdigit():
                    raise SplitError(self.finder.atoms_of({b}), f"output {path} of {block.module} is nested")
                wanted[int(path)] = self.inside
        return wanted

    # ------------------------------------------------------------------ what is not sharded

    def _unsharded_parameters(self) -> None:
        """Parameters that each rank uses on its heads, features or tokens: their gradients are summed."""
        for name in sorted(self.flow.summed | (self.stream.summed if self.stream else set())):
            if self.choice.any_sharded(self.dims[name]):
                continue
            owner = name.rpartition(".")[0]
            style_cls = self.out.style(owner)
            # a bias that every rank adds to its term of a sum would count tp times: each adds 1/tp of it
            if issubclass(style_cls, (LocalShards, BlockShards)) and self._added_to_sum(name):
                self.out.modules[owner].setdefault("shards", {})[name.rpartition(".")[2]] = {"scaled": True}
            if style_cls.sums_gradients:  # the module's style does it already, once
                continue
            if owner in self.out.modules:
                raise SplitError(
                    set(self.choice.atoms),
                    f"{name} needs its gradient summed, and {owner} has the style {style_cls.name}",
                )
            self._summed(owner, self.stream is not None and name in self.stream.summed)
        for owner in self.out.modules:
            if self.out.style(owner) is LocalShards and owner in self.finder.owners.values():
                deferred = any(b.deferred and is_within(owner, b.module) for b in self.blocks)
                self._put(owner, output="partial" if deferred else self.inside)
                if self.finder.has_inner_sum(owner):
                    self._put(owner, output="replicate", used_inside=True)

    def _summed(self, owner: str, stream: bool) -> None:
        module = self._module(owner)
        is_leaf = not any(True for _ in module.children()) and self.traced.positional.get(owner) == 1
        if stream and is_leaf and NORM.search(type(module).__name__):
            self._put(owner, style="sequence", use_local_output=True)
        else:
            self._put(owner, style="grad_sum")

    def _never_summed_twice(self) -> None:
        """A block sums the gradients of its own unsharded parameters: one that is used
        behind the reduction inside has a complete gradient, and the sum would count it tp times."""
        for name in sorted(self.flow.same - self.flow.summed):
            owner = name.rpartition(".")[0]
            if not self.out.style(owner).local or self.choice.any_sharded(self.dims[name]):
                continue
            inside = [dims for other, dims in self.dims.items() if other.startswith(f"{owner}.")]
            atoms = {atom for dims in inside for dim in dims for atom in leaves(dim)} & set(self.choice.atoms)
            raise SplitError(
                atoms or set(self.choice.atoms), f"{name} is used behind the reduction of {owner}, which would sum it"
            )

    def _used_outside(self) -> None:
        """Outputs that auxiliary losses use, outside of the block that sums the gradients of what they come from."""
        for node in sorted(self.flow.left, key=lambda n: self.finder.order[n]):
            label = label_of(node)
            if not label.path.isdigit():
                raise SplitError(
                    self.finder.atoms_of(self.flow.left), f"output {label.path} of {label.module} is nested"
                )
            style = self.out.modules.setdefault(label.module, {"style": LEFT_OUT.name})
            style.setdefault("used_outside", []).append(int(label.path))

    def _added_to_sum(self, name: str) -> bool:
        """Whether the parameter, rows of it or a view, is a term of a sum that is not reduced yet. A factor is none."""
        todo = [n for n, f in self.flows.inference.params.items() if f == name]
        while todo:
            node = todo.pop()
            for user in node.users:
                if self.flow.types.get(user) is SpmdType.PARTIAL:
                    terms = facts_of(user).addends or ()
                    if any(i < len(user.args) and user.args[i] is node for i in terms):
                        return True
                elif user in self.flows.params_of:
                    todo.append(user)
        return False

    # ------------------------------------------------------------------ the stream

    def _stream(self, stream: Stream) -> None:
        for node, before, after in [
            *((n, "replicate", "shard(1)") for n in stream.ends.start),
            *((n, "shard(1)", "replicate") for n in stream.ends.finish),
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
        """Where extents change in the trace on local shapes: gathers and reduce-scatters, sliced constants."""
        tp = self.tp
        if self.stream is not None:
            heads = self.finder.head_entries() if self.stream.kind.ends_before_norm else set()
            ends = self.stream.ends
            # an inner sum is reduced to complete values inside a block: no extent changes
            gathers = (self.entries - heads - self.finder.inner) | ends.finish | ends.leave
            scatters = (
                {n for n in self.exits - self.finder.inner if self.early or not self.finder.is_lookup(n)}
                | ends.start
                | ends.rejoin
            )
            for node in gathers | scatters:
                axis = 0 if len(shape_of(node)) == 2 else 1
                self.out.scales[str(label_of(node))] = (axis, tp, 1) if node in gathers else (axis, 1, tp)
        for block in self.blocks:
            if not block.leaf:
                for path, piece in self._slices(block).items():
                    self.out.scales[f"in|{block.module}|{path}"] = (piece["dim"], 1, tp)
