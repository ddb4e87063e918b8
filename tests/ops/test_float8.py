"""8-bit products: the plain form against exact products, the operator against the plain form."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from colrow.config import load_config
from colrow.errors import ConfigError, PlanError
from colrow.ops.float8 import (
    ACTIVATION,
    GRADIENT,
    float8_reference,
    joined,
    joined_transpose,
    quantize,
    quantize_both,
    quantize_packed,
    scaled_mm,
    unpacked,
)
from colrow.ops.kernels.rounding import round_reference
from colrow.plans.plan import Plan
from helpers.rounding_cases import (
    by_kernel,
    by_reference,
    check,
    check_delayed,
    delayed_by_kernel,
    delayed_by_reference,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, needs_gpu])]


def operands(device: str, dtype: torch.dtype = torch.float32, spread: float = 0.0) -> tuple[Tensor, Tensor]:
    """[64, 96] and [96, 48]; rows of the first differ in size by powers of 10 up to 10^spread."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((64, 96), (96, 48)))
    a = a * 10.0 ** torch.linspace(-spread, 0, 64)[:, None]
    return a.to(device, dtype), b.to(device, dtype)


def float8_product(a: Tensor, b: Tensor, *, gradient: bool = False) -> Tensor:
    out = a.new_full((a.shape[0], b.shape[1]), torch.nan)
    scaled_mm(quantize([a], gradient=gradient), quantize([b.t()]), out, gradient=gradient)
    return out


def row_errors(got: Tensor, want: Tensor) -> Tensor:
    """Of each row, relative."""
    return (got.double() - want).norm(dim=1) / want.norm(dim=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("gradient", "bound"), [(False, 0.08), (True, 0.12)])
def test_the_error_is_that_of_rounding(gradient: bool, bound: float, device: str) -> None:
    """A number with m bits of mantissa is off by 2^-(m+1) at most; e4m3 has 3, e5m2 2."""
    for dtype in (torch.float32, torch.bfloat16):
        a, b = operands(device, dtype)
        got = float8_product(a, b, gradient=gradient)
        errors = row_errors(got, a.double() @ b.double())
        assert got.dtype == dtype
        assert 0.01 < errors.mean() < errors.max() < bound, errors


def test_operands_may_be_row_major_or_column_major() -> None:
    a, b = operands("cpu")
    assert torch.equal(float8_product(a.t().contiguous().t(), b.t().contiguous().t()), float8_product(a, b))


def test_the_reference_rounds_as_float64_does() -> None:
    assert check(by_reference, "cpu") > 60


@pytest.mark.cuda
@needs_gpu
def test_the_kernel_rounds_as_float64_does() -> None:
    assert check(by_kernel, "cuda") > 60


def test_delayed_scales_are_those_of_float64() -> None:
    assert check_delayed(delayed_by_reference, "cpu") > 240


@pytest.mark.cuda
@needs_gpu
def test_the_kernel_of_delayed_scales_rounds_as_float64_does() -> None:
    assert check_delayed(delayed_by_kernel, "cuda") > 240


@pytest.mark.parametrize("wrong", ["headroom", "limit", "peak"])
def test_delayed_scales_that_are_wrong_are_seen(wrong: str) -> None:
    def rounding(x: Tensor, history: Tensor, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        given = history.clone()
        rows, transposed, scale = delayed_by_reference(x, given, gradient)
        if wrong == "headroom":
            scale = scale / 2
        elif wrong == "limit":
            round_reference(x, scale, None, rows, transposed)
        if wrong != "peak":
            history.copy_(given)
        return rows, transposed, scale

    with pytest.raises(AssertionError):
        check_delayed(rounding, "cpu")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_delayed_scales_hide_no_number_that_is_not_finite(bad: float, gradient: bool, device: str) -> None:
    a, b = operands(device)
    history = torch.tensor([[4.0, 0, 0, 0], [4.0, 0, 0, 0]], device=device)
    a[3, 5], a[7, 7] = bad, 1e30
    x, _ = quantize_both(a, gradient=gradient, history=history)
    out = torch.empty(64, 48, device=device)
    scaled_mm(x, quantize([b.t()]), out, gradient=gradient)
    assert not out[3].isfinite().any()
    assert out[torch.arange(64) != 3].isfinite().all(), "a number that is too large is cut off"
    assert not history[int(gradient), 1].isfinite()
    assert history[1 - int(gradient)].tolist() == [4, 0, 0, 0]


def test_a_scale_that_is_no_power_of_two_is_seen() -> None:
    def division(x: Tensor, largest: Tensor | None, gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        rows, transposed, scale = by_reference(x, largest, gradient)
        return rows, transposed, scale * 1.5

    with pytest.raises(AssertionError):
        check(division, "cpu")


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("device", DEVICES)
def test_a_number_that_is_not_finite_stays_so(bad: float, device: str) -> None:
    a, b = operands(device)
    a[3, 5] = bad
    assert not float8_product(a, b)[3].isfinite().any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(64, 128), (272, 48), (16, 400)])
def test_an_operand_and_its_transpose_are_quantized_in_one_pass(shape: tuple[int, int], device: str) -> None:
    for source in (torch.bfloat16, torch.float32):
        x = torch.randn(shape[0], shape[1] + 3, generator=torch.Generator().manual_seed(0)).to(device, source)[:, 2:-1]
        rows, transposed = quantize_both(x, gradient=True)
        for one, want in zip((rows, unpacked(transposed, GRADIENT)), (x, x.t()), strict=True):
            alone = quantize([want], gradient=True)
            assert torch.equal(one.values.float(), alone.values.float())
            assert one.values.is_contiguous()
            assert torch.equal(one.scale, alone.scale)


def test_parts_of_an_operand_share_its_scale() -> None:
    a, b = operands("cpu", spread=2.0)
    for dim, operand in ((0, a), (1, b.t())):
        parts = operand.split([16, 32, 16] if dim == 0 else [32, 64], dim)
        one, together = quantize([operand]), quantize(parts, dim=dim)
        assert torch.equal(one.values.float(), together.values.float())
        assert torch.equal(one.scale, together.scale)
        again = quantize(parts, dim=dim, scale=one.scale)
        assert torch.equal(again.values.float(), one.values.float())
        assert torch.equal(again.scale, one.scale)


@pytest.mark.parametrize("device", DEVICES)
def test_chunks_that_were_rounded_apart_are_joined(device: str) -> None:
    """Chunks of other sizes of numbers: what is under the largest scale is what one rounding of all gives."""
    a, _ = operands(device, spread=1.0)
    chunks = a.chunk(4)
    rows, transposed = joined([quantize_packed(chunk) for chunk in chunks])
    want = quantize([a])
    assert torch.equal(rows.scale, want.scale)
    ordinary = (a.abs() / rows.scale) > 2.0**-6  # smaller ones are rounded twice
    assert ordinary.float().mean() > 0.9
    assert torch.equal(rows.values.float()[ordinary], want.values.float()[ordinary])
    assert torch.equal(unpacked(transposed, ACTIVATION).values.float(), rows.values.float().t())
    assert torch.equal(joined_transpose([quantize_packed(chunk) for chunk in chunks])[:-1], transposed[:-1])


def test_zeros_stay_zeros() -> None:
    a, b = operands("cpu")
    assert torch.equal(float8_product(torch.zeros_like(a), b), torch.zeros(64, 48))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradient", [False, True])
def test_the_operator_is_the_reference(gradient: bool, device: str) -> None:
    a, b = operands(device, torch.bfloat16)
    x, y = quantize([a], gradient=gradient), quantize([b.t()])
    want = float8_reference(x.values, y.values.t(), x.scale, y.scale).double()
    got = torch._scaled_mm(x.values, y.values.t(), scale_a=x.scale, scale_b=y.scale, out_dtype=torch.bfloat16)
    assert row_errors(got, want).max() < 2**-8  # bf16's own rounding
    assert row_errors(float8_product(a, b, gradient=gradient), want).max() < 2**-7


@pytest.mark.parametrize("shapes", [((24, 32), (32, 16)), ((16, 24), (24, 16)), ((16, 32), (32, 24))])
def test_sizes_that_16_does_not_divide_are_refused(shapes: tuple[tuple[int, int], tuple[int, int]]) -> None:
    a, b = (torch.ones(shape) for shape in shapes)
    with pytest.raises(ConfigError, match="a side of 24"):
        float8_product(a, b)


def test_a_plan_names_the_recipe_and_is_read_back() -> None:
    plan = Plan.preset("llama-fast").with_fp8("tensorwise")
    with_recipe = {style.name for style in plan.modules.values() if getattr(style, "fp8", "") == "tensorwise"}
    assert with_recipe == {"fast_gather", "fast_rowwise"}
    assert Plan.from_yaml(plan.to_yaml()).modules == plan.modules
    with pytest.raises(PlanError, match="no style with the option fp8"):
        Plan.preset("llama").with_fp8("tensorwise")


def test_an_unknown_recipe_names_the_known_one() -> None:
    with pytest.raises(PlanError, match=r"unknown fp8 'rows'.*rowwise"):
        Plan({"mlp.down_proj": {"style": "fast_rowwise", "fp8": "rows"}})
    with pytest.raises(
        ConfigError, match=r"train\.fp8: Input should be 'tensorwise', 'delayed', 'rowwise' or 'blockwise'"
    ):
        load_config(Path(__file__).parents[2] / "configs/laptop.yaml", {"train.fp8": "rows"})
