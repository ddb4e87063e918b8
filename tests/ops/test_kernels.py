"""The plain references of the cross-entropy kernels, and the kernels themselves in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from colrow.ops.kernels.cross_entropy import LossTerms, loss_reference, statistics_reference
from helpers.kernel_cases import CASES, REFERENCE, Case, computed, draw, expected, worst_error
from helpers.swiglu_cases import worst_swiglu_error

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_equals_autograd(case: Case, dtype: torch.dtype) -> None:
    assert worst_error(case, "cpu", dtype, REFERENCE) < TOLERANCE[dtype]


def test_wrong_terms_are_seen() -> None:
    case = CASES[3]
    z, y = draw(case, "cpu", torch.float64, 0)
    other = Case(case.tokens, case.vocab, case.ranks, smoothing=0.0, z_loss=case.z_loss)
    _, want = expected(case, z, y, 1.0)
    _, got, _ = computed(other, z, y, 1.0, REFERENCE)
    assert (got - want).abs().max() > 1e-4


def test_a_target_outside_the_vocabulary_makes_the_loss_nan() -> None:
    z, y, terms = torch.zeros(2, 4), torch.tensor([1, 4]), LossTerms(4, 0)
    loss = loss_reference(z, y, statistics_reference(z, y, terms)[None], torch.ones(()), terms, False)
    assert loss[0].isfinite()
    assert loss[1].isnan()


def test_the_reference_of_swiglu_equals_autograd() -> None:
    for dtype, tolerance in TOLERANCE.items():
        assert worst_swiglu_error("cpu", dtype, by_kernel=False) < tolerance


INTERPRETED = """
import torch
from colrow.ops.kernels.cross_entropy import loss_triton, statistics_triton
from helpers.kernel_cases import CASES, worst_error
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
    for case in CASES:
        error = worst_error(case, "cpu", dtype, (statistics_triton, loss_triton))
        assert error < tolerance, (case, dtype, error)
from colrow.ops.kernels.slot_sum import add_received, add_triton, square_terms, sum_triton
for shape in ((2, 33, 129), (4, 1, 1), (8, 5000)):
    slots = torch.randn(shape)
    assert torch.equal(sum_triton(slots), sum(slots.unbind())), shape
for others, size, add in ((1, 5000, False), (3, 129, True), (1, 4096, True)):
    own, received = torch.randn(size).bfloat16(), torch.randn(others, size + 7).bfloat16()[:, :size]
    got, want = torch.randn(size), torch.zeros(size)
    want.copy_(got)
    squares = torch.full((square_terms(size),), torch.nan)
    add_triton(own, received, got, 1 / (others + 1), add=add, squares=squares)
    add_received(own, received, want, 1 / (others + 1), add=add)
    assert (got - want).abs().max() < 1e-6, (others, size, add)
    assert abs(squares.sum() / want.square().sum() - 1) < 1e-6, (others, size, add)
from helpers.swiglu_cases import worst_swiglu_error
assert worst_swiglu_error("cpu", torch.float32, by_kernel=True) < 1e-6
from helpers.rounding_cases import by_interpreted_kernel, check
assert check(by_interpreted_kernel, "cpu") > 60
from helpers.rounding_cases import check_delayed, delayed_by_kernel
assert check_delayed(delayed_by_kernel, "cpu", exact=True) > 120
from helpers.rounding_cases import blocks_by_kernel, wrong_blocks
assert wrong_blocks(blocks_by_kernel, "cpu", exact=True) == 0
from helpers.rounding_cases import check_rows
assert check_rows() > 30
print("agree")
"""


def test_the_kernels_agree_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="the interpreter is a part of Triton")
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "src"), *sys.path])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "agree", done.stderr
