"""torch.compile for each block: one graph a block, compiled once for all of them where they are alike.

Only the block's forward is compiled. FSDP's hooks and the plan's at block level run around it, uncompiled; the plan's
inside it are part of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.utils._pytree import tree_map_only

from colrow.parallel.activation_checkpoint import WholeBlock


def compile_blocks(blocks: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Compile each block's forward, in place: after the plan and activation checkpointing, before data parallelism.

    A block that cannot be one graph raises when it first runs; nothing falls back to eager.
    """
    for block in blocks:
        forward: Any = block.forward
        if isinstance(forward, WholeBlock):
            # Recomputation calls the graph again. Inside the graph, torch 2.13 cannot order what backward needs when
            # attention, an operator that may draw random numbers, is recomputed.
            forward.forward = _compiled(forward.forward, backend)
        else:
            block.forward = _compiled(forward, backend)


def _compiled(forward: Callable[..., Any], backend: str) -> Callable[..., Any]:
    return _waited(torch.compile(forward, backend=backend, fullgraph=True))


def _waited(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The embedding hands on the result of a reduce-scatter that nobody has waited for, a tensor subclass. A compiled
    graph takes it, but returns a gradient that is no DTensor, and backward fails (torch 2.11 to 2.13)."""

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(AsyncCollectiveTensor, _Wait.apply, (args, kwargs))
        return forward(*args, **kwargs)

    return run


class _Wait(torch.autograd.Function):
    """The same values, there to be read; the gradient passes."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        value: Tensor = x.wait()
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
