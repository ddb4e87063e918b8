"""The Triton kernels on a GPU: against float64, with poisoned outputs, and bit by bit the same when repeated."""

from __future__ import annotations

import pytest
import torch

from colrow.ops.kernels.slot_sum import add_received, square_terms, sum_slots
from helpers.kernel_cases import CASES, Case, computed, draw, worst_error
from helpers.parity import relative
from helpers.swiglu_cases import worst_swiglu_error

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LARGE = [
    Case(257, 32_064, ranks=4),
    Case(1000, 32_064, ranks=2, smoothing=0.1, z_loss=1e-4),
    Case(31, 50_000, ranks=4, spread=20.0),
]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-2}


def kernels() -> tuple[object, object]:
    from colrow.ops.kernels import cross_entropy
    from colrow.ops.kernels.optional_triton import UNAVAILABLE

    assert not UNAVAILABLE, UNAVAILABLE
    return cross_entropy.statistics_triton, cross_entropy.loss_triton


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES + LARGE, ids=str)
def test_the_kernels_equal_float64(case: Case, dtype: torch.dtype) -> None:
    assert worst_error(case, "cuda", dtype, kernels()) < TOLERANCE[dtype]


@pytest.mark.parametrize("seed", range(8))
def test_the_kernels_equal_float64_at_random_shapes(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, vocab = (int(torch.randint(1, high, (1,), generator=generator)) for high in (300, 20_000))
    ranks = (1, 2, 4, 8)[seed % 4]
    case = Case(tokens, max(vocab, 8 * ranks), ranks, smoothing=0.1 * (seed % 3), z_loss=1e-3 * (seed % 2))
    assert worst_error(case, "cuda", torch.float32, kernels(), seed) < 1e-5


def test_repeated_runs_are_equal_bit_by_bit() -> None:
    case = LARGE[1]
    z, y = draw(case, "cuda", torch.bfloat16, 3)
    first = computed(case, z, y, 1.0, kernels())
    for _ in range(20):
        again = computed(case, z, y, 1.0, kernels())
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 4096, 512), (3, 33, 129), (4, 1, 1), (8, 5001)])
def test_slots_are_added_in_rank_order_and_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    slots = torch.randn(shape, device="cuda").to(dtype)
    want = sum(slot.to(torch.promote_types(dtype, torch.float32)) for slot in slots).to(dtype)  # type: ignore[union-attr]
    assert relative(sum_slots(slots), want) <= (1e-15 if dtype == torch.float64 else 0.0)
    slots[-1] = 0
    assert not torch.equal(sum_slots(slots), want)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("others", "size"), [(1, 4096 * 512), (2, 33 * 129), (7, 5001), (1, 1)])
def test_received_rows_are_added_in_fp32(others: int, size: int, add: bool) -> None:
    own = torch.randn(size, device="cuda").bfloat16()
    received = torch.randn(others, size + 129, device="cuda").bfloat16()[:, 1 : size + 1]
    total = torch.randn(size, device="cuda")
    want = (own.double() + received.double().sum(0)) / (others + 1) + add * total.double()
    squares = torch.full((square_terms(size),), torch.nan, device="cuda")
    add_received(own, received, total, 1 / (others + 1), add=add, squares=squares)
    assert abs(squares.double().sum() / want.square().sum() - 1) < 1e-5
    assert relative(total.double(), want) < 1e-6
    add_received(own, received, total, 1.0, add=False)
    assert relative(total.double(), want) > 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_swiglu_equals_float64(dtype: torch.dtype, tolerance: float) -> None:
    assert worst_swiglu_error("cuda", dtype, by_kernel=True) < tolerance


def test_a_number_that_is_not_finite_reaches_the_largest_of_its_row() -> None:
    from colrow.ops.kernels.swiglu import swiglu_triton

    y = torch.ones(3, 64, device="cuda")
    y[1, 5] = torch.nan
    assert swiglu_triton(y, 0)[1].isfinite().tolist() == [True, False, True]
