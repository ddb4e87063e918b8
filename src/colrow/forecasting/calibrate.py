"""Measures the rates of a host's devices and links: the table of `devices.py`.

Every rank runs the same; the slowest rank's time counts, as in a step. On CPUs it measures the CPU and gloo, which
shows that it works and says nothing about GPUs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from colrow.errors import ConfigError
from colrow.forecasting.work import SHORT_ATTENTION
from colrow.ops.carriers import carrier
from colrow.ops.chunked import send_to_all
from colrow.torch_compat import gather_into

BAND = 0.12
"""Half of the band around a calibrated step: what rates fitted on half of benchmarks/results missed the other half by,
in nine rows of ten."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; `SMALL` is for tests.

    Args:
        matmul: rows, inner and columns; tokens and heads: of attention with 128 numbers a head.
        elements: of pointwise operators and the update.
        messages: bytes that a rank sends.
    """

    matmul: int = 8192
    tokens: int = 8192
    heads: int = 16
    elements: int = 2**28
    messages: tuple[int, ...] = (2**16, 2**20, 2**24, 2**27, 2**29)
    repeats: int = 10


_BURST = 5
SMALL = Sizes(matmul=64, tokens=64, heads=2, elements=2**12, messages=(2**10, 2**12), repeats=2)


def calibrate(device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """The table, the same on each rank. Collective over the default group."""
    dtype = torch.bfloat16
    clock = _Clock(device, sizes.repeats)
    n = sizes.matmul
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    rates: dict[str, Any] = {"matmul": 2.0 * n**3 / clock.seconds(lambda: a @ b)}
    rates |= _attention(device, dtype, clock, sizes)
    x, y = (torch.randn(sizes.elements, device=device) for _ in range(2))
    # bytes an fp32 element: two reads and a write
    rates["memory"] = 12.0 * sizes.elements / clock.seconds(lambda: x + y)
    rates["outside"] = rates["memory"]
    # AdamW in fp32: reads weight, gradient and two moments, writes all but the gradient: 7 × 4 bytes
    rates["optimizer"] = 28.0 * sizes.elements / clock.seconds(_update(x, y))
    tiny = torch.zeros(1, device=device)
    launches = 200

    def launch() -> None:
        for _ in range(launches):
            tiny.add_(1)

    rates["launch"] = clock.seconds(launch, host=True) / launches
    rates["links"] = _links(device, clock, sizes)
    rates |= _peer_copy(device, clock, sizes, "copy_engine" if device.type == "cuda" else "point_to_point")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    ranks = dist.get_world_size()
    return {"source": f"calibrated: {ranks} × {name}, torch {torch.__version__}", "band": BAND, "rates": rates}


def _attention(device: torch.device, dtype: torch.dtype, clock: _Clock, sizes: Sizes) -> dict[str, float]:
    shape = (1, sizes.heads, sizes.tokens, 128)
    q, k, v = (torch.randn(shape, device=device).to(dtype).requires_grad_() for _ in range(3))
    flops = 4.0 * sizes.heads * sizes.tokens**2 * 128 * (1 + SHORT_ATTENTION / sizes.tokens) / 2

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    gradient = torch.ones_like(forward())
    once = clock.seconds(forward)
    both = clock.seconds(lambda: forward().backward(gradient))
    return {"attention_forward": flops / once, "attention_backward": 2.5 * flops / max(both - once, 1e-9)}


def _update(param: Tensor, grad: Tensor) -> Callable[[], Any]:
    """AdamW's update of one tensor: the parameter and two moments read and written, the gradient read."""
    param.requires_grad_(True).grad = grad
    return torch.optim.AdamW([param], fused=True).step


def _links(device: torch.device, clock: _Clock, sizes: Sizes) -> dict[str, list[tuple[float, float]]]:
    """Seconds of all-gathers by bytes, for groups of the first 2, 4, ... ranks of this host."""
    world, links = dist.get_world_size(), {}
    for n in (size for size in (2, 4, 8) if size <= world):
        group = dist.new_group(list(range(n)))  # collective over all ranks
        points = []
        for sent in sizes.messages:
            shard = torch.zeros(max(1, sent // (n - 1)), dtype=torch.uint8, device=device)
            gathered = shard.new_empty(n * shard.numel())

            def gather(shard: Tensor = shard, gathered: Tensor = gathered, group: Any = group) -> None:
                gather_into([gathered], [shard], group).wait()

            seconds = clock.seconds(gather if dist.get_rank() < n else lambda: None)
            points.append((float(sent), seconds))
        links[str(n)] = points
        dist.barrier()
    return links


def _peer_copy(device: torch.device, clock: _Clock, sizes: Sizes, overlap: str) -> dict[str, float]:
    """bytes/s that a rank sends to all others of this host, one after another, by this carrier: 0 where it cannot."""
    others, nbytes = dist.get_world_size() - 1, sizes.messages[-2]
    if not others:
        return {}
    try:
        sender = carrier(overlap, str(_world().group_name), device)
    except ConfigError:  # raised on all ranks: GPUs that do not reach each other's memory
        return {"peer_copy": 0.0}
    assert sender is not None
    chunk = torch.zeros(nbytes // others, dtype=torch.uint8, device=device)

    def exchange() -> None:
        opened = sender.open(tuple(chunk.shape), chunk.dtype)
        send_to_all(opened, chunk)
        opened.receive_all()
        opened.close()

    return {"peer_copy": others * chunk.nbytes / clock.seconds(exchange)}


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


class _Clock:
    """Median seconds of a call, of the slowest rank.

    A GPU's calls come in bursts that its own events time, as in a step, where the CPU is ahead: the time until one call
    is done is four times as long for a message of 64 KiB.
    """

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def seconds(self, call: Callable[[], Any], *, host: bool = False) -> float:
        """`host`: until the call returns; else until the device is done."""
        for _ in range(3):
            call()
        measure = self._on_gpu if self._device.type == "cuda" and not host else self._by_wall
        times = [measure(call, host) for _ in range(self._repeats)]
        slowest = torch.tensor([statistics.median(times)], dtype=torch.float64, device=self._device)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return float(slowest.item())

    def _by_wall(self, call: Callable[[], Any], host: bool) -> float:
        self._synchronize()
        start = time.perf_counter()
        call()
        if not host:
            self._synchronize()
        return time.perf_counter() - start

    def _on_gpu(self, call: Callable[[], Any], host: bool) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._synchronize()
        call()  # the GPU works while the CPU gives it the burst
        begin.record()
        for _ in range(_BURST):
            call()
        end.record()
        self._synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / _BURST

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
