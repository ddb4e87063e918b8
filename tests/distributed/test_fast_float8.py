"""The fast styles with 8-bit products: loss and gradients near those of fp32, by the error of their rounding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from colrow.checking.check import Finding, check
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.ops.float8 import RECIPES
from colrow.parallel.activation_checkpoint import Mode, apply_activation_checkpoint
from colrow.parallel.compile import compile_forward
from colrow.parallel.loss import model_loss
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import full_tensor
from colrow.styles.fast.peak_history import PeakHistory
from helpers.harness import Ranks
from helpers.parity import TINY, batch, tp_mesh
from helpers.runs import a_run, train, write_text

pytestmark = pytest.mark.distributed
CONFIG = replace(
    TINY, hidden_size=128, intermediate_size=256, num_attention_heads=8, num_key_value_heads=8, head_dim=32
)


def step(
    device: str,
    plan: Plan,
    backend: str | None = None,
    mesh: DeviceMesh | None = None,
    recompute: Mode = "none",
    steps: int = 1,
) -> dict[str, Tensor]:
    """The loss and the gradients of one micro-batch in fp32, on two ranks of tp unless a mesh is given, the last
    of `steps` times."""
    torch.manual_seed(0)
    mesh = mesh or tp_mesh(device, 2)
    model = parallelize(Llama(CONFIG).to(device), plan, mesh)
    apply_activation_checkpoint(model.layers, recompute)
    if backend:
        for block in model.layers:
            compile_forward(block, backend)
    peaks = PeakHistory([model])
    for _ in range(steps):
        model.zero_grad()
        with peaks.step():
            loss = model_loss(model, plan, mesh, *batch(device))
            loss.backward()
    align_gradients(model.parameters())
    found = {name: full_tensor(param.grad) for name, param in model.named_parameters() if param.grad is not None}
    return {"loss": loss.detach(), **found}


def recomputed(device: str) -> dict[str, bool]:
    """Whether loss and gradients are bit for bit those of a step that keeps what it computes."""
    plan = Plan.preset("llama-fast", "linear").with_fp8("tensorwise")
    want, modes = step(device, plan), ("selective", "full")
    found: dict[Mode, dict[str, Tensor]] = {mode: step(device, plan, recompute=mode) for mode in modes}
    return {mode: all(torch.equal(got[name], want[name]) for name in want) for mode, got in found.items()}


def errors(device: str) -> dict[str, dict[str, float]]:
    """Relative, in the 2-norm, against the same plan without fp8."""
    plan = Plan.preset("llama-fast", "linear")
    want = step(device, plan)
    plan_fp8 = plan.with_fp8("tensorwise")
    ways = {"compiled": step(device, plan_fp8, "aot_eager")}
    ways |= {recipe: step(device, plan.with_fp8(recipe), steps=2) for recipe in RECIPES}
    data_axis = Mesh(dp_shard=2).build(device, 2)
    ways["without tp"] = step(device, plan_fp8, mesh=data_axis)
    ways["without tp, compiled"] = step(device, plan_fp8, "aot_eager", mesh=data_axis)
    return {
        way: {name: ((got[name] - want[name]).norm() / want[name].norm()).item() for name in want}
        for way, got in ways.items()
    }


def test_loss_and_gradients_are_near_those_of_fp32(ranks: Ranks) -> None:
    for ways in ranks(2).run(errors):
        for way, found in ways.items():
            assert found.pop("loss") < 1e-2, way
            assert max(found.values()) < 0.2, (way, found)
            inside = {name: error for name, error in found.items() if "proj" in name}
            assert min(inside.values()) > 5e-3, f"{way}: these products have not been rounded: {inside}"


def errors_of_fp8(seq_len: int) -> list[Finding]:
    with torch.device("meta"):
        model = Llama(CONFIG)
    plan = Plan.preset("llama-fast", "linear").with_fp8("tensorwise")
    return [f for f in check(model, plan, Mesh(tp=2), batch_size=1, seq_len=seq_len) if f.severity == "error"]


def test_tokens_that_16_does_not_divide_are_found_before_a_run() -> None:
    assert "an fp8 matmul has a side of 20" in errors_of_fp8(20)[0].message


def test_tokens_that_16_divides_are_no_error() -> None:
    assert errors_of_fp8(32) == []


@pytest.mark.exhaustive
def test_recomputation_rounds_alike(ranks: Ranks) -> None:
    assert ranks(2).run(recomputed) == [{"selective": True, "full": True}] * 2


@pytest.mark.exhaustive
def test_a_run_samples_prompts_of_any_length_and_is_exported(ranks: Ranks, tmp_path: Path) -> None:
    """16 does not divide the prompt: it is padded, and the run's end is not an error about it."""
    write_text(tmp_path)
    train_keys = {"steps": 3, "fp8": "tensorwise", "compile": False, "warmup_steps": 1}
    config = a_run(
        tmp_path,
        "fp8",
        mesh={"tp": 2},
        plan="llama-fast",
        loss="linear",
        train=train_keys,
        sample={"prompt": "row 7", "tokens": 3},
    )
    steps, _, texts = zip(*ranks(2).run(train, config), strict=True)
    assert steps == (3, 3)
    (text,) = filter(None, texts)  # the first rank alone prints
    assert "sample     row 7" in text
    assert "export     " in text
