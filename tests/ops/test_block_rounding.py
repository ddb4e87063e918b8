"""e4m3 with a scale for each block: the plain form and the kernel against float64, and the product of blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.float8 import Float8Operand, require_sizes, scaled_mm
from colrow.ops.kernels.block_rounding import round_blocks
from colrow.ops.weights import ROUNDINGS
from helpers.rounding_cases import block_inputs, blocks_in_float64, wrong_blocks

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_are_rounded_as_float64_does(device: str) -> None:
    assert wrong_blocks(round_blocks, device) == 0


def test_other_blocks_are_seen() -> None:
    def squares(x: Tensor, *, square: bool) -> tuple[Tensor, Tensor]:
        y, scales = round_blocks(x, square=square)
        return y, scales.roll(1, 0)

    assert wrong_blocks(squares, "cpu") > 5


@pytest.mark.parametrize("device", DEVICES)
def test_scales_lie_as_cublas_reads_them(device: str) -> None:
    x = torch.ones(256, 640, device=device)
    assert (round_blocks(x)[1].shape, round_blocks(x)[1].stride()) == ((256, 5), (1, 256))
    _, squares = round_blocks(x, square=True)
    assert (squares.shape, squares.stride()) == ((2, 8), (8, 1)), "16 bytes divide the distance of its rows"


@pytest.mark.parametrize("device", DEVICES)
def test_the_product_is_that_of_the_rounded_numbers(device: str) -> None:
    """[T, K] with K / 128 a multiple of 4, and not; outputs are rows of a larger tensor."""
    for T, K, N in ((64, 512, 256), (16, 384, 128), (272, 128, 640)):
        x, w = block_inputs(T, K, device, seed=1), block_inputs(N, K, device, seed=2)
        a, b = ROUNDINGS["blockwise"].of_tokens(x), ROUNDINGS["blockwise"].of_weight(w)
        want = blocks_in_float64(x)[2] @ blocks_in_float64(w, square=True)[2].t()
        around = torch.full((T + 32, N), torch.nan, dtype=torch.bfloat16, device=device)
        scaled_mm(a, b, around[16:-16])
        error = (around[16:-16].double() - want).norm(dim=1) / want.norm(dim=1)
        assert error.max() < 2**-7, (T, K, N, error)  # bf16's own rounding
        across = ROUNDINGS["blockwise"].of_weight(w.t().contiguous().t())
        assert torch.equal(across.values.float(), b.values.float())
        wrong = Float8Operand(b.values, b.scale.roll(1, 0) if len(b.scale) > 1 else 2 * b.scale)
        scaled_mm(a, wrong, around[16:-16])
        assert ((around[16:-16].double() - want).norm(dim=1) / want.norm(dim=1)).max() > 0.1, "scales of other blocks"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("device", DEVICES)
def test_a_block_that_is_not_finite_leaves_the_other_rows(bad: float, device: str) -> None:
    x = torch.ones(32, 256, device=device)
    x[3, 5] = bad
    out = torch.empty(32, 128, device=device)
    blockwise = ROUNDINGS["blockwise"]
    scaled_mm(blockwise.of_tokens(x), blockwise.of_weight(torch.ones(128, 256, device=device)), out)
    assert not out[3].isfinite().any()
    assert out[torch.arange(32) != 3].eq(256).all()


def test_sizes_that_blocks_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="blocks of 128 features, and a rank's linear has 192"):
        require_sizes("blockwise", 64, 256, 192)
    with pytest.raises(ConfigError, match="a side of 24"):
        require_sizes("blockwise", 24, 256, 256)
    require_sizes("rowwise", 64, 256, 192)
    with pytest.raises(ConfigError, match="has 192"):
        ROUNDINGS["blockwise"].of_weight(torch.ones(192, 128))
