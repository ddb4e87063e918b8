"""Parallel linears with `fp8: rowwise` and `blockwise` against float64, on every carrier."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.ops.carriers import Overlap
from colrow.ops.float8 import ACTIVATION, Float8Operand
from colrow.ops.kernels.row_rounding import E4M3, round_rows
from colrow.ops.linear_options import LinearOptions
from colrow.ops.parallel_linear import column_linear, row_linear
from colrow.ops.weights import ROUNDINGS, Roundings
from helpers.harness import Ranks
from helpers.rounding_cases import blocks_in_float64, nearest, scale_in_float64

pytestmark = pytest.mark.distributed
TOLERANCE = {"cpu": 1e-5, "cuda": 2.0**-6}  # fp32 sums of rounded numbers; on GPUs matmuls round to bf16
SHAPES = {  # t, D, siblings' F, f; of each rank
    "rowwise": [(16, 48, [32, 16], 32), (32, 16, [16], 80)],
    "blockwise": [(16, 128, [64, 64], 256), (32, 256, [384], 128)],
}


def relative(got: Tensor, want: Tensor) -> float:
    """The largest error of a row, against that row's largest number."""
    return ((got - want).abs().amax(1) / want.abs().amax(1)).max().item()


def draw(*shape: int, seed: int, device: str) -> Tensor:
    """Rows that differ in size by six powers of ten, more than e4m3 has."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (x * 10.0 ** torch.linspace(-6, 0, shape[0], dtype=torch.float64)[:, None]).to(device)


def rounded(x: Tensor, recipe: str, *, weight: bool = False) -> Tensor:
    x = x.float().double()  # as the operators see it
    if recipe == "blockwise":
        return blocks_in_float64(x, square=weight)[2]
    scales = [scale_in_float64(peak, E4M3) for peak in x.abs().amax(1).tolist()]
    s = torch.tensor(scales, dtype=torch.float64, device=x.device)[:, None]
    return nearest(x / s, E4M3) * s


def column_errors(
    device: str, recipe: str, shape: tuple[int, int, list[int], int], overlap: Overlap, keep: bool
) -> list[float]:
    t, D, siblings, _ = shape
    n, r, F = dist.get_world_size(), dist.get_rank(), sum(siblings)
    X, W, dY = (draw(*sizes, seed=i, device=device) for i, sizes in enumerate([(n * t, D), (n * F, D), (n * t, n * F)]))
    x = X.chunk(n)[r].float().clone().requires_grad_()
    weights = [w.float().clone().requires_grad_() for w in W.chunk(n)[r].split(siblings)]
    options = LinearOptions(overlap, chunk_rows=1, fp8=recipe, keep_gathered=keep)
    y = column_linear(x, weights, str(dist.group.WORLD.group_name), options)  # type: ignore[union-attr]
    y.backward(dY.chunk(n, 1)[r].float())
    terms = [
        rounded(dy, recipe) @ rounded(w.t(), recipe, weight=True).t()
        for dy, w in zip(dY.chunk(n, 1), W.chunk(n), strict=True)
    ]
    want = [
        rounded(X, recipe) @ rounded(W.chunk(n)[r], recipe, weight=True).t(),
        torch.stack(terms).sum(0).chunk(n)[r],
        dY.chunk(n, 1)[r].t() @ X,
    ]
    got = [y.detach(), x.grad, torch.cat([w.grad for w in weights])]  # type: ignore[misc]
    return [relative(a, b) for a, b in zip(got, want, strict=True)]  # type: ignore[arg-type]


def row_errors(device: str, recipe: str, shape: tuple[int, int, list[int], int], overlap: Overlap) -> list[float]:
    t, D, _, f = shape
    n, r = dist.get_world_size(), dist.get_rank()
    X, W, dY = (draw(*sizes, seed=i, device=device) for i, sizes in enumerate([(n * t, n * f), (D, n * f), (n * t, D)]))
    x, w = (a.chunk(n, 1)[r].float().clone().requires_grad_() for a in (X, W))
    y = row_linear(x, w, str(dist.group.WORLD.group_name), LinearOptions(overlap, chunk_rows=1, fp8=recipe))  # type: ignore[union-attr]
    y.backward(dY.chunk(n)[r].float())
    terms = [
        rounded(a, recipe) @ rounded(b, recipe, weight=True).t()
        for a, b in zip(X.chunk(n, 1), W.chunk(n, 1), strict=True)
    ]
    own = W.chunk(n, 1)[r]
    want = [
        torch.stack(terms).sum(0).chunk(n)[r],
        rounded(dY, recipe) @ rounded(own.t(), recipe, weight=True).t(),
        dY.t() @ X.chunk(n, 1)[r],
    ]
    return [relative(a, b) for a, b in zip([y.detach(), x.grad, w.grad], want, strict=True)]  # type: ignore[arg-type]


def everything(device: str, recipe: str) -> tuple[dict[str, list[float]], list[float]]:
    found = {}
    overlaps: list[Overlap] = ["none", "collectives", "point_to_point", *(["copy_engine"] if device == "cuda" else [])]  # type: ignore[list-item]
    for overlap in overlaps:
        for shape in SHAPES[recipe]:
            for keep in (True, False):
                found[f"column {overlap} {shape} {keep}"] = column_errors(device, recipe, shape, overlap, keep)
            found[f"row {overlap} {shape}"] = row_errors(device, recipe, shape, overlap)

    def one_scale(x: Tensor) -> Float8Operand:
        largest = round_rows(x)[1].amax()
        return Float8Operand((x.float() / largest).to(ACTIVATION).contiguous(), largest.expand(len(x)).contiguous())

    # the negative control: the rounding of `rowwise`, by one scale
    with mock.patch.dict(ROUNDINGS, {recipe: Roundings(one_scale, one_scale)}):
        return found, column_errors(device, recipe, SHAPES[recipe][0], "none", True)


@pytest.mark.parametrize("recipe", SHAPES)
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_each_row_or_block_is_rounded_by_its_own_scale(ranks: Ranks, n: int, recipe: str) -> None:
    results, tolerance = ranks(n).run(everything, recipe), TOLERANCE[ranks.device]
    for found, (y, _, dw) in results:
        assert all(max(errors) < tolerance for errors in found.values()), found
        assert y > 0.1, "one scale for all rows is seen"
        assert dw < tolerance, "weights' gradients are not rounded"
    assert max(dx for _, (_, dx, _) in results) > 0.1, "on the ranks that have the small rows"
