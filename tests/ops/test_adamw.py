"""One pass of AdamW against torch's own, in plain torch and as the kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colrow.ops.kernels.adamw import FusedAdamW, ParamUpdate, adamw_reference

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
    fused = FusedAdamW()
    for grad in values[1:]:
        step += 1
        fused([ParamUpdate(weight, grad, *moments, step, copy)], rate, factor, **HYPER)
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


def mixed(device: str) -> list[ParamUpdate]:
    """Parameters of several chunks, of a few elements, of none, and out of line; gradients and copies of each kind."""
    generator = torch.Generator().manual_seed(0)
    updates = []
    for n, grads, copies, shift in [
        (70_000, torch.bfloat16, torch.bfloat16, 0),
        (16_384, torch.float32, torch.bfloat16, 0),
        (48, torch.bfloat16, torch.bfloat16, 0),
        (0, torch.bfloat16, torch.bfloat16, 0),
        (5, torch.bfloat16, torch.bfloat16, 0),
        (33_001, torch.bfloat16, torch.bfloat16, 3),
        (2_048, torch.float32, None, 0),
    ]:
        tensors = [torch.randn(n + shift, generator=generator).to(device)[shift:] for _ in range(3)]
        param, grad, mean = tensors
        copy = None if copies is None else torch.full_like(param, torch.nan, dtype=copies)
        step = torch.tensor(float(1 + len(updates)), device=device)
        updates.append(ParamUpdate(param, grad.to(grads), mean, mean.square(), step, copy))
    return updates


def test_passes_of_many_kinds_are_those_of_each_alone(device: str) -> None:
    rate, scale = (torch.tensor(x, device=device, dtype=torch.float64) for x in (RATE, SCALE))
    together, alone = mixed(device), mixed(device)
    fused = FusedAdamW()
    for _ in range(STEPS):
        fused(together, rate, scale, **HYPER)
        for one in alone:
            adamw_reference(one, rate, scale, *HYPER.values())
        # a step's gradients lie elsewhere than the ones before
        together = [one._replace(grad=one.grad.clone()) for one in together]
    for got, want in zip(together, alone, strict=True):
        torch.testing.assert_close(got.param, want.param, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got.exp_avg_sq, want.exp_avg_sq, rtol=1e-5, atol=1e-7)
        if got.copy is not None:
            assert torch.equal(got.copy, got.param.bfloat16())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_has_addresses_of_its_own() -> None:
    """Captured after other gradients, and replayed after the eager calls have had yet others."""
    rate, scale = (torch.tensor(x, device="cuda", dtype=torch.float64) for x in (RATE, SCALE))
    got, want = mixed("cuda"), mixed("cuda")
    fused, stream = FusedAdamW(), torch.cuda.Stream()

    def moved(updates: list[ParamUpdate], factor: float) -> list[ParamUpdate]:
        return [one._replace(grad=one.grad * factor) for one in updates]

    fused(got, rate, scale, **HYPER)
    inside, graph = moved(got, 3.0), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        fused(inside, rate, scale, **HYPER)
    for factor in (1.0, 2.0):
        graph.replay()
        fused(moved(got, factor), rate, scale, **HYPER)
    for factor in (1.0, 3.0, 1.0, 3.0, 2.0):
        for one in moved(want, factor):
            adamw_reference(one, rate, scale, *HYPER.values())
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.param, other.param, rtol=1e-5, atol=1e-6)


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
        one = ParamUpdate(inner[0], grad, inner[1], inner[2], step, copy[7:2056])
        FusedAdamW()([one], rate, scale, **HYPER)
        found = [*[tensor.clone() for tensor in inner], copy[7:2056].clone()]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))
        for tensor in (*around, copy):
            assert tensor[:7].isnan().all()
            assert tensor[2056:].isnan().all()
    expected = [value.clone() for value in before]
    adamw_reference(ParamUpdate(expected[0], grad, expected[1], expected[2], step), rate, scale, *HYPER.values())
    for got, want in zip(first, expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
