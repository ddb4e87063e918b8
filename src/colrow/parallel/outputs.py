"""What a model returns: its logits, or another main output, and the losses beside it.

A model of the user's own or of transformers returns a tensor, a tuple, a mapping or a dataclass: which of them is what
has one answer, for training, derive, check and verify.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from colrow.errors import PlanError
from colrow.torch_compat import tree_flatten, tree_unflatten


def main_tensor(output: Any) -> Tensor:
    """A model's logits where it gives some, else the first tensor of its output.

    Raises:
        PlanError: there is no tensor in it.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    tensor = next((tensor for _, tensor in output_tensors(output)), None)
    if tensor is None:
        raise PlanError(f"the model returns no tensor, but {type(output).__name__}: wrap it in one that does")
    return tensor


def auxiliary_losses(output: Any) -> dict[str, Tensor]:
    """The scalars of the output, beside the main one, that a gradient can flow from, by name."""
    main = main_tensor(output)
    return {
        name: tensor
        for name, tensor in output_tensors(output)
        if tensor is not main and tensor.dim() == 0 and tensor.requires_grad
    }


def untrained_losses(output: Any, trained: Container[str]) -> tuple[str, ...]:
    """Sorted names of losses in the output that are not `trained`: scalars, and tensors called losses, as of layers."""
    main = main_tensor(output)
    losses = (
        name
        for name, tensor in output_tensors(output)
        if tensor is not main and tensor.requires_grad and (tensor.dim() == 0 or "loss" in name.lower())
    )
    return tuple(sorted(name for name in losses if name not in trained))


def output_tensors(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in tuples, lists, mappings, dataclasses and objects with logits, in order, each with its field or
    key, or `output_1` for the second of a tuple; those of nested ones are joined by dots."""
    if isinstance(output, Tensor):
        yield name, output
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple | list):
        keys = getattr(output, "_fields", [f"output_{i}" for i in range(len(output))])  # of a named tuple
        items = list(zip(keys, output, strict=True))
    else:
        items = list(_fields(output).items())
    for key, value in items:
        yield from output_tensors(value, f"{name}.{key}".lstrip("."))


def flatten_tensors(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """Leaves of `tree`, and what makes one like it of others. A tree without floating tensors is looked into further
    than torch's trees go: dataclasses and objects with logits are leaves to these."""
    leaves, spec = tree_flatten(tree)
    if any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves):
        return leaves, partial(tree_unflatten, treespec=spec)
    inner: list[tuple[int, str, list[Any], Callable[[Sequence[Any]], Any]]] = []
    for i, leaf in enumerate(leaves):
        inner += [(i, name, *flatten_tensors(value)) for name, value in _fields(leaf).items()]

    def rebuilt(others: Sequence[Any]) -> Any:
        made, rest = [copy.copy(leaf) if _fields(leaf) else leaf for leaf in leaves], list(others)
        for i, name, parts, rebuild in inner:
            object.__setattr__(made[i], name, rebuild([rest.pop(0) for _ in parts]))  # a dataclass may be frozen
        return tree_unflatten(made, spec)

    return [part for _, _, parts, _ in inner for part in parts], rebuilt


def _fields(output: Any) -> dict[str, Any]:
    """Those of a dataclass, or of an object that has logits; of others none."""
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        return {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    return dict(vars(output)) if isinstance(getattr(output, "logits", None), Tensor) else {}
