"""Modules whose own code drops elements of a shard: each rank draws its shard of the unsharded tensor's mask."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.errors import ColrowError
from colrow.mesh import Mesh
from colrow.parallel.parallelize import tp_axis
from colrow.parallel.random_state import derive_seed
from colrow.sharding.draws import Draw, draw_shard, draws, is_dropout, may_draw
from colrow.sharding.local_layout import Kind
from colrow.torch_compat import TorchDispatchMode, is_async, is_fake, tree_leaves

ARRANGED = "_colrow_arranged_draws"
"""Module attribute: its draws are arranged."""


class DrawsChangedError(ColrowError):
    """A module draws other random numbers than the dry run saw."""


def arrange_draws(
    model: nn.Module, modules: Mapping[str, tuple[Draw, ...]], mesh: Mesh | DeviceMesh, *, compiled: bool = False
) -> None:
    """Let each rank draw its shard of the unsharded tensor's dropout masks, in place; see [Note: dropout on shards].

    On a GPU each rank has a seed of its own for its shard instead: equal in distribution to one process's mask, and
    another one. Call it after `parallelize`, and before recomputation and compilation.

    Args:
        modules: the masks that each module's own code draws in a call (`dryrun.random_draws`); modules that the model
            lacks are passed over.
        compiled: blocks will be compiled. The modules that draw stay out of the graphs.
    """
    tp_mesh = tp_axis(mesh)
    present = dict(model.named_modules())
    for name, drawn in modules.items():
        if (module := present.get(name)) is not None:
            run: Any = partial(_forward, name, drawn, tp_mesh.get_local_rank(), tp_mesh.size(), module.forward)
            module.forward = torch.compiler.disable(run) if compiled else run
            module.__dict__[ARRANGED] = True


def has_arranged_draws(module: nn.Module) -> bool:
    """Whether some module in it stays out of graphs."""
    return any(ARRANGED in part.__dict__ for part in module.modules())


def _forward(
    name: str, drawn: tuple[Draw, ...], rank: int, ranks: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    with _calls(_Call(name, iter(drawn)), rank, ranks):
        return forward(*args, **kwargs)


class _Call:
    """A call of a module, and the masks that its own code has still to draw."""

    def __init__(self, name: str, left: Iterator[Draw]) -> None:
        self._name, self._left = name, left

    def next(self) -> Draw:
        if (draw := next(self._left, None)) is None:
            raise DrawsChangedError(
                f"module {self._name or 'model'} drops elements of more tensors than in the dry run, so this rank's "
                "shards of their masks are unknown: let it drop the same ones in every forward, or leave the module "
                "out of the plan"
            )
        return draw


class _Running(threading.local):
    """Autograd recomputes forwards on threads of its own."""

    mode: _ShardedDraws | None = None


_RUNNING = _Running()


@contextmanager
def _calls(call: _Call, rank: int, ranks: int) -> Iterator[None]:
    """Within, draws belong to `call`, and those of modules that it calls to theirs."""
    if _RUNNING.mode is not None:
        _RUNNING.mode.calls.append(call)
        try:
            yield
        finally:
            _RUNNING.mode.calls.pop()
        return
    _RUNNING.mode = mode = _ShardedDraws(call, rank, ranks)
    try:
        with mode:
            yield
    finally:
        _RUNNING.mode = None


@contextmanager
def draws_suspended() -> Iterator[None]:
    """Within, no module's draws are arranged but those of modules that are called there. Around a compiled block: torch
    runs none under a TorchDispatchMode."""
    mode = _RUNNING.mode
    if mode is None:
        yield
        return
    mode.__exit__(None, None, None)
    _RUNNING.mode = None
    try:
        yield
    finally:
        _RUNNING.mode = mode
        mode.__enter__()


class _ShardedDraws(TorchDispatchMode):
    def __init__(self, call: _Call, rank: int, ranks: int) -> None:
        super().__init__()
        self.calls, self._rank, self._ranks = [call], rank, ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not may_draw(func) or not is_dropout(func) or not draws(func, args, kwargs):
            return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(x, DTensor) or is_async(x) for x in tensors):
            return NotImplemented  # it comes again, on local tensors
        if any(x.is_meta or is_fake(x) for x in tensors):
            return func(*args, **kwargs)  # DTensor asks for the result's shape
        draw = self.calls[-1].next()
        if draw.layout.kind is not Kind.SHARDED:
            return func(*args, **kwargs)
        if any(x.is_cuda for x in tensors):
            with _own_seed(self._rank):
                return func(*args, **kwargs)
        return draw_shard(func, args, kwargs, draw, self._rank, self._ranks)


@contextmanager
def _own_seed(rank: int) -> Iterator[None]:
    """Within, the GPU's generator has a state of this rank's own. It follows from a number that all ranks draw alike,
    on the host, so that nothing waits for the GPU and the ranks' generators stay equal."""
    common = int(torch.randint(2**62, ()))
    before = torch.cuda.get_rng_state()
    torch.cuda.manual_seed(derive_seed("shard", common, rank))
    try:
        yield
    finally:
        torch.cuda.set_rng_state(before)
