"""Parameters that are DTensors to the optimizer and local tensors to the module that owns them.

torch's styles turn a module's inputs into DTensors, because its weights are. Where DTensor does not know the arithmetic
of a shard (a rank that uses some rows of a replicated weight, a fused weight, a norm on local heads), the module has to
see local tensors, while optimizer, clipping and checkpoints keep one DTensor under the parameter's name. A view is a
property on a subclass made for the module's class: `self.weight` reads the registered DTensor through a function, and
`_parameters` is unchanged, so FSDP2 and state dicts see the DTensor. Equal modules of all layers get the same subclass:
torch.compile guards on the class of a module, and would compile each layer again.

A view decides the placement of the gradient: `to_local(grad_placements=[Partial()])` declares that each rank's gradient
is one term of a sum, `to_local()` that all ranks hold the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

View = Callable[[DTensor], Tensor]
VIEWS = "_colrow_views"  # module attribute: {parameter name: View}
PARAMETER_ATTRIBUTES = "_colrow_parameter_attributes"
"""Module attribute: {parameter name: what the user set on it}; the module's own code may read it in forward."""


def view_parameters(module: nn.Module, views: dict[str, View]) -> None:
    """Make `module.NAME` return `views[NAME](parameter)` for each named parameter that is a DTensor."""
    if views:
        module.__dict__[VIEWS] = {**module.__dict__.get(VIEWS, {}), **views}
        cls: Any = type(module)
        module.__class__ = _subclass(cls, tuple(sorted(views)), None)


def remove_views(module: nn.Module) -> None:
    """Undo `view_parameters`."""
    if module.__dict__.pop(VIEWS, None):
        module.__class__ = type(module).__bases__[-1]


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `forward(self, ...)`, a function of module level, take the place of the module's own."""
    cls: Any = type(module)
    module.__class__ = _subclass(cls, (), forward)


def subclass_in_its_place(cls: Any, body: Mapping[str, object]) -> Any:
    """A subclass that has the class's name, module and docstring. Cache it for equal modules: see above."""
    own = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    told = any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1])
    return type(cls.__name__, (_Unannounced, cls) if told else (cls,), {**body, **own})


class _Unannounced:
    """Before a class in the bases, it keeps the class's `__init_subclass__` from being called: that may ask for
    arguments, or enter the subclass in a registry in the class's place."""

    def __init_subclass__(cls) -> None:
        pass


@functools.cache
def _subclass(cls: Any, names: tuple[str, ...], forward: Callable[..., Any] | None) -> Any:
    # known here: torch.compile goes through the properties' code
    make = _property if cls.__getattr__ is nn.Module.__getattr__ else _property_read_by_class
    body: dict[str, object] = {name: make(name) for name in names}
    if forward is not None:
        body["forward"] = forward
    return subclass_in_its_place(cls, body)


def _property(name: str) -> property:
    def read(module: nn.Module) -> Tensor | None:
        param: Any = module._parameters[name]
        # Between uses FSDP2 registers its own shard, a DTensor on dp_shard x tp, and reads this attribute when it
        # exchanges parameters: returned as it is. Before forward and backward it registers the all-gathered parameter,
        # a DTensor on tp alone: what the module computes with, through the view.
        view: View = getattr(module, VIEWS)[name]
        if not isinstance(param, DTensor) or param.device_mesh.ndim > 1:
            return param
        value = view(param)
        for key, attribute in getattr(module, PARAMETER_ATTRIBUTES, {}).get(name, {}).items():
            setattr(value, key, attribute)
        return value

    def write(module: nn.Module, value: nn.Parameter | None) -> None:
        module.register_parameter(name, value)

    return property(read, write)


def _property_read_by_class(name: str) -> property:
    """Of a class with a `__getattr__` of its own, which a property hides: it makes a complex number of two, say. It is
    given the view in the parameter's place."""
    plain = _property(name)

    def read(module: Any) -> Any:
        param, seen = module._parameters[name], plain.__get__(module)
        module._parameters[name] = seen
        try:
            return type(module).__getattr__(module, name)
        finally:
            module._parameters[name] = param

    return property(read, plain.__set__)
