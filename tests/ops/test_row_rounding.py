"""e4m3 with a scale for each row: the plain form and the kernel against float64, on ragged shapes and both orders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colrow.ops.kernels.row_rounding import E4M3, round_rows
from helpers.rounding_cases import inputs, nearest, scale_in_float64

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def wrong_rows(device: str, scale_of: str = "row") -> int:
    """Rows that are not those of float64, over all inputs; `scale_of`: whose largest number the expected scale has."""
    wrong = 0
    for x, _ in inputs(device):
        y, scales = round_rows(x)
        peaks = x.double().abs().amax(1) if scale_of == "row" else x.double().abs().amax().expand(len(x))
        want = torch.tensor([scale_in_float64(peak, E4M3) for peak in peaks.tolist()], device=device)
        assert scales.dtype == torch.float32
        numbers = nearest(x.double() / want[:, None], E4M3)
        wrong += int(((scales != want) | (y.double() != numbers).any(1)).sum())
    return wrong


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])])
def test_rows_are_rounded_as_float64_does(device: str) -> None:
    assert wrong_rows(device) == 0


def test_one_scale_for_all_rows_is_seen() -> None:
    assert wrong_rows("cpu", "tensor") > 100


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])])
def test_a_row_that_is_not_finite_leaves_the_others(device: str) -> None:
    x: Tensor = torch.ones(32, 48, device=device)
    x[3, 5], x[7, 1] = torch.nan, torch.inf
    y, scales = round_rows(x)
    rows = torch.arange(32, device=device)
    whole = ~torch.isin(rows, torch.tensor([3, 7], device=device))
    assert (y.float() * scales[:, None])[whole].eq(1).all()
    assert y[3].float().isnan().all()
    assert y[7, 1].float().isnan()
