"""The share of a forward's floating-point operations that a plan splits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.dryrun.dry_run import dry_run
from colrow.dryrun.flops import flops_of
from colrow.dryrun.result import DryRun
from colrow.mesh import Mesh
from colrow.plans.plan import Plan
from helpers.broken_plans import llama


class Layered(nn.Module):
    """Three layers of two products of 16 x 64, of which two layers are run, and a head of 16 x 32."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(16, 32)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


BLOCK = 2 * 16 * 64


def run(model: nn.Module, plan: Plan, tp: int, inputs: Tensor | None = None) -> DryRun:
    return dry_run(model, plan, Mesh(tp=tp), 2, 16, inputs=inputs)


@pytest.mark.parametrize(("head", "split"), [(False, 3 * BLOCK), (True, 3 * BLOCK + 16 * 32)])
def test_layers_that_are_not_run_count(head: bool, split: int) -> None:
    modules = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
    plan = Plan(modules=modules | ({"head": {"style": "colwise", "output": "replicate"}} if head else {}))
    found = run(Layered(), plan, 4, torch.zeros(2, 8, 16))
    assert found.reference_flops == 2 * 16 * (3 * BLOCK + 16 * 32)
    assert found.flops_split(4) == pytest.approx(split / (3 * BLOCK + 16 * 32))


def test_nothing_split_is_nothing() -> None:
    assert run(Layered(), Plan(modules={}), 2, torch.zeros(2, 8, 16)).flops_split(2) == 0


def test_fast_styles_compute_what_plain_ones_do_and_gathered_heads_are_not_split() -> None:
    plain, fast, gathered = (run(llama(), Plan.preset(name), 2) for name in ("llama", "llama-fast", "article"))
    assert plain.flops_split(2) == pytest.approx(1.0)
    assert fast.flops == plain.flops
    linear = run(llama(), Plan.preset("llama-fast", "linear"), 2)  # its gradients are computed in forward
    assert linear.flops == plain.flops
    assert (gathered.flops_split(2) or 0) < 1


def test_operations_are_counted_as_by_hand() -> None:
    aten = torch.ops.aten
    q, k, v = torch.ones(2, 3, 5, 8), torch.ones(2, 3, 7, 8), torch.ones(2, 3, 7, 4)
    attention = flops_of(aten._scaled_dot_product_flash_attention_for_cpu.default, (q, k, v), {}, (q, q))
    assert attention == 2 * 2 * 3 * 5 * 7 * (8 + 4)
    a, b = torch.ones(5, 3), torch.ones(3, 7)
    assert flops_of(aten.mm.default, (a, b), {}, a @ b) == 2 * 5 * 3 * 7
    assert flops_of(aten.add.Tensor, (a, a), {}, a) == 0


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_count(kind: str, gates: int) -> None:
    """One operator or many, as torch has the layer."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = getattr(nn, kind)(16, 8, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x)[0]
            return out

    found = run(Model(), Plan(modules={}), 2, torch.zeros(2, 5, 16))
    assert found.reference_flops == 2 * 2 * 5 * gates * 8 * (16 + 8)
