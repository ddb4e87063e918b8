"""A dry run and the check see what the fast plan does: its collectives, and its mistakes."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from colrow.checking.check import check
from colrow.dryrun.dry_run import dry_run
from colrow.mesh import Mesh
from colrow.models.llama import MLP, Llama
from colrow.plans.plan import Plan
from colrow.verifying.verify import verify
from helpers.parity import MODELS
from helpers.variants import params


def model(name: str = "gqa") -> Llama:
    with torch.device("meta"):
        return Llama(MODELS[name])


@pytest.mark.parametrize("preset", ["llama", "llama-fast"])
def test_the_linear_loss_shows_its_collectives(preset: str) -> None:
    run = dry_run(model(), Plan.preset(preset, "linear"), Mesh(tp=2), 2, 16)
    assert run.failure is None
    head = [(c.op, c.pass_, c.bytes) for c in run.collectives if c.where == "lm_head"]
    # Hidden states [2 × 16, 48], four statistics of 32 tokens from each rank, the gradient of the hidden states.
    assert head == [
        ("all_gather", "forward", 32 * 48 * 4),
        ("all_gather", "forward", 2 * 4 * 32 * 4),
        ("reduce_scatter", "forward", 32 * 48 * 4),
    ]


@pytest.mark.parametrize("preset", ["llama-fast", "llama-overlap"])
def test_a_fast_layer_shows_its_collectives(preset: str) -> None:
    """Whatever carries them, and though there are no copy engines here."""
    run = dry_run(model(), Plan.preset(preset, "linear"), Mesh(tp=2), 2, 16)
    layer = [(c.op, c.pass_) for c in run.collectives if c.where.startswith("layers.0")]
    assert sorted(layer) == sorted(
        [("all_gather", "forward"), ("reduce_scatter", "forward")] * 2
        + [("all_gather", "backward"), ("reduce_scatter", "backward")] * 2
    )
    assert all(c.bytes == 32 * 48 * 4 for c in run.collectives if c.where.startswith("layers.0"))


LOSSES = ("vocab_parallel", "replicated", "linear")
KEPT = {  # every loss, and models in which several features meet: what one of them alone has is in these too
    ("gqa", "vocab_parallel"),
    ("kv1", "linear"),
    ("bias", "replicated"),
    ("qk_norm_kv3", "vocab_parallel"),
    ("odd_tied", "linear"),
}


@pytest.mark.parametrize(
    ("name", "loss"), params(product(MODELS, LOSSES), exhaustive=lambda name, loss: (name, loss) not in KEPT)
)
def test_the_check_finds_nothing(name: str, loss: Any) -> None:
    assert check(model(name), Plan.preset("llama-fast", loss), Mesh(tp=4), 2, 16) == []


@pytest.mark.parametrize("key", ["layers.*.input_layernorm", "norm"])
def test_the_check_finds_a_norm_left_out(key: str) -> None:
    plan = Plan.preset("llama-fast", "linear")
    without = replace(plan, modules={k: v for k, v in plan.modules.items() if k != key})
    assert "CR501" in {finding.code for finding in check(model(), without, Mesh(tp=2), 2, 16)}


def test_the_check_finds_a_gather_left_out() -> None:
    plan = Plan.preset("llama-fast", "linear")
    without = replace(plan, modules={k: v for k, v in plan.modules.items() if k != "layers.*.mlp"})
    found = check(model(), without, Mesh(tp=2), 2, 16)
    assert any("fast_gather" in finding.message for finding in found), found


class ConvertingMLP(MLP):
    """Converts its input to its weights' dtype, as models that run under autocast do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.up_proj.weight.dtype).contiguous())


def test_a_gathered_input_may_be_converted_to_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colrow.models.llama.MLP", ConvertingMLP)
    report = verify(Llama(replace(MODELS["kv3"], num_hidden_layers=1)), Plan.preset("llama-fast"), 2, backend="local")
    assert report.ok, report


class AddingMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


def test_another_use_of_a_gathered_input_names_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colrow.models.llama.MLP", AddingMLP)
    (finding,) = check(model(), Plan.preset("llama-fast"), Mesh(tp=2), 2, 16)
    assert finding.where == "layers.0.mlp"
    assert "the module's code uses its mean" in finding.message
