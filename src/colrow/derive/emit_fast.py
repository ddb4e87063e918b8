"""Write a choice with its blocks as fast styles (see `styles.fast.linear`).

A block whose input goes into column products and nowhere else gets a fast_gather, and its columns one product; any
other block gets a fast_block. Where one module's output is the input of several such blocks (attention and MLP side by
side), that module gathers once for all of them. Tokens are flattened between blocks, so that all of a plan is of these
styles.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import Node

from colrow.derive.axes import Dim, find
from colrow.derive.blocks import SplitBlock, SplitError
from colrow.derive.emit import Emitter
from colrow.derive.emit_modules import Emission
from colrow.derive.flow import SpmdType
from colrow.derive.infer import facts_of, op_name, shape_of
from colrow.derive.sequence import Stream
from colrow.derive.trace import label_of
from colrow.ops.carriers import Overlap
from colrow.plans.patterns import is_within
from colrow.styles.base import Style
from colrow.styles.fast.linear import is_linear
from colrow.styles.fast.tokens import FastGatherTokens, FastShardTokens, FastShardTokensGradSum
from colrow.styles.local_block import LocalShards
from colrow.styles.packed import is_transposed
from colrow.styles.replicated import GradSum


class FastEmitter(Emitter):
    """Turns blocks and a stream of flattened tokens into fast styles."""

    stream: Stream

    def __init__(self, *given: Any, overlap: Overlap, linear_loss: bool) -> None:
        super().__init__(*given)
        assert self.stream is not None
        self.linear_loss = linear_loss
        self.overlap = {} if overlap == "collectives" else {"overlap": overlap}
        self.gathered: dict[str, list[str]] = {}
        """Columns by the module that gathers for them."""
        self.shared: dict[Node, list[str]] = {}
        """Columns by the output that is gathered once for all who take it: that of a norm before several blocks."""
        self.single_columns = {label_of(entry).module for b in self.blocks if b.leaf for entry in b.entries}

    def run(self) -> Emission:
        """All styles. Raises SplitError where no fast style can say what the choice needs."""
        for block in self.blocks:
            if not block.leaf and (columns := self._columns(block)):
                self.gathered[block.module] = columns
        for block in self.blocks:
            for entry in block.entries:
                self._share(entry)
        for columns in self.shared.values():
            self.single_columns -= set(columns)
        return super().run()

    def _share(self, entry: Node) -> None:
        """Note the output that enters here, where it goes into several blocks' columns and nowhere else."""
        # Attention and MLP side by side read one norm's output: gathered behind the norm, it is gathered once.
        (output,) = entry.all_input_nodes
        if output in self.shared or op_name(output) != "boundary" or not self._is_own_output(output):
            return
        around = label_of(output).module.rpartition(".")[0]
        columns: list[str] = []
        for user in output.users:
            name = label_of(user).module if op_name(user) == "boundary" else ""
            if user not in self.entries or not (name in self.gathered or name in self.single_columns):
                return
            columns += [f"{name}.{column}" for column in self.gathered[name]] if name in self.gathered else [name]
        alike = len({name.rpartition(".")[2] for name in columns}) == len(columns)
        if len(output.users) > 1 and alike and all(name.startswith(f"{around}." if around else "") for name in columns):
            self.shared[output] = columns

    def _is_own_output(self, output: Node) -> bool:
        """Whether a module returns this tensor alone, made of a rank's tokens by code that no style replaces."""
        label, ends = label_of(output), self.stream.ends
        return (
            (label.direction, label.path) == ("out", "0")
            and not self.traced.results.get(label.module)
            and output in self.stream.nodes
            and output not in ends.all
            and not any(label_of(end).module == label.module for end in ends.all)
        )

    # ------------------------------------------------------------------ blocks

    def _columns(self, block: SplitBlock) -> list[str]:
        """The column products that share the block's input, when nothing else takes it; else none."""
        if block.deferred or len(block.entries) != 1 or self._slices(block):
            return []
        (entry,) = block.entries
        if "." in label_of(entry).path or any(True for _ in self._module(block.module).parameters(recurse=False)):
            return []
        # The gathered input must go into column products alone: the gather multiplies by all their weights at once, and
        # what the module's own code would get is never made.
        names: list[str] = []
        todo = list(entry.users)
        while todo:
            user = todo.pop(0)
            if op_name(user) != "boundary" or "." in label_of(user).path:
                return []
            name = label_of(user).module
            if not self._is_column(name):
                if label_of(user).direction != "in" or not name.startswith(f"{block.module}."):
                    return []
                todo += user.users  # handed on to a module inside
            elif label_of(user).path != "0" or label_of(user).direction != "in":
                return []
            elif name not in names:
                names.append(name)
        inside = [name.removeprefix(f"{block.module}.") for name in names]
        # the gather hands each column its piece by the last part of its name
        return inside if len({name.rpartition(".")[2] for name in inside}) == len(inside) else []

    def _is_column(self, name: str) -> bool:
        if not is_linear(self._module(name)):
            return False
        if "weight" not in self.owned.get(name, ()):
            return self._unsharded_column(name)
        return self._dim_of(name, "weight")[0] == (0 if self._is_linear(name) else 1)

    def _unsharded_column(self, name: str) -> bool:
        """Whether every rank computes all of this product, and uses it in its own way: k and v of a single head."""
        return self._is_linear(name) and f"{name}.weight" in self.flow.summed and name not in self.owned

    def _can_stand_alone(self, name: str) -> bool:
        # between the products of a block that gathers for its columns there are local tensors, as in a fast_block
        return any(is_within(name, module) for module in self.gathered) and super()._can_stand_alone(name)

    def _plain(self, block: SplitBlock) -> bool:
        return block.module in self.gathered

    def _block(self, block: SplitBlock, local: bool) -> None:
        shared = {user for output in self.shared for user in output.users}
        if block.leaf:
            for entry in block.entries - shared:
                name = label_of(entry).module
                if label_of(entry).path != "0" or not self.out.style(name).gathers_own_input:
                    raise SplitError(
                        set(), f"{name} gets its input outside any block; only fast_column can gather its own input"
                    )
            return
        if block.module in self.gathered:
            (entry,) = block.entries
            if entry in shared:
                self._put(block.module, style="fast_block")  # on all tokens, which come gathered
            else:
                self._put(block.module, style="fast_gather", columns=self.gathered[block.module])
                if self._key(entry) not in (0, "hidden_states"):
                    self._put(block.module, argument=self._key(entry))
                self._put(block.module, **self.overlap)
            for name in (f"{block.module}.{column}" for column in self.gathered[block.module]):
                if self._unsharded_column(name):
                    features = self._module(name).out_features
                    self._put(name, style="fast_colwise", segments=[features], replicated=[0])
            return
        entries = sorted(block.entries, key=lambda entry: self.finder.order[entry])
        style: dict[str, Any] = {"style": "fast_block", "gather": [self._key(entry) for entry in entries]}
        if slices := self._slices(block):
            style["slices"] = slices
        if block.deferred:
            style["scatter"] = self._scattered(block)
        self._put(block.module, **style)

    def _key(self, entry: Node) -> int | str:
        path = label_of(entry).path
        if "." in path:
            raise SplitError(set(), f"argument {path} of {label_of(entry).module} is nested")
        return int(path) if path.isdigit() else path

    def _scattered(self, block: SplitBlock) -> list[int]:
        """The numbers of the block's outputs that are sums over ranks."""
        sums = [
            label_of(b).path for b in self.finder.outputs(block.module) if block.flow.types.get(b) is SpmdType.PARTIAL
        ]
        if nested := [path for path in sums if not path.isdigit()]:
            raise SplitError(set(), f"output {nested[0]} of {block.module} is nested")
        return sorted({int(path) for path in sums})

    # ------------------------------------------------------------------ products and the two ends

    def _column(self, name: str, dim: Dim, in_local: bool) -> None:
        gathered = any(name == f"{m}.{column}" for m, columns in self.gathered.items() for column in columns)
        gathered = gathered or any(name in columns for columns in self.shared.values())
        if not gathered and name not in self.single_columns:
            super()._column(name, dim, True)  # on gathered tokens, inside a fast_block
            return
        kv = self._plain_kv(name, dim)
        if gathered and kv is not None:
            heads = kv.size * find(self.choice.groups[kv]).size
            width = self._module(name).out_features // kv.size  # type: ignore[operator]
            self._put(name, style="fast_kv_replicate", heads=heads, kv_heads=kv.size, head_dim=width)
            return
        if not is_linear(self._module(name)):
            raise SplitError(set(), f"{name} is a {type(self._module(name)).__name__} with a forward of its own")
        self._put(name, style="fast_colwise" if gathered else "fast_column")
        spec = self._shard_spec(name, "weight")
        self._put_segments(name, spec)
        if not gathered:
            self._put(name, **self.overlap)
        if is_transposed(self._module(name)):  # the trace on local shapes runs the module's forward
            self.out.attributes[name] = {"nf": "/tp" if isinstance(spec, int) else self.choice.local_size(dim)}

    def _row(self, name: str, block: SplitBlock | None) -> None:
        if block is not None and block.deferred:
            super()._row(name, block)
            return
        spec, module = self._row_spec(name), self._module(name)
        if not is_linear(module):
            bias = {} if module._parameters.get("bias") is None else {"bias": {"scaled": True}}
            self._put(name, style="fast_block", shards={"weight": spec, **bias}, scatter=[0])
            return
        self._put(name, style="fast_rowwise", **({"segments": spec["segments"]} if isinstance(spec, dict) else {}))
        self._put(name, **self.overlap)

    def _embedding(self, name: str) -> None:
        self._put(name, style="fast_embedding", **({} if self.early else {"all_tokens": True}))

    def _head(self, name: str) -> None:
        if not is_linear(self._module(name)):
            raise SplitError(set(), f"the head {name} has a forward of its own")
        if self.linear_loss:
            self._nothing_after(name)
            layout = "replicated" if self.stream.kind.ends_before_norm else "flattened"
            self._put(name, style="linear_head", layout=layout)
            self.out.loss = "linear"
        else:
            gathered = self.stream.kind.ends_before_norm
            self._put(name, **({"style": "colwise", "use_local_output": False} if gathered else {"style": "fast_head"}))
            self.out.loss = "vocab_parallel"

    def _nothing_after(self, name: str) -> None:
        """A head that returns the loss needs its logits to be the model's output as they are."""
        at = self.traced.output()
        while label_of(at).module != name if op_name(at) == "boundary" else facts_of(at).identity:
            at = at.all_input_nodes[0]
        if op_name(at) != "boundary":
            raise SplitError(set(), f"{op_name(at)} changes the logits behind {name}, so the head cannot give the loss")

    # ------------------------------------------------------------------ what is not sharded, and the stream

    def _summed(self, owner: str, stream: bool) -> None:
        self._put(owner, style="grad_sum")

    def _unsharded_parameters(self) -> None:
        for output, columns in self.shared.items():
            around, _, name = label_of(output).module.rpartition(".")
            inside = [column.removeprefix(f"{around}.") for column in columns]
            self._put(f"{around}.{name}".lstrip("."), style="fast_gather_output", columns=inside, **self.overlap)
        super()._unsharded_parameters()
        for name, style in self.out.modules.items():
            if self.out.style(name) is LocalShards and style.get("output") not in (None, "partial"):
                raise SplitError(set(), f"{name} reduces inside of a block, which no fast style does")

    def _scales(self) -> None:
        super()._scales()
        for output in self.shared:
            axis = 0 if len(shape_of(output)) == 2 else 1
            self.out.scales[str(label_of(output))] = (axis, self.tp, 1)
            for entry in output.users:
                self.out.scales.pop(str(label_of(entry)), None)

    def _stream(self, stream: Stream) -> None:
        ends = stream.ends
        # Which tokens a rank has changes at these boundaries: a module's style splits or gathers some of its arguments.
        changes: list[tuple[Node, type[Style]]] = [(node, FastShardTokens) for node in self._ordered(ends.start)]
        changes += [(node, FastGatherTokens) for node in self._ordered(ends.finish | ends.leave)]
        for node, style_cls in changes:
            name, key = label_of(node).module, self._key(node)
            if style_cls is FastShardTokens and self.out.style(name) in (GradSum, FastShardTokensGradSum):
                style_cls = FastShardTokensGradSum
            elif name in self.out.modules and self.out.style(name) is not style_cls:
                raise SplitError(set(), f"{name}, where the tokens' order changes, has a style already")
            arguments = [*self.out.modules.get(name, {}).get("arguments", []), key]
            self._put(name, style=style_cls.name, arguments=list(dict.fromkeys(arguments)))
        for node in self._ordered(ends.rejoin):
            name, path = label_of(node).module, label_of(node).path
            if not path.isdigit():
                raise SplitError(set(), f"output {path} of {name} is nested")
            numbers = [*self.out.modules[name].get("outputs", []), int(path)]
            self._put(name, outputs=sorted(set(numbers)))
        for options in self.out.modules.values():
            if options.get("arguments") == [0]:
                del options["arguments"]

    def _ordered(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=lambda node: self.finder.order[node])
