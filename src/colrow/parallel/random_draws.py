"""Modules whose own code draws random numbers for a shard: each rank draws its shard of the unsharded tensor's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.errors import ColrowError
from colrow.mesh import Mesh
from colrow.parallel.parallelize import tp_axis
from colrow.parallel.random_state import derive_seed
from colrow.plans.patterns import is_within
from colrow.sharding.draws import Draw, draw_shard, draws, draws_by_element, may_draw
from colrow.sharding.local_layout import Kind
from colrow.torch_compat import TorchDispatchMode, is_async, is_fake, tensors_in

ARRANGED = "_colrow_arranged_draws"
"""Module attribute: its draws are arranged."""


class DrawsChangedError(ColrowError):
    """A module draws other random numbers than the dry run saw."""


def arrange_draws(
    model: nn.Module,
    modules: Mapping[str, tuple[Draw, ...]],
    mesh: Mesh | DeviceMesh,
    *,
    compiled: Iterable[nn.Module] = (),
) -> None:
    """Let each rank draw its shard of the unsharded tensor's random numbers; see [Note: random numbers on shards].

    On a GPU each rank has a seed of its own for its shard instead: equal in distribution to one process's numbers, and
    others. Call it after `parallelize`, and before recomputation and compilation.

    Args:
        modules: what each module's own code draws by element in a call (`dryrun.random_draws`); modules that the model
            lacks are passed over.
        compiled: blocks that will be compiled. Modules in them that draw for shards stay out of the graphs.
    """
    tp_mesh = tp_axis(mesh)
    if tp_mesh.device_type != "cpu":  # other numbers than one process's anyway: their order does not matter
        modules = {name: tuple(draw._replace(order=None) for draw in drawn) for name, drawn in modules.items()}
    present = dict(model.named_modules())
    in_graphs = {part for block in compiled for part in block.modules() if part is not block}
    blocks = {name for name, module in present.items() if any(module is block for block in compiled)}
    for name, drawn in modules.items():
        if (module := present.get(name)) is not None and _is_needed(name, modules, blocks):
            run: Any = partial(_forward, name, drawn, tp_mesh.get_local_rank(), tp_mesh.size(), module.forward)
            module.forward = torch.compiler.disable(run) if module in in_graphs else run
            module.__dict__[ARRANGED] = True


def _is_needed(name: str, modules: Mapping[str, tuple[Draw, ...]], blocks: set[str]) -> bool:
    """Whether the module's draws are arranged, or it is called by one whose are: without a mode of its own its draws
    would be counted as the caller's. A module around a compiled block does not count: its mode is off while the graph
    runs."""
    around = {outer for block in blocks if _is_inside(name, block) for outer in modules if _is_inside(block, outer)}
    calling = [outer for outer in modules if _is_inside(name, outer) and outer not in around - blocks]
    return any(draw.is_arranged for outer in calling for draw in modules[outer])


def _is_inside(name: str, outer: str) -> bool:
    """Whether the module `name` is `outer` or lies inside it; all lie inside the model, ``""``."""
    return not outer or is_within(name, outer)


def has_arranged_draws(module: nn.Module) -> bool:
    """Whether some module in it stays out of graphs."""
    return any(ARRANGED in part.__dict__ for part in module.modules())


def _forward(
    name: str, drawn: tuple[Draw, ...], rank: int, ranks: int, forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    mode = _ShardedDraws(_Call(name, iter(drawn)), rank, ranks)
    running = _RUNNING.modes
    running.append(mode)
    try:
        with mode:
            return forward(*args, **kwargs)
    finally:
        running.pop()


class _Call:
    """A call of a module, and what its own code has still to draw."""

    def __init__(self, name: str, left: Iterator[Draw]) -> None:
        self._name, self._left = name, left

    def next(self) -> Draw:
        if (draw := next(self._left, None)) is None:
            raise DrawsChangedError(
                f"module {self._name or 'model'} draws random numbers for more tensors than in the dry run, so this "
                "rank's shards of them are unknown: let it draw the same in every forward, or leave the module out of "
                "the plan"
            )
        return draw


class _Running(threading.local):
    """The modes that are on, the innermost last. Autograd recomputes forwards on threads of its own."""

    def __init__(self) -> None:
        self.modes: list[_ShardedDraws] = []


_RUNNING = _Running()


@contextmanager
def draws_suspended() -> Iterator[None]:
    """Within, no module's draws are arranged but those of modules that are called there. Around a compiled block: torch
    runs none under a TorchDispatchMode."""
    modes, _RUNNING.modes = _RUNNING.modes, []
    for mode in reversed(modes):
        mode.__exit__(None, None, None)
    try:
        yield
    finally:
        _RUNNING.modes = modes
        for mode in modes:
            mode.__enter__()


class _ShardedDraws(TorchDispatchMode):
    """Active during one call of a module. A module that this one calls has a mode of its own on top, also of that of a
    recomputation, so that forward and recomputation run the same operators. Meanwhile this one passes everything on."""

    def __init__(self, call: _Call, rank: int, ranks: int) -> None:
        super().__init__()
        self._call, self._rank, self._ranks = call, rank, ranks

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        resting = _RUNNING.modes[-1:] != [self]
        if resting or not may_draw(func) or not draws_by_element(func) or not draws(func, args, kwargs):
            return func(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        if any(isinstance(x, DTensor) or is_async(x) for x in tensors):
            return NotImplemented  # it comes again, on local tensors
        if any(x.is_meta or is_fake(x) for x in tensors):
            return func(*args, **kwargs)  # DTensor asks for the result's shape
        draw = self._call.next()
        is_shard = draw.layout.kind is Kind.SHARDED
        if not is_shard and (draw.order is None or not tensors):
            return func(*args, **kwargs)
        on_gpu = any(x.is_cuda for x in tensors) or torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if on_gpu and kwargs.get("generator") is None:  # a model's own generator is equal on all ranks
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
