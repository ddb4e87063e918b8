"""8-bit parallel linears on every carrier against float64: the rounded numbers, their transposes, what is sent."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.ops import float8_linear
from colrow.ops.carriers import Overlap
from colrow.ops.float8 import ACTIVATION, GRADIENT
from colrow.ops.kernels.rounding import HEADROOM
from colrow.ops.linear_options import LinearOptions
from colrow.ops.parallel_linear import column_linear, row_linear, traffic
from helpers.harness import Ranks
from helpers.parity import relative
from helpers.rounding_cases import nearest, scale_in_float64

pytestmark = pytest.mark.distributed
TOLERANCE = {"cpu": 1e-5, "cuda": 2.0**-8}  # fp32 sums of rounded numbers; `_scaled_mm` rounds them to bf16
GROWTH = 64.0
SHAPES = [(16, 48, [32, 16], 32), (32, 16, [16], 80)]  # t, D, siblings' F, f; of each rank


def overlaps(device: str) -> list[Overlap]:
    return ["none", "collectives", "point_to_point", *(["copy_engine"] if device == "cuda" else [])]


def draw(*shape: int, seed: int, device: str, by_rank: int = 0) -> Tensor:
    """Numbers within a factor of two, so that a second rounding changes none; rank r's part of dim `by_rank` is 8^r
    times as large: each rank has a scale of its own."""
    n, generator = dist.get_world_size(), torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator, dtype=torch.float64) + 1
    x *= torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)
    return torch.cat([part * 8.0**r for r, part in enumerate(x.chunk(n, by_rank))], by_rank).to(device)


def rounded(x: Tensor, dtype: torch.dtype = ACTIVATION, *, delayed: bool = False) -> Tensor:
    s, limit = scale_in_float64(x.abs().max().item(), dtype), torch.finfo(dtype).max
    if delayed:  # the last peak was a `GROWTH`-th
        s *= HEADROOM[dtype] / GROWTH
    return nearest((x / s).clamp(-limit, limit), dtype) * s


def by_rank(x: Tensor, dim: int, dtype: torch.dtype = ACTIVATION, *, delayed: bool = False) -> Tensor:
    return torch.cat([rounded(part, dtype, delayed=delayed) for part in x.chunk(dist.get_world_size(), dim)], dim)


def history_of(x: Tensor, dy: Tensor) -> Tensor:
    """In the last step the peaks of what this rank rounds were smaller, by more than the headroom."""
    last = torch.tensor([x.abs().max() / GROWTH, dy.abs().max() / GROWTH])
    return torch.stack([last, *torch.zeros(3, 2)], 1).float().to(x.device)


def history_error(history: Tensor | None, x: Tensor, dy: Tensor) -> float:
    """Of this step's peaks."""
    if history is None:
        return 0.0
    want = torch.stack([x.abs().max(), dy.abs().max()])
    return relative(history[:, 1], want)


def column_errors(
    device: str, shape: tuple[int, int, list[int], int], overlap: Overlap, keep: bool, *, delayed: bool = False
) -> list[float]:
    t, D, siblings, _ = shape
    n, r, F = dist.get_world_size(), dist.get_rank(), sum(siblings)
    X, W = draw(n * t, D, seed=1, device=device), draw(n * F, D, seed=2, device=device)
    dY = draw(n * t, n * F, seed=3, device=device, by_rank=1)  # a rank's columns
    x = X.chunk(n)[r].float().clone().requires_grad_()
    weights = [w.float().clone().requires_grad_() for w in W.chunk(n)[r].split(siblings)]
    dy = dY.chunk(n, 1)[r].float()
    options = LinearOptions(overlap, 1, "delayed" if delayed else "tensorwise", keep)
    history = history_of(x.detach(), dy) if delayed else None
    y = column_linear(x, weights, str(dist.group.WORLD.group_name), options, (), history)  # type: ignore[union-attr]
    y.backward(dy)
    Xq, Wq = by_rank(X, 0, delayed=delayed), by_rank(W, 0)
    dYq = by_rank(dY, 1, GRADIENT, delayed=delayed)
    own = slice(r * F, (r + 1) * F)
    want = [Xq @ Wq[own].t(), (dYq @ Wq).chunk(n)[r], dYq[:, own].t() @ Xq]
    got = [y.detach(), x.grad, torch.cat([w.grad for w in weights])]  # type: ignore[misc]
    found = [relative(a, b) for a, b in zip(got, want, strict=True)]  # type: ignore[arg-type]
    return [*found, history_error(history, x.detach(), dy)]


def row_errors(
    device: str, shape: tuple[int, int, list[int], int], overlap: Overlap, *, delayed: bool = False
) -> list[float]:
    t, D, _, f = shape
    n, r = dist.get_world_size(), dist.get_rank()
    X, W = draw(n * t, n * f, seed=1, device=device, by_rank=1), draw(D, n * f, seed=2, device=device, by_rank=1)
    dY = draw(n * t, D, seed=3, device=device)
    x, w = (a.chunk(n, 1)[r].float().clone().requires_grad_() for a in (X, W))
    dy = dY.chunk(n)[r].float()
    options = LinearOptions(overlap, 1, "delayed" if delayed else "tensorwise")
    history = history_of(x.detach(), dy) if delayed else None
    y = row_linear(x, w, str(dist.group.WORLD.group_name), options, (), history)  # type: ignore[union-attr]
    y.backward(dy)
    Xq, Wq = by_rank(X, 1, delayed=delayed), by_rank(W, 1)
    dYq = by_rank(dY, 0, GRADIENT, delayed=delayed)
    own = slice(r * f, (r + 1) * f)
    want = [(Xq @ Wq.t()).chunk(n)[r], dYq @ Wq[:, own], dYq.t() @ Xq[:, own]]
    found = [relative(a, b) for a, b in zip([y.detach(), x.grad, w.grad], want, strict=True)]  # type: ignore[arg-type]
    return [*found, history_error(history, x.detach(), dy)]


def every_error(device: str) -> dict[str, list[float]]:
    found = {}
    for overlap in overlaps(device):
        for shape in SHAPES:
            for keep in (True, False):
                found[f"column {overlap} {shape} {keep}"] = column_errors(device, shape, overlap, keep)
            found[f"row {overlap} {shape}"] = row_errors(device, shape, overlap)
        for keep in (True, False):
            found[f"delayed column {overlap} {keep}"] = column_errors(device, SHAPES[0], overlap, keep, delayed=True)
        found[f"delayed row {overlap}"] = row_errors(device, SHAPES[0], overlap, delayed=True)
    return found


def foreign_scale(device: str) -> list[float]:
    """The negative control: every chunk is read with the scale of rank 0's."""
    chunks = float8_linear._chunks

    def wrong(exchange: Any, own: Tensor) -> list[Tensor]:
        found = [chunk.clone() for chunk in chunks(exchange, own)]
        for chunk in found[1:]:
            chunk[-1] = found[0][-1]
        return found

    with mock.patch.object(float8_linear, "_chunks", wrong):
        return column_errors(device, SHAPES[0], "point_to_point", True)


def bytes_sent(device: str) -> tuple[list[int], list[int]]:
    """Of the gathers of a column and a row, forward and backward: as sent, and as a dry run counts them."""
    group, sent = str(dist.group.WORLD.group_name), []  # type: ignore[union-attr]
    start = float8_linear.start_all_gather

    def seen(x: Tensor, ranks: Any) -> Any:
        sent.append(x.nbytes * ranks.size())
        return start(x, ranks)

    options = LinearOptions("none", fp8="tensorwise").text
    x, w, dy = torch.randn(32, 48), torch.randn(64, 48), torch.randn(16, 64)
    ops = torch.ops.colrow
    with mock.patch.object(float8_linear, "start_all_gather", seen):
        column = (x, [w], group, options, None, [], None)
        outputs = ops.column_forward(*column)
        _, kept = ops.row_forward(torch.randn(16 * dist.get_world_size(), 48), w, group, options, None, [], None)
        row = (dy, kept, w, group, options, True, True, [], None)
        ops.row_backward(*row)
    counted = traffic("column_forward", column, list(outputs)) + traffic("row_backward", row, [])
    return sent, [nbytes for kind, _, nbytes in counted if kind == "all_gather"]


def without_history(device: str) -> list[float]:
    """The negative control of `delayed`: this step's own scales, which cut nothing off."""
    both, packed = float8_linear.quantize_both, float8_linear.quantize_packed
    own = {
        name: lambda x, function=function, history=None, **options: function(x, **options)
        for name, function in (("quantize_both", both), ("quantize_packed", packed))
    }
    with mock.patch.multiple(float8_linear, **own):
        return row_errors(device, SHAPES[0], "none", delayed=True)


def everything(device: str) -> tuple[dict[str, list[float]], list[float], Any, list[float]]:
    sent = bytes_sent(device) if device == "cpu" else None
    return every_error(device), foreign_scale(device), sent, without_history(device)


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_the_rounded_numbers_are_multiplied(ranks: Ranks, n: int) -> None:
    for found, control, sent, own in ranks(n).run(everything):
        tolerance = TOLERANCE["cuda" if sent is None else "cpu"]
        assert all(max(errors) < tolerance for errors in found.values()), found
        assert min(own) > 0.1, "scales that are not those of the last step are seen"
        assert control[0] < tolerance, "forward reads each chunk's own scale"
        assert control[2] > 0.1, "a scale of another rank is seen in the weight's gradient"
        if sent is not None:
            assert sent[0] == sent[1] == [n * 33 * 48, n * 17 * 64], "a byte a number, and a row with the scale"
