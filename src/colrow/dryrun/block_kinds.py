"""Which blocks of a model are alike: of each kind a reduced model keeps two, so a kind that is missed is never judged.

[Note: kinds of blocks]
Two blocks are of one kind when nothing tells them apart:
- what they are: classes, shapes, styles, and every attribute (numbers, texts, lists, functions with what they close
  over, hooks, what a user set on a parameter). A layer's own number (`layer_idx`) is no difference by itself;
- what they run: the operators of their forward, with shapes and integers. So a layer that does something else by its
  number (`layer_idx % 4`) or by a global table is of another kind.

A stack is irregular when the model's own code does something else between two blocks than between others, gives them
the results of other blocks than the ones just before (a U-Net's skips), or does not run each once, in order: without
some of its blocks the others would stand at other indices. It is kept complete.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from colrow.dryrun.calls import Inputs, call_model
from colrow.dryrun.code_caches import caches_forgotten
from colrow.dryrun.fake_world import materialize_fake, meta_copy
from colrow.models.blocks import block_stacks
from colrow.plans.patterns import with_stars
from colrow.sharding.parameter_state import state_of
from colrow.styles.base import Style
from colrow.torch_compat import TorchDispatchMode, fake_tensors, tensors_in, tree_leaves

_KNOWN_CODE = ("colrow.models.", "torch.")
_LAYER_NUMBERS = ("idx", "index", "layer_id", "layer_number")  # attributes that differ between equal blocks
_OF_TORCH = set(nn.Module().__dict__)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True)
class BlockTraces:
    """What the unsharded model runs, by block.

    Attributes:
        runs: a block's name to what its forward runs; empty where the model could not be run.
        irregular: the names of irregular stacks ([Note: kinds of blocks]).
        dtype: of floating-point parameters, where the model runs in no other.
    """

    runs: Mapping[str, Hashable] = field(default_factory=dict)
    irregular: frozenset[str] = frozenset()
    dtype: torch.dtype | None = None


def trace_blocks(
    model: nn.Module, make_inputs: Callable[[nn.Module], Inputs], dtype: torch.dtype | None = None
) -> BlockTraces:
    """Run a copy of the model's forward on fake tensors. A model that does not run tells nothing."""
    stacks = [stack for stack in block_stacks(model) if stack.name and len(stack.blocks) > 1]
    if not stacks:
        return BlockTraces()
    copy = meta_copy(model)
    recorder = _Recorder()
    for stack in stacks:
        for key in stack.blocks:
            name = f"{stack.name}.{key}"
            recorder.watch(name, copy.get_submodule(name))
    try:
        with warnings.catch_warnings(), caches_forgotten(model), fake_tensors():
            warnings.simplefilter("ignore")
            materialize_fake(copy, dtype)
            inputs = make_inputs(copy)
            with recorder:
                call_model(copy, inputs)
    except Exception as error:
        if dtype is None and "BF16" in str(error):  # torch's grouped matmuls take no other type
            return replace(trace_blocks(model, make_inputs, torch.bfloat16), dtype=torch.bfloat16)
        return BlockTraces()  # the dry run itself reports it
    irregular = frozenset(stack.name for stack in stacks if recorder.irregular(stack.name, list(stack.blocks)))
    return BlockTraces({name: tuple(runs) for name, runs in recorder.runs.items()}, irregular)


class _Recorder(TorchDispatchMode):
    """What runs inside each block, and between the end of one and the start of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, list[Hashable]] = defaultdict(list)
        self.calls: list[tuple[str, tuple[Hashable, ...]]] = []
        """The blocks in the order in which they ran, each with what ran since the block before."""
        self._between: list[Hashable] = []
        self._inside: list[str] = []
        self._results: dict[int, tuple[Tensor, int]] = {}
        """What blocks gave, by identity, each with the number of blocks that had run; held so that none is reused."""

    def watch(self, name: str, block: nn.Module) -> None:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            since = tuple(self._blocks_since(leaf) for leaf in tree_leaves((args, kwargs)))
            self.calls.append((name, (*self._between, since)))
            self._between.clear()
            self._inside.append(name)

        def leave(_: nn.Module, args: Any, out: Any) -> None:
            self._inside.pop()
            self._results |= {id(x): (x, len(self.calls)) for x in tensors_in(out)}

        block.register_forward_pre_hook(enter, prepend=True, with_kwargs=True)
        block.register_forward_hook(leave)

    def _blocks_since(self, leaf: Any) -> int | None:
        """How many blocks have run since the one that gave this value; None where none did."""
        found = self._results.get(id(leaf))
        return None if found is None else len(self.calls) - found[1]

    def irregular(self, stack: str, keys: list[str]) -> bool:
        prefix = stack + "."
        order = [name.removeprefix(prefix) for name, _ in self.calls if name.startswith(prefix)]
        before = [ran for name, ran in self.calls if name.startswith(prefix)]
        return order != keys or len(set(before[1:])) > 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        ran = (str(func), *(shape_or_value(leaf) for leaf in tree_leaves((args, kwargs))))
        if self._inside:
            self.runs[self._inside[-1]].append(ran)
        else:
            self._between.append((ran, tuple(self._blocks_since(leaf) for leaf in tree_leaves((args, kwargs)))))
        return out


def shape_or_value(leaf: Any) -> Hashable:
    if isinstance(leaf, Tensor):
        return (None,) if leaf.is_nested else tuple(leaf.shape)  # a strided nested tensor has no shape
    return float if isinstance(leaf, float) else str(leaf)  # a factor moves nothing between elements


def block_kind(block: nn.Module, name: str, styles: Mapping[str, Style], traces: BlockTraces) -> Hashable:
    """Equal for blocks of one kind. `name`: in the model that `styles` and `traces` speak of."""
    facts: list[Hashable] = [traces.runs.get(name)]
    for inner, module in block.named_modules():
        attributes = [(k, v) for k, v in module.__dict__.items() if k not in _OF_TORCH and not _is_layer_number(k)]
        attributes += [(k, list(module.__dict__[k].values())) for k in _HOOKS]
        style = styles.get(f"{name}.{inner}" if inner else name)
        own = tuple((k, _fact(v)) for k, v in sorted(attributes, key=lambda item: item[0]))
        facts.append((inner, type(module), module.training, own, repr(style)))
    for key, tensor in [*block.named_parameters(), *block.named_buffers()]:
        state = state_of(tensor)
        set_on_it = [state.attributes, *state.gradient_hooks.values(), *state.accumulated_hooks.values()]
        facts.append((key, tuple(tensor.shape), tensor.dtype, tensor.requires_grad, _fact(set_on_it)))
    return tuple(facts)


def code_set_on(module: nn.Module) -> list[tuple[str, Any]]:
    """The code that this one module has beside its class: callable attributes, and hooks, those of parameters too."""
    attributes = [(key, value) for key, value in module.__dict__.items() if key not in _OF_TORCH]
    found = [(key, value) for key, value in attributes if callable(value) and not isinstance(value, type)]
    found += [(key, hook) for key in _HOOKS for hook in module.__dict__[key].values()]
    for key, param in module._parameters.items():
        if param is not None:
            state = state_of(param)
            found += [(key, hook) for hook in (*state.gradient_hooks.values(), *state.accumulated_hooks.values())]
    return found


def runs_known_code(model: nn.Module) -> bool:
    """Whether all that runs is the project's or torch's: every class, and every function and hook on a module."""
    return all(
        f"{code.__module__}.".startswith(_KNOWN_CODE)
        for module in model.modules()
        for code in (type(module), *(value for _, value in code_set_on(module)))
    )


def module_kinds(model: nn.Module) -> set[tuple[str, type, Hashable]]:
    """The model's modules without their sizes: names with `*` for numbers, classes, and code set on single modules."""
    return {
        (with_stars(name), type(module), frozenset((key, _fact(code)) for key, code in code_set_on(module)))
        for name, module in model.named_modules()
    }


def _is_layer_number(key: str) -> bool:
    return any(word in key for word in _LAYER_NUMBERS)


def _fact(value: Any, depth: int = 4) -> Hashable:
    """What an attribute is: its value where that can be compared, else its identity."""
    if value is None or isinstance(value, int | float | str | bytes | torch.dtype | torch.device | type):
        return type(value), value
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, nn.Module):
        return (type(value),)
    if depth == 0:
        return id(value)
    # objects may hold each other in a circle: a bound on the depth ends it
    inner = functools.partial(_fact, depth=depth - 1)
    if isinstance(value, list | tuple):
        return type(value), tuple(map(inner, value))
    if isinstance(value, Mapping):
        return type(value), tuple((str(key), inner(item)) for key, item in value.items())
    if isinstance(value, functools.partial):
        return inner(value.func), inner(value.args), inner(value.keywords)
    if isinstance(value, types.MethodType):
        return inner(value.__func__), inner(value.__self__)
    if isinstance(value, types.FunctionType):
        # A function that is made anew for each layer is the same code with, perhaps, other values closed over.
        closed = tuple(inner(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, closed, inner(value.__defaults__)
    if hasattr(value, "__dict__"):
        return type(value), inner({key: item for key, item in vars(value).items() if not _is_layer_number(key)})
    return id(value)
