"""A function's kernels as a CUDA graph: one launch replays them all, so a small step is no longer CPU-bound.

[Note: captured]
Capturing runs the Python of a function and none of its kernels; replaying runs the kernels, on the same addresses, and
no Python. So whatever the function reads and writes outside itself (weights, sums of gradients, the optimizer's state)
must keep its address, and Python numbers are frozen. The first calls run eagerly, on the stream of the capture: they
compile, initialise NCCL's communicators, and allocate the optimizer's state and the gradients' sums. They are steps of
training like the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from colrow.config import RunConfig
from colrow.dryrun.random_draws import RandomDraws
from colrow.errors import ConfigError

EAGER_STEPS = 2
"""Steps before the one that captures."""
MEASURED_STEPS = 4
"""Steps before it with `train.cuda_graph: auto`: the last of them is measured, when all is compiled."""
_OFF = {"train.cuda_graph": False}
_TAIL = 0.1
"""A step begins on an idle GPU. If the GPU is done within this share of the step's time after the CPU has enqueued the
last kernel, the GPU has waited for the CPU."""


class GraphedFunction:
    """`function` of tensors and numbers, captured at the call that follows the first `eager_calls` ones.

    Tensors keep their shapes and numbers their values from call to call. The result is a copy, which the next call
    leaves alone.
    """

    def __init__(self, function: Callable[..., Tensor], eager_calls: int) -> None:
        self._function, self._eager_calls = function, eager_calls
        self._stream = torch.cuda.Stream()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._declined = False

    def __call__(self, *args: Tensor | int) -> Tensor:
        if self._declined:
            return self._function(*args)
        if self._eager_calls > 0:
            self._eager_calls -= 1
            # On the capture's stream: what is made once for a stream (cuBLAS workspaces, the allocator's blocks, NCCL's
            # order of events) is there when it captures. Both waits order this call with the work around it.
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                result = self._function(*args)
            torch.cuda.current_stream().wait_stream(self._stream)
            return result
        if self._graph is None:
            self._capture(args)
        assert self._graph is not None
        for static, arg in zip(self._static_args, args, strict=True):
            if isinstance(static, Tensor) and isinstance(arg, Tensor):
                assert static.shape == arg.shape, f"captured for {tuple(static.shape)}, called with {tuple(arg.shape)}"
                static.copy_(arg)
            else:
                assert static == arg, f"captured for {static}, called with {arg}"
        self._graph.replay()
        return self._static_result.clone()  # the next replay writes into the same memory

    def decline(self) -> None:
        """Never capture."""
        self._declined = True

    @property
    def captured(self) -> bool:
        """Whether calls replay the graph already."""
        return self._graph is not None

    def close(self) -> None:
        """Free the graph: destroying NCCL's communicators waits for the graphs that hold their kernels."""
        if self._graph is not None:
            self._graph.reset()

    def _capture(self, args: tuple[Tensor | int, ...]) -> None:
        self._static_args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog thread queries its events meanwhile, which a global capture would forbid
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self._static_result = self._function(*self._static_args)
        self._graph = graph


class GraphChoice:
    """`train.cuda_graph: auto`: declines the graphs where the GPU does not wait for the CPU, on all ranks alike.

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
        # One answer for all: a captured collective and an eager one of the same step need not match.
        anywhere = torch.tensor(float(waits), device=self._device)
        dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
        if not anywhere.item():
            for graph in self._graphs:
                graph.decline()


def gpu_waits(enqueued: float, done: float) -> bool:
    """Whether a step on an idle GPU was paced by the CPU: the seconds until its last kernel was enqueued, and done."""
    return done - enqueued < _TAIL * done


def with_graph_chosen(config: RunConfig, draws: RandomDraws, device_type: str) -> RunConfig:
    """The config with true or false in the place of `train.cuda_graph: auto`: whether the run can be captured."""
    if config.train.cuda_graph != "auto":
        return config

    def changed(value: bool) -> RunConfig:
        return config.model_copy(update={"train": config.train.model_copy(update={"cuda_graph": value})})

    try:
        check_cuda_graph(changed(True), device_type)
    except ConfigError:
        return changed(False)
    low = config.train.precision != "fp32"  # else copies of the weights would only be for the graph
    return changed(low and not draws.any)


def check_cuda_graph(config: RunConfig, device_type: str) -> None:
    """Raise a ConfigError where `train.cuda_graph` is true and cannot work."""
    if not config.train.is_graphed:
        return
    if not config.mesh.tp_alone:
        raise ConfigError(
            f"train.cuda_graph works with mesh.tp alone, and the mesh is {config.mesh}",
            {f"mesh.{axis}": 1 for axis, n in config.mesh.by_axis.items() if axis != "tp" and n > 1},
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
    if train.cuda_graph and draws.any:
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
