"""8-bit products: the plain form against exact products, the operator against the plain form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colrow.errors import ConfigError, PlanError
from colrow.ops.float8 import KINDS, float8_product, float8_reference, quantised
from colrow.plans.plan import Plan

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]


def factors(device: str, dtype: torch.dtype = torch.float32, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """[64, 96] and [96, 48]; rows of the first differ in size by powers of 10 up to 10^spread."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((64, 96), (96, 48)))
    a = a * 10.0 ** torch.linspace(-spread, 0, 64)[:, None]
    return a.to(device, dtype), b.to(device, dtype)


def row_errors(got: Tensor, want: Tensor) -> Tensor:
    """Of each row, relative."""
    return (got.double() - want).norm(dim=1) / want.norm(dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "gradient", "bound"),
    [("tensorwise", False, 0.08), ("tensorwise", True, 0.12), ("rowwise", False, 0.08), ("rowwise", True, 0.08)],
)
def test_the_error_is_that_of_rounding(kind: str, gradient: bool, bound: float, device: str) -> None:
    """A number with m bits of mantissa is off by 2^-(m+1) at most; e4m3 has 3, e5m2 2."""
    for dtype in (torch.float32, torch.bfloat16):
        a, b = factors(device, dtype)
        got = float8_product(a, b, kind, gradient=gradient)
        errors = row_errors(got, a.double() @ b.double())
        assert got.dtype == dtype
        assert 0.01 < errors.mean() < errors.max() < bound, errors


def test_rows_of_their_own_scale_keep_what_one_scale_loses() -> None:
    a, b = factors("cpu", spread=8.0)
    want = a.double() @ b.double()
    assert row_errors(float8_product(a, b, "rowwise"), want).max() < 0.08
    assert row_errors(float8_product(a, b, "tensorwise"), want).max() > 0.5


def test_factors_may_lie_in_memory_either_way() -> None:
    a, b = factors("cpu")
    for kind in KINDS:
        assert torch.equal(
            float8_product(a.t().contiguous().t(), b.t().contiguous().t(), kind), float8_product(a, b, kind)
        )


def test_zeros_stay_zeros() -> None:
    a, b = factors("cpu")
    assert torch.equal(float8_product(torch.zeros_like(a), b, "tensorwise"), torch.zeros(64, 48))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_operator_is_the_reference(kind: str, gradient: bool, device: str) -> None:
    a, b = factors(device, torch.bfloat16)
    a_type = torch.float8_e5m2 if gradient and kind == "tensorwise" else torch.float8_e4m3fn
    (x, s), (y, r) = quantised(a, a_type, kind), quantised(b.t(), torch.float8_e4m3fn, kind)
    want = float8_reference(x, y.t(), s, r.t()).double()
    if device == "cpu" and kind == "rowwise" and torch.__version__.startswith("2.11."):
        pytest.skip("torch 2.11 multiplies 8-bit floats on CPUs with one scale only")
    got = torch._scaled_mm(x, y.t(), scale_a=s, scale_b=r.t(), out_dtype=torch.bfloat16)
    assert row_errors(got, want).max() < 2**-8  # bf16's own rounding
    assert row_errors(float8_product(a, b, kind, gradient=gradient), want).max() < 2**-7


@pytest.mark.parametrize("shapes", [((24, 32), (32, 16)), ((16, 24), (24, 16)), ((16, 32), (32, 24))])
def test_sizes_that_16_does_not_divide_are_refused(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    a, b = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ConfigError, match="a side of 24"):
        float8_product(a, b, "tensorwise")


def test_a_plan_says_it_and_is_read_back() -> None:
    plan = Plan.preset("llama-fast").with_fp8("rowwise")
    said = {style.name for style in plan.modules.values() if getattr(style, "fp8", "") == "rowwise"}
    assert said == {"fast_gather", "fast_rowwise"}
    assert Plan.from_yaml(plan.to_yaml()).modules == plan.modules
    with pytest.raises(PlanError, match="no style with the option fp8"):
        Plan.preset("llama").with_fp8("rowwise")
    with pytest.raises(PlanError, match="did you mean 'rowwise'"):
        Plan({"mlp.down_proj": {"style": "fast_rowwise", "fp8": "rowise"}})
