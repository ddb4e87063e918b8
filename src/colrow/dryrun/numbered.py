"""A run on fake tensors in which every value has a number, so that another run of the model can be laid beside it.

[Note: values by number]
The unsharded and the sharded run do not make the same operators in the same order: styles, hooks and DTensor add some.
So an operator of the sharded run is paired with the one of the same name on the same values. Values are numbered in the
unsharded run; parameters, buffers and inputs have their names as numbers; the results of a paired operator get its
counterpart's numbers. What changes only where a value lies (a collective, `from_local`, `redistribute`) keeps it. Where
a style computes a module in a way of its own, numbers are lost, and found again where the module returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.dryrun.module_tracker import LOSS, tensors_of
from colrow.sharding.draws import draws, draws_by_element
from colrow.sharding.local_call import TensorShape
from colrow.sharding.local_layout import REPLICATED, Layout
from colrow.sharding.operators import Identity, operator, operator_name
from colrow.torch_compat import (
    TorchDispatchMode,
    constant_index,
    current_autograd_node,
    forward_number,
    frames,
    is_async,
    is_higher_order,
    is_transformed,
    local_shard,
    own_results,
    path_in_torch,
    tensors_in,
    tree_flatten,
    tree_unflatten,
    written_numbers,
)

_COLROW = Path(__file__).parents[1]
_STYLE_CODE = tuple(str(_COLROW / room) for room in ("styles", "ops", "sharding", "parallel"))
_DRYRUN = _COLROW / "dryrun"
_RUNS = ("numbered", "paired_runs", "unsharded_run", "lockstep", "sequence_sizes", "watch", "flops", "recorded_calls")
# around calls of the model's own code, or of what a style calls
_AROUND_CODE = (_COLROW / "torch_compat", _COLROW / "styles" / "local_sizes.py")
_PASSED_OVER = ("<", *map(str, (*(_DRYRUN / f"{name}.py" for name in _RUNS), *_AROUND_CODE)))
_VIEWS = ("view", "_unsafe_view", "_reshape_alias")


class NumberedValue(NamedTuple):
    """A tensor's number (None: it is none of the unsharded run's values) and layout."""

    number: Hashable
    layout: Layout


class CallSite(NamedTuple):
    """Where an operator is called: the module, the user's line, and whether a style's own code called it."""

    module: str
    line: str
    in_style: bool


class Operation:
    """An operator that has run: its arguments flat, its inputs' values, its results."""

    def __init__(self, func: Any, args: Any, kwargs: Any, run: NumberedRun) -> None:
        self.func = func
        name = operator_name(func)
        self.name = "view" if name in _VIEWS else name
        self.leaves, self.tree = tree_flatten((args, kwargs))
        # before it runs: `squeeze_` gives its input another window
        keys = [run.key(leaf) if isinstance(leaf, Tensor) else None for leaf in self.leaves]
        self.inputs = [key and run.number(leaf, key) for leaf, key in zip(self.leaves, keys, strict=True)]
        self.keys = [key for key in keys if key is not None]
        self.shapes = tuple(shape_of(leaf) for leaf in self.leaves)
        self.results: list[Tensor] = []

    @property
    def numbers(self) -> list[Any]:
        return [leaf for leaf, value in zip(self.shapes, self.inputs, strict=True) if value is None]

    @property
    def values(self) -> list[NumberedValue]:
        return [value for value in self.inputs if value is not None]

    @property
    def writes(self) -> bool:
        """Whether it writes elements; `squeeze_` and `as_strided_` do not."""
        return self.func._schema.is_mutable and torch.Tag.inplace_view not in self.func.tags

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers by element; see [Note: random numbers on shards]."""
        return draws_by_element(self.func) and draws(self.func, *tree_unflatten(self.leaves, self.tree))

    def draws_for_shard(self, unsharded: tuple[int, ...] | None) -> bool:
        """Whether it draws for a shard, by the layouts of its inputs and the shape of the unsharded result."""
        replicated = all(value.layout == REPLICATED for value in self.values)
        return self.draws and not (replicated and tuple(self.results[0].shape) == unsharded)

    @property
    def keeps_value(self) -> bool:
        """Whether its result is its one input: a view of the same shape, a copy."""
        same = operator(self.name).identity in (Identity.MEMORY, Identity.GRADIENT) or self.name in (
            "view",
            "lift_fresh",
        )
        if self.func.namespace == "_c10d_functional" and self.name == "wait_tensor":
            same = True
        return same and len(self.values) == 1 and self.results[0].shape == self._first.shape

    @property
    def _first(self) -> Tensor:
        return next(leaf for leaf in self.leaves if isinstance(leaf, Tensor))


class NumberedRun(TorchDispatchMode):
    """Around a forward and a backward of `model`. Subclasses decide what a number is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._values: dict[Any, NumberedValue] = {}
        self._alive: dict[int, Any] = {}  # storages: their addresses are keys, and must not be used again
        self._stack: list[tuple[str, int]] = []
        self._counts: Counter[Any] = Counter()
        self._call_sites: dict[int, CallSite] = {}  # by the number of the autograd node that the operator made
        self.inside = 0
        for name, module in model.named_modules():  # outside the hooks of the styles
            module.register_forward_pre_hook(self._enter(name), prepend=True, with_kwargs=True)
            module.register_forward_pre_hook(self._arranged, with_kwargs=True)  # inside them
            # also when a recomputation stops early, by an exception, as torch's checkpoint does
            module.register_forward_hook(self._leave, always_call=True)

    # -- values

    def value(self, tensor: Tensor) -> NumberedValue:
        """What a tensor is that a module, the loss or a gradient gets."""
        return self.number(tensor)

    def number(self, tensor: Tensor, key: Any = None) -> NumberedValue:
        """A tensor that was made before the run or from numbers, and is no parameter, buffer or input: the n-th of its
        kind there, which the numbers belong to."""
        key = self.key(tensor) if key is None else key
        if key not in self._values:
            kind = (self.module(), tuple(tensor.shape), str(tensor.dtype), self.numbers_written(tensor))
            self._counts[kind] += 1
            self._values[key] = NumberedValue(("constant", *kind, self._counts[kind]), REPLICATED)
        return self._values[key]

    def numbers_written(self, tensor: Tensor) -> tuple[Any, ...] | None:
        """The values of a tensor that code made from numbers: `torch.tensor(h.shape[-1])` is another one on a shard."""
        return written_numbers(tensor)

    def set_value(self, tensor: Tensor, number: Hashable, layout: Layout) -> None:
        """What the tensor is from now on."""
        self._values[self.key(tensor)] = NumberedValue(number, layout)

    def known(self, tensor: Tensor) -> NumberedValue | None:
        """What the tensor is, asked by nothing that computes with it."""
        return None if is_transformed(tensor) else self._values.get(self.key(tensor))

    def windows(self, tensor: Tensor) -> Iterator[tuple[Any, NumberedValue]]:
        """All that is known of other windows on the tensor's storage."""
        own = self.key(tensor)
        return ((key, value) for key, value in list(self._values.items()) if key[0] == own[0] and key != own)

    def written(self, operation: Operation) -> frozenset[Any]:
        """The numbers of the other tensors in the memory that the operator writes into."""
        if not (operation.writes and operation.results):
            return frozenset()
        return frozenset(value.number for _, value in self.windows(operation.results[0]))

    def key(self, tensor: Any) -> Any:
        """Where a tensor lies: its memory, and the window on it."""
        tensor = local_shard(tensor) if isinstance(tensor, DTensor) else tensor
        tensor = tensor.elem if is_async(tensor) else tensor
        storage = tensor.untyped_storage()
        self._alive.setdefault(storage._cdata, storage)
        return storage._cdata, tensor.storage_offset(), *shape_of(tensor)

    # -- places

    def module(self) -> str:
        """The running module, in backward that of the operator that is differentiated."""
        node = current_autograd_node()
        if node is not None:
            call_site = self._call_sites.get(forward_number(node))
            return call_site.module if call_site else LOSS
        return self._stack[-1][0] if self._stack else LOSS

    def call_site(self) -> CallSite:
        """Where the operator that is dispatched now comes from; in backward, the one that is differentiated."""
        node, line, in_style = current_autograd_node(), "", False
        for frame in frames():
            inside = path_in_torch(frame)
            if node is not None and inside in ("/autograd/graph.py", "/_tensor.py"):
                break  # what called backward stands above
            file = frame.f_code.co_filename
            if inside is None and not file.startswith(_PASSED_OVER):
                in_style = file.startswith(_STYLE_CODE)
                line = f"{Path(file).name}:{frame.f_lineno}"
                break
        if node is not None and not line:
            found = self._call_sites.get(forward_number(node))
            line, in_style = (f"backward of {found.line}", found.in_style) if found else (str(node.name()), False)
        call_site = CallSite(self.module(), line, in_style)
        if node is None:
            self._call_sites.setdefault(forward_number(), call_site)
        return call_site

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._counts[name] += 1
            self._stack.append((name, self._counts[name]))
            self._boundary("input", (args, kwargs))

        return hook

    def _arranged(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        for i, tensor in enumerate(_tensors((args, kwargs))):
            self.arranged((*self._stack[-1], "input", i), tensor)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._boundary("output", output)
        self._stack.pop()

    def _boundary(self, side: str, tree: Any) -> None:
        for i, tensor in enumerate(_tensors(tree)):
            place = self._stack[-1]
            self.boundary((*place, side, i), tensor)
            if tensor.requires_grad and torch.is_grad_enabled():
                key = (*place, side + " gradient", i)
                tensor.register_hook(lambda gradient, key=key: self.boundary(key, gradient))

    # -- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside or is_higher_order(func) or func.namespace == "prim":  # prim.device reads no elements
            return func(*args, **kwargs)
        operation = Operation(func, args, kwargs, self)
        self.inside += 1  # an operator on a DTensor is one: what DTensor does for it is its own affair
        try:
            out = own_results(func(*args, **kwargs))
            operation.results = tensors_in(out)
            if operation.results and operation.keeps_value:
                self.call_site()
                self.set_value(operation.results[0], *operation.values[0])
            elif operation.results:
                self.ran(operation, self._pairing_key(operation))
            self.finished(operation)
        finally:
            self.inside -= 1
        return out

    def _pairing_key(self, operation: Operation) -> tuple[Any, ...]:
        numbers = [value.number for value in operation.values]
        if operation.name in ("add", "add_") and len(numbers) == 2:  # gradients of one value arrive in any order
            numbers.sort(key=repr)
        return (operation.name, *numbers) if numbers else (operation.name, self.module())

    def boundary(self, key: tuple[Any, ...], tensor: Tensor) -> None:
        """A module's input or output, or the gradient of one, at (module, call, side, position)."""
        raise NotImplementedError

    def arranged(self, key: tuple[Any, ...], tensor: Tensor) -> None:
        """A module's input as the styles hand it to the module's own code."""

    def ran(self, operation: Operation, key: tuple[Any, ...]) -> None:
        """An operator has run."""
        raise NotImplementedError

    def finished(self, operation: Operation) -> None:
        """What its results are is known."""


def _tensors(tree: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_of(tree) if not is_transformed(tensor)]


def shape_of(leaf: Any) -> Any:
    """What can be compared of an argument: of a tensor its shape, of a process group or a generator nothing."""
    if isinstance(leaf, Tensor):
        return TensorShape(tuple(leaf.shape), tuple(leaf.stride()), leaf.dtype, constant_index(leaf))
    return None if isinstance(leaf, torch.ScriptObject | torch.Generator) else leaf
