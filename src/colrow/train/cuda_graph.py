"""A function's kernels as a CUDA graph: one launch replays them all, so a small step is no longer CPU-bound.

[Note: captured]
Capturing runs the Python of a function and none of its kernels; replaying runs the kernels, on the same addresses, and
no Python. So whatever the function reads and writes outside itself (weights, sums of gradients, the optimizer's state)
must keep its address, and Python numbers are frozen. The first calls run eagerly, on the stream of the capture: they
compile, initialise NCCL's communicators, and allocate the optimizer's state and the gradients' sums. They are steps of
training like the others. The last of them is watched: a function that waits for the GPU, or that changes a number which
a module keeps, cannot be replayed.

[Note: memory of a graph]
A replay writes to the addresses of its capture, whoever holds them by then. They lie in a pool of the graph's own,
where what was freed while capturing is free between replays: an evaluation allocates there, and needs no memory beside
the graph's. What it leaves there alive, a cache say, the next replay would overwrite: it captures anew.

[Note: state beside a graph]
Where Python keeps account of a step in `WeightCopies` (which weights are gathered, whether a sum has begun, which
gradients there are), the function runs other kernels in another state, and a replay changes no Python. So a graph
belongs to the state in which it was captured, and a call in a new state captures another one; after a replay the state
is set to that after the capture. All graphs of a function take one pool: they run one after another, and nothing in the
pool outlives a call but their results.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.config import RunConfig
from colrow.dryrun.random_draws import RandomDraws
from colrow.errors import ConfigError
from colrow.parallel.weight_copies import WeightCopies

EAGER_STEPS = 2
"""Steps before the one that captures."""
MEASURED_STEPS = 4
"""Steps before it with `train.cuda_graph: auto`: the last of them is measured, when all is compiled."""
MOST_ITEMS = 64
"""A longer list is data, not state."""
_OFF = {"train.cuda_graph": False}
_SYNCHRONIZED = "called a synchronizing CUDA operation"
_PROTOTYPE = "Synchronization debug mode is a prototype"  # torch says so each time
_TAIL = 0.1
"""A step begins on an idle GPU. If the GPU is done within this share of the step's time after the CPU has enqueued the
last kernel, the GPU has waited for the CPU."""


@dataclass(frozen=True)
class _Captured:
    """A graph, where it leaves the function's result, and the state of the weights behind it."""

    graph: torch.cuda.CUDAGraph
    result: Tensor
    after: Hashable


class GraphedFunction:
    """`function` of tensors and numbers, captured at the call that follows the first `eager_calls` ones.

    Tensors keep their shapes and numbers their values from call to call. The result is a copy, which the next call
    leaves alone.

    Args:
        model: whose Python numbers must not change in a call.
        weights: whose state the function reads and changes ([Note: state beside a graph]).
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        eager_calls: int,
        model: nn.Module | None = None,
        weights: WeightCopies | None = None,
    ) -> None:
        self._function, self._eager_calls, self._model, self._weights = function, eager_calls, model, weights
        self._stream = torch.cuda.Stream()
        self._pool = torch.cuda.MemPool()
        self._static_args: list[Tensor | int] = []
        self._graphs: dict[Hashable, _Captured] = {}
        self._declined = False
        self.obstacle: str | None = None
        """Why the function cannot be replayed, as far as its last eager call showed."""

    def __call__(self, *args: Tensor | int) -> Tensor:
        if self._declined:
            return self._function(*args)
        if self._eager_calls > 0:
            self._eager_calls -= 1
            # On the capture's stream: what is made once for a stream (cuBLAS workspaces, the allocator's blocks, NCCL's
            # order of events) is there when it captures.
            with self._on_stream():
                return self._watched(args) if self._eager_calls == 0 else self._run(*args)
        self._static_args = self._static_args or [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        for static, arg in zip(self._static_args, args, strict=True):
            if isinstance(static, Tensor) and isinstance(arg, Tensor):
                assert static.shape == arg.shape, f"captured for {tuple(static.shape)}, called with {tuple(arg.shape)}"
                static.copy_(arg)
            else:
                assert static == arg, f"captured for {static}, called with {arg}"
        before = self._weights.state() if self._weights else ()
        if before not in self._graphs:
            self._graphs[before] = self._capture()
        captured = self._graphs[before]
        captured.graph.replay()
        if self._weights:
            self._weights.restore(captured.after)
        return captured.result.clone()  # the next replay writes into the same memory

    def decline(self) -> None:
        """Never capture."""
        self._declined = True

    @property
    def captured(self) -> bool:
        """Whether calls replay the graph already."""
        return bool(self._graphs)

    @contextmanager
    def lent_memory(self) -> Iterator[None]:
        """Between replays: allocations within take the graph's memory, where there is a graph: see [Note: memory of a
        graph]. The next replay overwrites their contents."""
        if not self._graphs:
            yield
            return
        before = self._alive()
        with self._on_stream(), torch.cuda.use_mem_pool(self._pool):  # the allocator keeps what a stream freed for it
            yield
        if not self._alive() <= before:
            self.close()
            self._graphs, self._pool = {}, torch.cuda.MemPool()

    def close(self) -> None:
        """Free the graphs: destroying NCCL's communicators waits for those that hold their kernels."""
        for captured in self._graphs.values():
            captured.graph.reset()

    def _run(self, *args: Tensor | int) -> Tensor:
        result = self._function(*args)
        if self._weights:
            self._weights.join()
        return result

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """On the capture's stream. Both waits order what it runs with the work around it."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
        torch.cuda.current_stream().wait_stream(self._stream)

    def _alive(self) -> set[int]:
        """Addresses of the graph's memory that somebody holds."""
        blocks = (block for segment in self._pool.snapshot() for block in segment["blocks"])
        return {block["address"] for block in blocks if block["state"] != "inactive"}

    def _watched(self, args: tuple[Tensor | int, ...]) -> Tensor:
        before = plain_state(self._model)
        with waits_for_device() as waits:
            result = self._run(*args)
        after = plain_state(self._model)
        changed = next((name for name in after if after[name] != before.get(name, after[name])), None)
        if waits:
            self.obstacle = f"its forward or backward waits for the GPU ({waits[0]})"
        elif changed is not None:
            self.obstacle = f"{changed} changes from step to step ({before[changed]}, then {after[changed]})"
        return result

    def _capture(self) -> _Captured:
        if self.obstacle is not None:
            raise ConfigError(f"train.cuda_graph: the model cannot be replayed: {self.obstacle}", _OFF)
        if self._weights:
            self._weights.hold_memory()  # before the capture, whose allocations are the pool's
        graph, result = self._recorded()
        return _Captured(graph, result, self._weights.state() if self._weights else ())

    def _recorded(self) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        graph, pool = torch.cuda.CUDAGraph(), cast(Any, self._pool.id)  # torch types a pool's id as another handle
        # thread_local: NCCL's watchdog thread queries its events meanwhile, which a global capture would forbid
        with (
            _without_collection(),
            torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"),
        ):
            result = self._run(*self._static_args)
        return graph, result


@contextmanager
def _without_collection() -> Iterator[None]:
    """Garbage may hold another graph's pool, such as that of a training before in this process: torch ends the process
    where one is destroyed while a capture is under way."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def plain_state(model: nn.Module | None) -> dict[str, Any]:
    """Numbers, strings and flags that the modules keep as attributes, by `module.attribute`, containers of them too."""
    found: dict[str, Any] = {}
    for prefix, module in () if model is None else model.named_modules():
        for key, value in vars(module).items():
            if (plain := _plain(value)) is not None:
                found[f"{prefix or type(module).__name__}.{key}"] = plain
    return found


def _plain(value: object) -> Any:
    """A copy of it where it is plain, in tuples; else None."""
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list | tuple) and len(value) <= MOST_ITEMS:
        items = tuple(map(_plain, value))
        return None if None in items else items
    return None


@contextmanager
def waits_for_device() -> Iterator[list[str]]:
    """Within: the places where the program waits for the GPU, as `file:line`, which a capture does not allow."""
    places: list[str] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        if _SYNCHRONIZED in str(warning.message):
            places.append(f"{warning.filename}:{warning.lineno}")
        elif _PROTOTYPE not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class GraphChoice:
    """`train.cuda_graph: auto`: declines the graphs where the GPU does not wait for the CPU, or where a rank's model
    cannot be replayed, on all ranks alike.

    The host runs ahead of a GPU that is busy, until the driver's queue is full, so neither's time alone tells which one
    is the slower. One step begins on an idle GPU, and is waited for: if the GPU is done as soon as the CPU has enqueued
    the last kernel, the GPU has waited for the CPU.
    """

    def __init__(self, graphs: Sequence[GraphedFunction], device: torch.device, steps: int = MEASURED_STEPS) -> None:
        self._graphs, self._device, self._left = graphs, device, steps

    @contextmanager
    def around(self) -> Iterator[None]:
        """Around each step; collective over the default group in the measured one."""
        self._left -= 1
        if self._left != 0:
            yield
            return
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        yield
        enqueued = time.perf_counter()
        torch.cuda.synchronize(self._device)
        waits = gpu_waits(enqueued - start, time.perf_counter() - start)
        hindered = any(graph.obstacle is not None for graph in self._graphs)
        # One answer for all: a captured collective and an eager one of the same step need not match.
        anywhere = torch.tensor([float(waits), float(hindered)], device=self._device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        if anywhere.tolist() != [1.0, 0.0]:
            for graph in self._graphs:
                graph.decline()


def gpu_waits(enqueued: float, done: float) -> bool:
    """Whether a step on an idle GPU was paced by the CPU: the seconds until its last kernel was enqueued, and done."""
    return done - enqueued < _TAIL * done


def can_be_captured(config: RunConfig, device_type: str) -> bool:
    """Whether `train.cuda_graph: auto` may capture, as far as the config tells."""
    try:
        check_cuda_graph(config.with_values({"train.cuda_graph": True}), device_type)
    except ConfigError:
        return False
    # with fp32 the copies of the weights would only be for the graph
    return config.train.precision != "fp32"


def check_cuda_graph(config: RunConfig, device_type: str) -> None:
    """Raise a ConfigError where `train.cuda_graph` is true and cannot work."""
    if not config.train.is_graphed:
        return
    if config.mesh.pp > 1:
        raise ConfigError(
            f"train.cuda_graph cannot capture a pipeline, and mesh.pp is {config.mesh.pp}", {"mesh.pp": 1}, _OFF
        )
    if config.mesh.dp > 1 and not config.mesh.is_flat:
        raise ConfigError(
            f"train.cuda_graph cannot capture FSDP2, whose hooks allocate memory, and the mesh is {config.mesh}",
            {"mesh.data_engine": "flat"},
            _OFF,
        )
    if config.train.activation_checkpoint != "none":
        raise ConfigError(
            "train.cuda_graph cannot capture a recomputation, which sets the random numbers' state",
            {"train.activation_checkpoint": "none"},
            _OFF,
        )
    if config.train.on_nonfinite == "skip":
        raise ConfigError(
            "train.on_nonfinite: skip decides on the host whether a step's update runs, and train.cuda_graph replays "
            "it without the host",
            {"train.on_nonfinite": "stop"},
            _OFF,
        )
    if config.train.replay_every:
        raise ConfigError("train.replay_every cannot see into a CUDA graph", {"train.replay_every": 0}, _OFF)
    if device_type != "cuda":
        raise ConfigError("train.cuda_graph needs a GPU", _OFF)


def check_draws(config: RunConfig, draws: RandomDraws, model: str, *, compiled: bool) -> None:
    """Raise a ConfigError where what the model draws in training cannot go with a way to run its blocks."""
    train = config.train
    if train.is_graphed and draws.any:
        raise ConfigError(
            f"train.cuda_graph does not run a model that draws random numbers, as {model} does in training (dropout): "
            "set its dropout to 0, or train.cuda_graph to false"
        )
    if train.activation_checkpoint == "selective" and compiled and draws.on_shards:
        raise ConfigError(
            f"train.activation_checkpoint: selective compiles blocks in one graph, and {draws.on_shards[0]} draws "
            "random numbers for its shard outside of graphs: set train.activation_checkpoint to full, or train.compile "
            "to false"
        )
