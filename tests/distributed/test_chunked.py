"""Products cut by rank give the unsharded linear's numbers, on every carrier that the device has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from colrow.errors import ConfigError, PlanError
from colrow.ops import chunked
from colrow.ops.carriers import Overlap
from colrow.ops.exchange import Exchange
from colrow.ops.linear_options import LinearOptions
from colrow.ops.parallel_linear import column_linear, row_linear
from colrow.ops.products import NARROW
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from helpers.harness import Ranks
from helpers.parity import build, relative, tp_mesh

TOLERANCE = 1e-12  # fp64; sums over tokens and ranks in another order
SHAPES = [(1, 5, [3], 7), (6, 8, [4, 2, 2], 6), (3, 17, [1, 9], 1), (16, 4, [8], 12)]  # t, D, siblings' F, f


def carriers(device: str) -> list[Overlap]:
    return ["point_to_point", "copy_engine"] if device == "cuda" else ["point_to_point"]


def draw(*shape: int, seed: int, device: str) -> Tensor:
    """The same on each rank."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)


def column_errors(device: str, shape: tuple[int, int, list[int], int], overlap: Overlap, keep: bool) -> list[float]:
    """Of the output and every gradient of a column-parallel linear, against the unsharded product."""
    t, D, siblings, _ = shape
    n, rank, group = dist.get_world_size(), dist.get_rank(), str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    X, mine = draw(n * t, D, seed=1, device=device).requires_grad_(), slice(rank * t, (rank + 1) * t)
    weights = [draw(n, F, D, seed=2 + i, device=device).requires_grad_() for i, F in enumerate(siblings)]
    dY = draw(n, n * t, sum(siblings), seed=9, device=device)
    x, *own = (part.detach().clone().requires_grad_() for part in (X[mine], *(w[rank] for w in weights)))
    y = column_linear(x, own, group, LinearOptions(overlap, chunk_rows=1, keep_gathered=keep))
    y.backward(dY[rank])
    Y = torch.stack([torch.cat([X @ w[q].t() for w in weights], 1) for q in range(n)])
    Y.backward(dY)
    want = [Y.detach()[rank], X.grad[mine], *(w.grad[rank] for w in weights)]  # type: ignore[index]
    return [relative(a, b) for a, b in zip([y.detach(), x.grad, *(w.grad for w in own)], want, strict=True)]  # type: ignore[arg-type]


def row_errors(device: str, shape: tuple[int, int, list[int], int], overlap: Overlap) -> list[float]:
    """The same of a row-parallel linear."""
    t, D, _, f = shape
    n, rank, group = dist.get_world_size(), dist.get_rank(), str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    X, W = (draw(rows, n * f, seed=rows, device=device).requires_grad_() for rows in (n * t, D))
    dY, columns, mine = (
        draw(n * t, D, seed=3, device=device),
        slice(rank * f, (rank + 1) * f),
        slice(rank * t, rank * t + t),
    )
    x, w = (tensor.detach()[:, columns].clone().requires_grad_() for tensor in (X, W))
    y = row_linear(x, w, group, LinearOptions(overlap, chunk_rows=1))
    y.backward(dY[mine])
    Y = X @ W.t()
    Y.backward(dY)
    want = [Y.detach()[mine], X.grad[:, columns], W.grad[:, columns]]  # type: ignore[index]
    return [relative(a, b) for a, b in zip([y.detach(), x.grad, w.grad], want, strict=True)]  # type: ignore[arg-type]


def every_error(device: str) -> dict[str, list[float]]:
    found = {}
    for overlap in carriers(device):
        for shape in SHAPES:
            for keep in (True, False):
                found[f"column {overlap} {shape} {keep}"] = column_errors(device, shape, overlap, keep)
            for narrow in (NARROW, 0):  # the row's weight gradient as chunks arrive, and in one matmul after them
                chunked.NARROW = narrow
                found[f"row {overlap} {shape} {narrow}"] = row_errors(device, shape, overlap)
    chunked.NARROW = NARROW
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("n", [2, 4])
def test_chunks_give_the_unsharded_numbers(ranks: Ranks, n: int) -> None:
    for found in ranks(n).run(every_error):
        assert all(max(errors) < TOLERANCE for errors in found.values()), found


def mirrored(exchange: Exchange, use: Callable[[slice, Tensor], None]) -> Callable[[slice, Tensor], None]:
    """`use` with the rows of the rank i places before in the place of the one i places after, and the reverse."""

    def wrong(rows: slice, chunk: Tensor) -> None:
        t = rows.stop - rows.start
        q = (2 * exchange.rank - rows.start // t) % exchange.size
        use(slice(q * t, (q + 1) * t), chunk)

    return wrong


def mirrored_errors(device: str) -> list[float]:
    arrive, scatter = chunked.receive_each, chunked.scatter_sum
    chunked.receive_each = lambda exchange, own, use: arrive(exchange, own, mirrored(exchange, use))
    chunked.scatter_sum = lambda exchange, compute: scatter(exchange, mirrored(exchange, compute))
    try:
        return column_errors(device, SHAPES[1], "point_to_point", True) + row_errors(
            device, SHAPES[1], "point_to_point"
        )
    finally:
        chunked.receive_each, chunked.scatter_sum = arrive, scatter


@pytest.mark.distributed
def test_chunks_in_a_wrong_order_are_seen(ranks: Ranks) -> None:
    """The negative control: outputs and gradients of a column with three siblings and of a row are wrong."""
    for errors in ranks(4).run(mirrored_errors):
        assert len(errors) == 8
        assert min(errors) > 0.1, errors


def counted_case(device: str, chunk_rows: int) -> Counter[str]:
    """What one step of column and row sends, over two ranks of 4 tokens each."""
    group = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    x, w = (torch.ones(4, 4, device=device, requires_grad=True) for _ in range(2))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        options = LinearOptions("point_to_point", chunk_rows, keep_gathered=False)
        row_linear(column_linear(x, [w], group, options), w, group, options).sum().backward()
    names = [event.name for event in profiler.events()]
    return Counter(name for name in names if name.startswith(("c10d::", "colrow::send")))


@pytest.mark.distributed
def test_a_chunk_a_peer_and_collective(ranks: Ranks) -> None:
    """Two in forward; in backward the input gathered again, and each one's dual."""
    for counts in ranks(2).run(counted_case, 4):
        assert counts["colrow::send_point_to_point"] == 5
        assert not any("gather" in name or "scatter" in name for name in counts), counts


@pytest.mark.distributed
def test_few_rows_are_not_cut(ranks: Ranks) -> None:
    for counts in ranks(2).run(counted_case, 5):
        assert counts["colrow::send_point_to_point"] == 0
        assert sum(count for name, count in counts.items() if "gather" in name or "scatter" in name) == 5


def no_engine_case(device: str) -> str:
    with pytest.raises(ConfigError) as error:
        parallelize(build("gqa", "cpu"), Plan.preset("llama-overlap"), tp_mesh("cpu", 2))
    return str(error.value)


@pytest.mark.distributed
def test_copy_engines_that_are_not_there_are_an_error(ranks: Ranks) -> None:
    if ranks.device == "cuda":
        pytest.skip("a mesh of CPUs needs gloo")
    for reported in ranks(2).run(no_engine_case):
        assert "compute on cpu" in reported
        assert "overlap: collectives" in reported


@pytest.mark.parametrize("overlap", [True, "copy-engine"])
def test_an_unknown_overlap_names_the_known(overlap: object) -> None:
    plan = Plan.preset("llama-fast")
    down = {"style": "fast_rowwise", "overlap": overlap}
    with pytest.raises(PlanError, match="copy_engine"):
        replace(plan, modules={**plan.modules, "layers.*.mlp.down_proj": down}).check_shapes(build("gqa", "cpu"), 2)
