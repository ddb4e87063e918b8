"""Modules that torch.export cannot trace, as single operators: what they compute is not looked into, and not sharded.

Such a module routes by data, branches on it, or makes tensors whose sizes depend on it (`unique`, `nonzero`). Within
`opaque_modules` its forward is one operator of its inputs and its parameters, `colrow_plan::opaque`, which has no rule:
so none of them is sharded, and their gradients are accounted for as those of any operator are. What it returns (how
many tensors, of which shapes) is seen in one real forward pass of the model; on the meta device, where there is none,
it is taken for a tensor like its first input.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from colrow.derive.failure import TraceError
from colrow.dryrun.calls import Inputs, call_model
from colrow.plans.patterns import with_stars
from colrow.torch_compat import tensors_in, tree_flatten, tree_unflatten

LIBRARY = torch.library.Library("colrow_plan", "FRAGMENT")
LIBRARY.define("opaque(Tensor[] xs, Tensor[] params, SymInt[] shape, ScalarType dtype) -> Tensor")


def _opaque(xs: list[Tensor], params: list[Tensor], shape: list[int], dtype: torch.dtype) -> Tensor:
    # takes all inputs and parameters, so that the graph shows what the result depends on
    return (xs or params)[0].new_empty(shape, dtype=dtype)


LIBRARY.impl("opaque", _opaque, "CompositeExplicitAutograd")
torch.library.register_fake("colrow_plan::opaque", _opaque, lib=LIBRARY)

ROUNDS = 8
"""After as many modules that cannot be traced, the model cannot be derived."""


@dataclass(frozen=True)
class Result:
    """What a module returned: its leaves, tensors as (shape, dtype), and how they are nested."""

    leaves: tuple[Any, ...]
    tree: Any


@dataclass(frozen=True)
class OpaqueModules:
    """The modules of a model that are not looked into, why, and what each returned."""

    reasons: Mapping[str, str]
    results: Mapping[str, Result]

    def reason_of(self, parameter: str) -> str | None:
        """Why the module around a parameter cannot be traced; None where it can."""
        return next((why for name, why in self.reasons.items() if parameter.startswith(f"{name}.")), None)

    @contextlib.contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """The modules' forwards are single operators."""
        modules = {name: model.get_submodule(name) for name in self.reasons}
        own = {name: module.__dict__.get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            # An instance's attribute shadows its class's forward. One that a library has set is put back at the end.
            module.__dict__["forward"] = _forward_of(module, self.results.get(name))
        try:
            yield
        finally:
            for name, module in modules.items():
                del module.__dict__["forward"]
                if own[name] is not None:
                    module.__dict__["forward"] = own[name]


NOTHING_OPAQUE = OpaqueModules({}, {})


def _forward_of(module: nn.Module, result: Result | None) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        xs = tensors_in((args, kwargs))
        params = list(module.parameters())
        seen = result or Result(((tuple(xs[0].shape), xs[0].dtype),), tree_flatten(0)[1])
        made = [
            torch.ops.colrow_plan.opaque(xs, params, *leaf) if isinstance(leaf, tuple) else leaf for leaf in seen.leaves
        ]
        return tree_unflatten(made, seen.tree)

    return forward


def opaque_modules(model: nn.Module, inputs: Inputs, error: TraceError, known: OpaqueModules) -> OpaqueModules:
    """`known` and the module that cannot be traced, with those at its place in other layers; where it is known already,
    the one around it.

    Raises:
        TraceError: no module is known that cannot be traced, or it is the model itself, or there are too many.
    """
    name = error.module
    while name and name in known.reasons:
        name = name.rpartition(".")[0]
    if not name or len({with_stars(other) for other in known.reasons}) >= ROUNDS:
        raise error
    cls = type(model.get_submodule(name))
    alike = [n for n, m in model.named_modules() if with_stars(n) == with_stars(name) and type(m) is cls]
    inside = {n: why for n, why in known.reasons.items() if not any(n.startswith(f"{outer}.") for outer in alike)}
    reasons = {**inside, **dict.fromkeys(alike, str(error).partition(": ")[2])}
    return OpaqueModules(reasons, _results(model, inputs, list(reasons)))


def _results(model: nn.Module, inputs: Inputs, names: list[str]) -> dict[str, Result]:
    """What the modules return in one forward pass of the model; nothing where it does not run."""
    found: dict[str, Result] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            leaves, tree = tree_flatten(out)
            kept = ((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves)
            found[name] = Result(tuple(kept), tree)

        return hook

    training = {module: module.training for module in model.modules()}
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.no_grad(), contextlib.suppress(Exception):
            call_model(model.eval(), inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return found
