"""The copy engine on GPUs: ranks that lead each other by random delays, poisoned slots, a CUDA graph replayed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.ops import copy_engine_cuda
from colrow.ops.carriers import Overlap
from colrow.ops.linear_options import LinearOptions
from helpers.harness import Ranks
from helpers.parity import relative

pytestmark = [pytest.mark.distributed, pytest.mark.cuda]
TOLERANCE = 1e-5  # fp32 without TF32: sums of 1,000 products in another order
SHAPES = [(37, 72, 24, 40), (129, 257, 33, 31), (512, 1024, 768, 512)]  # t, D, F, f


@pytest.fixture
def gpus(ranks: Ranks) -> Ranks:
    if ranks.device != "cuda":
        pytest.skip("needs GPUs: --device cuda")
    return ranks


def draw(shape: tuple[int, int, int, int], seed: int) -> list[Tensor]:
    t, D, F, f = shape
    T = t * dist.get_world_size()
    generator = torch.Generator("cuda").manual_seed(100 * seed + dist.get_rank())
    sizes = [(t, D), (F, D), (T, F), (T, f), (D, f), (t, D)]
    return [torch.randn(size, generator=generator, device="cuda") for size in sizes]


def run(inputs: list[Tensor], overlap: Overlap, delay: Callable[[], None] = lambda: None) -> list[Tensor]:
    """Every operator once; inputs are gathered again in the column's backward, so that two exchanges are open."""
    options = LinearOptions(overlap, chunk_rows=1, keep_gathered=False).text
    ops, group = torch.ops.colrow, str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    x, w, dY, xf, wf, dy = inputs
    out = [*ops.column_forward(x, [w], group, options, None, [], None)[:1]]
    delay()
    out.append(ops.row_forward(xf, wf, group, options, None, [], None)[0])
    delay()
    out += ops.row_backward(dy, xf, wf, group, options, True, True, [], None)
    delay()
    return out + list(ops.column_backward(dY, x, [w], group, options, True, True, [], None))


def poison() -> None:
    """NaN into every slot, while nobody sends."""
    for _, engine in copy_engine_cuda._ENGINES.values():
        torch.cuda.synchronize()
        dist.barrier()
        engine.ring.slots[engine.ring.rank].fill_(255)
        torch.cuda.synchronize()
        dist.barrier()


def delayed_case(device: str, shape: tuple[int, int, int, int]) -> float:
    """30 rounds given to the GPU without a pause, and only then looked at."""
    rng = random.Random(dist.get_rank())

    def delay() -> None:
        if rng.random() < 0.3:
            torch.cuda._sleep(rng.randrange(2_000_000))

    poison()
    rounds = [run(draw(shape, seed), "copy_engine", delay) for seed in range(30)]
    wanted = [run(draw(shape, seed), "none") for seed in range(30)]
    return max(relative(a, b) for got, want in zip(rounds, wanted, strict=True) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ranks_that_lead_each_other(gpus: Ranks, shape: tuple[int, int, int, int]) -> None:
    for error in gpus(2).run(delayed_case, shape):
        assert error < TOLERANCE


def replayed_case(device: str) -> float:
    inputs = draw(SHAPES[2], 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(inputs, "copy_engine")  # slots of this size are made outside of the graph
    torch.cuda.synchronize()
    graph, worst = torch.cuda.CUDAGraph(), 0.0
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # NCCL's thread asks for its events
        outputs = run(inputs, "copy_engine")
    for seed in range(1, 11):
        for old, new in zip(inputs, draw(SHAPES[2], seed), strict=True):
            old.copy_(new)
        graph.replay()
        got = [output.clone() for output in outputs]
        run(inputs, "copy_engine")  # between replays, on the same slots
        worst = max([worst, *(relative(a, b) for a, b in zip(got, run(inputs, "none"), strict=True))])
    return worst


def test_a_replayed_graph_gives_the_numbers_of_its_inputs(gpus: Ranks) -> None:
    for error in gpus(2).run(replayed_case):
        assert error < TOLERANCE
