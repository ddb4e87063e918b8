"""torch.compile, block by block: the layers are alike, so one graph serves all of them, and compiling takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from colrow.parallel.fused_graph import fused_inductor
from colrow.parallel.random_draws import ARRANGED, draws_suspended, has_arranged_draws
from colrow.torch_compat import AsyncCollectiveTensor, is_async


def compile_forward(
    block: nn.Module, backend: str = "inductor", dynamic: bool | None = None, *, fused: bool = True
) -> None:
    """Compile a block's forward in place. Its name in the model stays, and hooks on the block (FSDP's, a plan's style
    at block level) run outside the graph; those on modules inside it are traced.

    A module whose draws are arranged (`arrange_draws`) stays out of the graph, which is split there; a block whose own
    draws are is not compiled.

    Args:
        backend, dynamic: of torch.compile.
        fused: rewrite graphs before inductor compiles them (`fused_graph`).
    """
    if ARRANGED in block.__dict__:
        return
    compiler = fused_inductor if fused and backend == "inductor" else backend
    graph = torch.compile(block.forward, fullgraph=not has_arranged_draws(block), backend=compiler, dynamic=dynamic)
    block.forward = partial(_run, graph)
    block.register_forward_pre_hook(_wait_for_inputs, with_kwargs=True)


def _run(graph: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with draws_suspended():
        return graph(*args, **kwargs)


def _wait_for_inputs(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    return tuple(_waited(arg) for arg in args), {name: _waited(arg) for name, arg in kwargs.items()}


def _waited(x: Any) -> Any:
    return _Wait.apply(x) if is_async(x) else x


class _Wait(torch.autograd.Function):
    """y = x, with its collective finished.

    DTensor hands the embedding's output on while its reduce-scatter runs. Into a compiled graph such a tensor goes
    without the node of `to_local` between (torch 2.13): the redistribution before it then gets a plain gradient, where
    it needs a DTensor, and fails.
    """

    @staticmethod
    def forward(ctx: Any, x: AsyncCollectiveTensor) -> Tensor:
        waited: Tensor = x.trigger_wait()
        return waited

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
