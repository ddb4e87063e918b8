"""Operators of our own, as `torch.library.custom_op` registers them, and with a third of its CPU time.

For every call `custom_op` checks that outputs alias no input, enters a function that keeps dynamo out, and takes lists
of tensors apart and together with pytree, several times. Small models wait for the CPU that does so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from colrow.torch_compat.names import private

_PURPOSE = "to register operators"
_BELOW_AUTOGRAD = private("torch._C:_AutoDispatchBelowAutograd", _PURPOSE)
_KEYS_BELOW = private("torch._C:_after_autograd_keyset", _PURPOSE)
_LIBRARY = torch.library.Library("colrow", "FRAGMENT")


class Operator:
    """The operator `colrow::name`, which changes none of its arguments and returns none of them.

    Args:
        schema: its arguments and results, as in `torch.library.define`; none has a default.
    """

    def __init__(self, name: str, schema: str, implementation: Callable[..., Any]) -> None:
        self.qualified_name, self._name = f"colrow::{name}", name
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """The shapes of its results."""
        torch.library.register_fake(self.qualified_name, fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
        """As `torch.library.register_autograd`: for a list of tensors `backward` returns a list of gradients."""
        _LIBRARY.impl(self._name, _autograd(self._name, backward, setup_context), "Autograd", with_keyset=True)


def _autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> Callable[..., Any]:
    operator: Any = getattr(torch.ops.colrow, name).default

    class Node(torch.autograd.Function):
        """Its arguments are the dispatcher's keys, the lengths of lists (None for what is none), and all values."""

        @staticmethod
        def forward(ctx: Any, keys: Any, lengths: Sequence[int | None], *values: Any) -> Any:
            args = _together(values, lengths)
            with _BELOW_AUTOGRAD():  # and without Autograd's keys: the call would come back here
                result = operator.redispatch(keys & _KEYS_BELOW, *args)
                ctx.lengths = lengths
                setup_context(ctx, args, result)
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # of keys and lengths too, which the operator's own backward knows nothing of
            needed = ctx.needs_input_grad
            ctx.needs_input_grad = _together(needed[2:], ctx.lengths)
            try:
                found = backward(ctx, *grads)
            finally:
                ctx.needs_input_grad = needed
            return (None, None, *_apart(found)[1])

    Node.__name__ = Node.__qualname__ = f"{name}_backward"

    def call(keys: Any, *args: Any) -> Any:
        lengths, values = _apart(args)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in values):
            return Node.apply(keys, lengths, *values)
        with _BELOW_AUTOGRAD():
            return operator.redispatch(keys & _KEYS_BELOW, *args)

    return call


def _apart(args: Sequence[Any]) -> tuple[list[int | None], list[Any]]:
    """The length of each list among the arguments, None for what is no list; and what is in them."""
    lengths: list[int | None] = []
    values: list[Any] = []
    for arg in args:
        if isinstance(arg, list):
            lengths.append(len(arg))
            values += arg
        else:
            lengths.append(None)
            values.append(arg)
    return lengths, values


def _together(values: Sequence[Any], lengths: Sequence[int | None]) -> tuple[Any, ...]:
    args, at = [], 0
    for length in lengths:
        args.append(values[at] if length is None else list(values[at : at + length]))
        at += 1 if length is None else length
    return tuple(args)
