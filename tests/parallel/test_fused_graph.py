"""Graphs that are rewritten before inductor: what is found, what is left alone, and the numbers in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx, nn

from colrow.ops.linear_options import LinearOptions
from colrow.ops.parallel_linear import column_linear, row_linear
from colrow.parallel.fused_graph import rewrite

Function = Callable[[Tensor], Tensor]


def compiled(function: Function, graphs: list[list[str]], rewritten: bool = True) -> Function:
    """By torch's autograd compiler; `graphs` gets what the graph calls."""

    def backend(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        if rewritten:
            rewrite(graph)
        graphs.append([str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes])
        found: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph, inputs)  # type: ignore[attr-defined]
        return found

    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)  # type: ignore[return-value]


def first_is_gate(y: Tensor) -> Tensor:
    a, b = y.split([y.shape[-1] // 2] * 2, -1)
    return F.silu(a) * b


def second_is_gate(y: Tensor) -> Tensor:
    a, b = y.chunk(2, dim=-1)
    return torch.mul(a, nn.SiLU()(b))


def three_parts(y: Tensor) -> Tensor:
    a, b, _ = y.split(y.shape[-1] // 3, -1)
    return F.silu(a) * b


def unequal_parts(y: Tensor) -> Tensor:
    a, b = y.split([4, y.shape[-1] - 4], -1)
    return F.silu(a[..., :1]) * b


def gate_read_twice(y: Tensor) -> Tensor:
    a, b = y.chunk(2, -1)
    return F.silu(a) * b + a


def other_dim(y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    return F.silu(a) * b


def same_half_of_two_splits(y: Tensor) -> Tensor:
    a, _ = y.chunk(2, -1)
    b, _ = y.split(y.shape[-1] // 2, -1)
    return F.silu(a) * b


def same_half(y: Tensor) -> Tensor:
    a, _ = y.chunk(2, -1)
    return F.silu(a) * a


@pytest.mark.parametrize("function", [first_is_gate, second_is_gate])
def test_swiglu_of_the_halves_of_a_tensor_is_one_operator(function: Function) -> None:
    y = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    graphs: list[list[str]] = []
    got, want = compiled(function, graphs)(y), function(y)
    assert "swiglu.default" in graphs[0]
    assert not {"silu", "mul"} & {*graphs[0]}
    assert got.shape == want.shape
    (dy,), (dy_want,) = (torch.autograd.grad(h.square().sum(), y) for h in (got, want))
    assert (got - want).abs().max() < 1e-14
    assert (dy - dy_want).abs().max() < 1e-13


@pytest.mark.parametrize(
    "function", [three_parts, unequal_parts, gate_read_twice, other_dim, same_half, same_half_of_two_splits]
)
def test_what_is_not_that_stays(function: Function) -> None:
    y, graphs = torch.randn(2, 6, 24), list[list[str]]()
    assert torch.equal(compiled(function, graphs)(y), function(y))
    assert "swiglu.default" not in graphs[0]


def test_halves_that_are_exchanged_are_seen() -> None:
    y = torch.randn(3, 8, dtype=torch.float64)
    assert (torch.ops.colrow.swiglu(y, 1)[0] - first_is_gate(y)).abs().max() > 1e-3


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
    dist.destroy_process_group()


def mlp(group: str, weights: list[Tensor]) -> Function:
    options = LinearOptions("none", fp8="tensorwise")
    gate, up, down = weights

    def run(x: Tensor) -> Tensor:
        a, b = column_linear(x.flatten(0, -2), [gate, up], group, options).unflatten(0, x.shape[:-1]).split(32, -1)
        return row_linear((F.silu(a) * b).flatten(0, -2), down, group, options).unflatten(0, x.shape[:-1])

    return run


def test_an_8_bit_linear_gets_the_largest_numbers_from_the_graph(group: str) -> None:
    weights = [torch.randn(shape, requires_grad=True) for shape in ((32, 16), (32, 16), (16, 32))]
    x, run = torch.randn(2, 16, 16, requires_grad=True), mlp(group, weights)
    graphs: list[list[str]] = []
    results = []
    for rewritten in (True, False):
        y = compiled(run, graphs, rewritten)(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *weights])])
    assert graphs[0].count("amax") == 1, "the row linear takes those of swiglu"
    assert "amax" not in graphs[1]
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() < 1e-6 * want.norm()


def test_numbers_that_are_too_small_are_seen(group: str) -> None:
    """The negative control: products of numbers that are cut off."""
    weights = [torch.randn(shape) for shape in ((32, 16), (32, 16), (16, 32))]
    x, options = torch.randn(32, 16), LinearOptions("none", fp8="tensorwise").text
    want = torch.ops.colrow.column_forward(x, weights[:2], group, options, None, [], None)[0]
    same = torch.ops.colrow.column_forward(x, weights[:2], group, options, x.abs().amax(1), [], None)[0]
    small = torch.ops.colrow.column_forward(x, weights[:2], group, options, 0.01 * x.abs().amax(1), [], None)[0]
    assert torch.equal(same, want)
    assert not (small - want).norm() < 0.5 * want.norm()
