"""Hooks and attributes that a user sets on a parameter, kept where another tensor takes the parameter's place.

torch keeps both on the tensor object: `distribute_tensor`, `copy.deepcopy`, `Module.to` of DTensors and FSDP2 make new
objects, and lose them. Without its hook a parameter gets another gradient, and nothing raises.

[Note: hooks see the unsharded gradient]
A hook is written for the parameter of one process: it may take a norm, or write rows by their global number. So on a
parameter that became a DTensor it gets the unsharded tensor, at the cost of an all-gather (of a replicated parameter
whose gradient is summed, an all-reduce), and what it returns is sharded again.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import ConfigError
from colrow.sharding.layout import full_tensor
from colrow.sharding.local_view import PARAMETER_ATTRIBUTES
from colrow.sharding.replayed_iterators import replay_iterators
from colrow.torch_compat import local_shard, parameter_hooks, tree_leaves

Hook = Callable[..., Any]
Hooks = Mapping[int, Hook]


def holders_of(model: nn.Module) -> Counter[nn.Parameter]:
    """How many modules hold each parameter: a tied one has several."""
    parameters = (param for module in model.modules() for param in module._parameters.values())
    return Counter(param for param in parameters if param is not None)


@dataclass(frozen=True)
class ParameterState:
    """What a user has set on a parameter.

    Attributes:
        gradient_hooks: of `register_hook`, the tensor's own table: a hook that is removed later is gone from it.
        accumulated_hooks: of `register_post_accumulate_grad_hook`, likewise.
    """

    attributes: dict[str, Any] = field(default_factory=dict)
    gradient_hooks: Hooks = field(default_factory=dict)
    accumulated_hooks: Hooks = field(default_factory=dict)

    @property
    def hook_names(self) -> list[str]:
        """The hooks' names, for messages."""
        hooks = [*self.gradient_hooks.values(), *self.accumulated_hooks.values()]
        return [getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks]

    def __bool__(self) -> bool:
        return bool(self.attributes or self.gradient_hooks or self.accumulated_hooks)


def state_of(param: Tensor) -> ParameterState:
    """The state of one parameter."""
    # nn.Parameter marks a tensor subclass with _is_param
    attributes = {name: value for name, value in param.__dict__.items() if name != "_is_param"}
    gradient_hooks, accumulated_hooks = parameter_hooks(param)
    return ParameterState(attributes, _of_user(gradient_hooks), _of_user(accumulated_hooks))


def states_of(model: nn.Module) -> dict[str, ParameterState]:
    """The state of each parameter that has any, under each of its names."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: state for name, param in named if (state := state_of(param))}


def set_states(model: nn.Module, states: Mapping[str, ParameterState]) -> None:
    """Give the parameters that now have these names their state. Those that have it keep it."""
    if not states:
        return
    given: set[int] = set()
    for name, param in model.named_parameters(remove_duplicate=False):
        if name not in states:
            continue
        state = states[name]
        owner, _, leaf = name.rpartition(".")
        if state.attributes:
            model.get_submodule(owner).__dict__.setdefault(PARAMETER_ATTRIBUTES, {})[leaf] = state.attributes
        if id(param) not in given:
            given.add(id(param))
            _set_state(param, state)


def refuse_hooks(model: nn.Module, by: str) -> None:
    """Raise ConfigError for the first parameter with a hook, where gradients come together outside of autograd."""
    for name, state in states_of(model).items():
        if state.hook_names:
            raise ConfigError(
                f"parameter {name} has the hook {', '.join(state.hook_names)}, and under {by} gradients are summed "
                "where no hook of a parameter runs: remove it (change a module's output, the loss, or the parameter's "
                "learning rate in its place)"
            )


@contextmanager
def kept_states(model: nn.Module) -> Iterator[None]:
    """Around a change that may put new tensors in the parameters' places."""
    states = states_of(model)
    yield
    set_states(model, states)


def detached_attributes(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy`, which refuses tensors of a graph: those that a forward left in an attribute, or that
    `torch.nn.utils.weight_norm` put there. It refuses generators too: see [Note: replayed iterators]."""
    replay_iterators(model)
    found = (value for module in model.modules() for value in tree_leaves(dict(vars(module))))
    return {id(x): x.detach().clone() for x in found if isinstance(x, Tensor) and x.grad_fn is not None}


def copied_model(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` that keeps the parameters' hooks and attributes."""
    states, memo = states_of(model), {**detached_attributes(model), **(memo or {})}
    try:
        made = copy.deepcopy(model, dict(memo))
    except Exception:
        of_torch = vars(nn.Module()).keys()
        values = [v for module in model.modules() for k, v in vars(module).items() if k not in of_torch]
        made = copy.deepcopy(model, {**memo, **_uncopied(values)})
    set_states(made, states)
    return made


def _uncopied(values: Iterable[Any], depth: int = 4) -> dict[int, Any]:
    """A memo of what cannot be copied and is shared: locks, open files, the system's generator of random numbers."""
    found = dict[int, Any]()
    for value in values:
        if value is None or isinstance(value, Tensor | nn.Module | int | float | str):
            continue
        try:
            copy.deepcopy(value, dict(found))
        except Exception:
            inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            inside = _uncopied([*inner, *getattr(value, "__dict__", {}).values()], depth - 1) if depth else {}
            found |= inside or {id(value): value}
    return found


def _set_state(param: nn.Parameter, state: ParameterState) -> None:
    param.__dict__.update(state.attributes)
    gradient_hooks, accumulated_hooks = parameter_hooks(param)  # a parameter that kept its object has them already
    if param.requires_grad and state.gradient_hooks and not gradient_hooks:
        for hook in _on_unsharded(param, state.gradient_hooks, _GradientHooks):
            param.register_hook(hook)
    if param.requires_grad and state.accumulated_hooks and not accumulated_hooks:
        for hook in _on_unsharded(param, state.accumulated_hooks, _AccumulatedHooks):
            param.register_post_accumulate_grad_hook(hook)


def _on_unsharded(param: nn.Parameter, hooks: Hooks, hooks_cls: type[_UnshardedHooks]) -> list[Hook]:
    """The hooks as `param` can run them (see [Note: hooks see the unsharded gradient])."""
    found = list(hooks.values())
    if not isinstance(param, DTensor):
        return found
    return [hooks_cls(hooks, param.device_mesh, tuple(param.placements))]


@dataclass(frozen=True)
class _UnshardedHooks:
    """Hooks of a plain parameter on the DTensor that took its place: called as one hook."""

    hooks: Hooks
    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    def __call__(self, tensor: Any) -> Tensor | None:
        raise NotImplementedError

    def shard(self, full: Tensor) -> DTensor:
        replicated = [Replicate()] * self.mesh.ndim
        return DTensor.from_local(full, self.mesh, replicated, run_check=False).redistribute(placements=self.placements)


class _GradientHooks(_UnshardedHooks):
    """Hooks of `register_hook`: gradient to gradient, or None where it stays as it is."""

    def __call__(self, grad: Tensor) -> Tensor | None:
        if not self.hooks:
            return None
        full = full_tensor(grad)  # a collective: every rank has the hook, and calls it at the same place of backward
        for hook in tuple(self.hooks.values()):
            returned = hook(full)
            full = full if returned is None else returned
        return self.shard(full)


class _AccumulatedHooks(_UnshardedHooks):
    """Hooks of `register_post_accumulate_grad_hook`: they get the parameter, and may change it and its gradient."""

    @torch.no_grad()
    def __call__(self, param: DTensor) -> None:
        if not self.hooks:
            return
        plain = nn.Parameter(full_tensor(param.detach()))
        plain.__dict__.update(state_of(param).attributes)
        plain.grad = None if param.grad is None else full_tensor(param.grad)
        for hook in tuple(self.hooks.values()):
            hook(plain)
        param.grad = None if plain.grad is None else self.shard(plain.grad)
        # always: a hook that writes to plain.data leaves no trace in its version
        local_shard(param).copy_(local_shard(self.shard(plain.detach())))


def _of_user(hooks: Hooks) -> Hooks:
    """The user's own table where a DTensor runs it; hooks that were set on the DTensor come after it."""
    if not any(isinstance(hook, _UnshardedHooks) for hook in hooks.values()):
        return hooks
    if len(hooks) == 1:
        (only,) = hooks.values()
        assert isinstance(only, _UnshardedHooks)
        return only.hooks
    tables = (hook.hooks.values() if isinstance(hook, _UnshardedHooks) else (hook,) for hook in hooks.values())
    return dict(enumerate(hook for table in tables for hook in table))
