"""Operators of our own: their gradients are those of `torch.library.custom_op`, in a fraction of its Python calls."""

from __future__ import annotations

import cProfile
import pstats
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.ops.linear_options import LinearOptions
from colrow.ops.parallel_linear import column_linear, row_linear
from colrow.torch_compat import Operator

SCHEMA = "(Tensor x, Tensor[] weights, float factor, Tensor? shift) -> (Tensor, Tensor)"


def _forward(x: Tensor, weights: list[Tensor], factor: float, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    y = x * sum(weights) * factor
    return (y if shift is None else y + shift), x.detach().clone()


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, ctx.factor, _ = inputs
    ctx.save_for_backward(x, *weights)


def _backward(ctx: Any, dy: Tensor, _: Any) -> Any:
    x, *weights = ctx.saved_tensors
    need_x, need_each, *_ = ctx.needs_input_grad
    dx = dy * sum(weights) * ctx.factor if need_x else None
    return dx, [dy * x * ctx.factor if need else None for need in need_each], None, None


OURS = Operator("tested", SCHEMA, _forward)
OURS.register_fake(lambda x, weights, factor, shift: (torch.empty_like(x), torch.empty_like(x)))
OURS.register_autograd(_backward, _save)
THEIRS = torch.library.custom_op("colrow_test::tested", _forward, mutates_args=(), schema=SCHEMA)
THEIRS.register_fake(lambda x, weights, factor, shift: (torch.empty_like(x), torch.empty_like(x)))
THEIRS.register_autograd(_backward, setup_context=_save)


def results(operator: Callable[..., Any], trained: tuple[bool, ...], shift: bool, backend: str | None) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    x, *weights = [
        torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_(wanted) for wanted in trained
    ]
    added = torch.ones(3, 4, dtype=torch.float64) if shift else None

    def compute(x: Tensor, weights: list[Tensor]) -> Tensor:
        return operator(x.sin(), weights, 2.5, added)[0].square().sum()

    function = torch.compile(compute, backend=backend) if backend else compute
    loss = function(x, weights)
    if loss.requires_grad:
        loss.backward()
    return [loss.detach(), *(None if t.grad is None else t.grad for t in (x, *weights))]


def test_gradients_are_those_of_torchs_registration() -> None:
    for trained in ((True, True, True), (False, True, False), (True, False, False), (False, False, False)):
        for shift in (False, True):
            compare(trained, shift, None)


def compare(trained: tuple[bool, ...], shift: bool, backend: str | None) -> None:
    want = results(torch.ops.colrow_test.tested, trained, shift, None)
    got = results(torch.ops.colrow.tested, trained, shift, backend)
    assert [a is None for a in got] == [b is None for b in want] == [False, *(not t for t in trained)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True) if a is not None)


@pytest.mark.exhaustive
def test_gradients_inside_a_compiled_graph() -> None:
    compare((True, True, True), False, "aot_eager")
    compare((False, True, False), True, "aot_eager")


@pytest.mark.exhaustive
def test_torchs_own_checks_of_an_operator_pass() -> None:
    x, w = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.library.opcheck(torch.ops.colrow.tested.default, (x, [w, w], 1.5, None))


@pytest.fixture
def group() -> Iterator[str]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    dist.destroy_process_group()


def python_calls(run: Callable[[], Tensor]) -> float:
    """Of a forward and a backward."""
    run().sum().backward()
    profile, times = cProfile.Profile(), 10
    profile.enable()
    for _ in range(times):
        run().sum().backward()
    profile.disable()
    return pstats.Stats(profile).total_calls / times  # type: ignore[attr-defined]


def test_a_fast_linear_takes_few_python_calls(group: str) -> None:
    """Small models wait for the CPU. With `custom_op` a column takes 700."""
    options = LinearOptions("none", keep_gathered=False)
    x, *weights = (torch.randn(16, 16, requires_grad=True) for _ in range(4))
    assert python_calls(lambda: column_linear(x, weights, group, options)) < 300
    assert python_calls(lambda: row_linear(x, weights[0], group, options)) < 220


def test_registration_takes_half_of_torchs_python_calls() -> None:
    x, *weights = (torch.randn(16, 16, requires_grad=True) for _ in range(4))
    ours, torchs = (
        python_calls(lambda: operator(x, weights, 1.0, None)[0])  # noqa: B023
        for operator in (torch.ops.colrow.tested, torch.ops.colrow_test.tested)
    )
    assert ours < torchs / 2, (ours, torchs)
