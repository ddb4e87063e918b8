"""What a model returns: its logits, or another main output, and the losses beside it.

A model of the user's own or of transformers returns a tensor, a tuple, a mapping or a dataclass: which of them is what
has one answer, for training, derive, check and verify.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Mapping
from typing import Any

from torch import Tensor

from colrow.errors import PlanError


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
    """The tensors in tuples, lists, mappings and dataclasses, in order, each with its field or key, or `output_1` for
    the second of a tuple; those of nested ones are joined by dots."""
    if isinstance(output, Tensor):
        yield name, output
        return
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple | list):
        keys = getattr(output, "_fields", [f"output_{i}" for i in range(len(output))])  # of a named tuple
        items = list(zip(keys, output, strict=True))
    elif dataclasses.is_dataclass(output):
        items = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
    for key, value in items:
        yield from output_tensors(value, f"{name}.{key}".lstrip("."))
