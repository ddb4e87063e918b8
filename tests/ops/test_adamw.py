"""One pass of AdamW against torch's own, in plain torch and as the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colrow.ops.kernels.adamw import Pass, adamw, adamw_reference

HYPER = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
STEPS = 5
SCALE, RATE = 0.5, 1e-2
SHAPES = [(3,), (2049,), (37, 65), (128, 512)]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--device"))


def draws(shape: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shape) + shape[0])
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(STEPS + 1)]


def by_torch(values: list[Tensor], dtype: torch.dtype) -> Tensor:
    weight = torch.nn.Parameter(values[0].to(dtype, copy=True))
    optimizer = torch.optim.AdamW([weight], lr=RATE, **HYPER)
    for grad in values[1:]:
        weight.grad = grad.to(dtype) * SCALE
        optimizer.step()
    return weight.detach()


def in_one_pass(values: list[Tensor], dtype: torch.dtype, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """The weights after all steps, and their bf16 copy, whose memory held something else before."""
    weight = values[0].to(dtype, copy=True)
    moments, step = (torch.zeros_like(weight), torch.zeros_like(weight)), torch.zeros((), device=weight.device)
    copy = torch.full_like(weight, torch.nan, dtype=torch.bfloat16)
    rate, factor = (torch.tensor(x, device=weight.device, dtype=torch.float64) for x in (RATE, scale))
    for grad in values[1:]:
        step += 1
        adamw(Pass(weight, grad, *moments, step, copy), rate, factor, **HYPER)
    return weight, copy


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "grads", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float32, torch.float32, 1e-6),
        (torch.float32, torch.bfloat16, 1e-6),
    ],
)
def test_a_pass_is_torchs_step(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, grads: torch.dtype, tolerance: float
) -> None:
    values = draws(shape, device, grads)
    want = by_torch(values, torch.float64)
    weight, copy = in_one_pass(values, dtype)
    torch.testing.assert_close(weight.double(), want, rtol=tolerance, atol=tolerance)
    # from fp64 there are two ways to round: over fp32, or at once
    torch.testing.assert_close(copy, weight.bfloat16(), rtol=2**-7 if dtype == torch.float64 else 0.0, atol=0.0)


def test_another_scale_is_another_step(device: str) -> None:
    """AdamW hardly sees a factor on all gradients, but for the first ones beside eps: this must be no blind test."""
    values = [value * 1e-6 for value in draws((37, 65), device, torch.float64)]
    want = by_torch(values, torch.float64)
    assert (in_one_pass(values, torch.float64)[0] - want).abs().max() < 1e-14
    assert (in_one_pass(values, torch.float64, scale=1.0)[0] - want).abs().max() > 1e-3


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_kernel_leaves_what_lies_beside_alone_and_repeats_itself() -> None:
    around = [torch.full((4096,), torch.nan, device="cuda") for _ in range(3)]
    inner = [tensor[7:2056] for tensor in around]
    for tensor in inner:
        tensor.fill_(0.25)
    before = [tensor.clone() for tensor in inner]
    copy = torch.full((4096,), torch.nan, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(2049, device="cuda", dtype=torch.bfloat16)
    step, rate, scale = (torch.tensor(x, device="cuda") for x in (3.0, RATE, SCALE))
    first: list[Tensor] = []
    for _ in range(10):
        for tensor, value in zip(inner, before, strict=True):
            tensor.copy_(value)
        one = Pass(inner[0], grad, inner[1], inner[2], step, copy[7:2056])
        adamw(one, rate, scale, **HYPER)
        found = [*[tensor.clone() for tensor in inner], copy[7:2056].clone()]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
        for tensor in (*around, copy):
            assert tensor[:7].isnan().all()
            assert tensor[2056:].isnan().all()
    expected = [value.clone() for value in before]
    adamw_reference(Pass(expected[0], grad, expected[1], expected[2], step), rate, scale, *HYPER.values())
    for got, want in zip(first, expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
