"""`loss: linear`: the head returns the loss, under FSDP2 and tied embeddings too, and says when it cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from colrow.errors import PlanError
from colrow.parallel.loss import model_loss
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from helpers.fsdp_parity import fsdp_case
from helpers.harness import Ranks
from helpers.parity import batch, build, cross_entropy, relative, tp_mesh

TOLERANCE = 1e-10


@pytest.mark.distributed
@pytest.mark.parametrize("degrees", [{"tp": 2, "dp_shard": 2}, {"dp_shard": 4}], ids=str)
@pytest.mark.parametrize("name", ["gqa", "tied"])
def test_gradients_under_fsdp_equal_one_process(ranks: Ranks, degrees: dict[str, int], name: str) -> None:
    for errors in ranks(4).run(fsdp_case, degrees, name, "llama", 2):
        assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


def contract_case(device: str) -> dict[str, Any]:
    mesh = tp_mesh(device, 2)
    reference, plan = build("gqa", device), Plan.preset("llama", "linear")
    model = parallelize(copy.deepcopy(reference), plan, mesh)
    ids, targets = batch(device)
    with pytest.raises(PlanError) as missing:
        model(ids)
    with torch.no_grad():
        logits = model(ids)
        assert not isinstance(logits, DTensor)
        evaluated = model_loss(model, plan, mesh, ids, targets)
        want = cross_entropy(reference(ids), targets)
    plain = parallelize(copy.deepcopy(reference), Plan.preset("llama"), mesh)
    with pytest.raises(PlanError) as no_head:
        model_loss(plain, plan, mesh, ids, targets)
    return {
        "missing": str(missing.value),
        "no_head": str(no_head.value),
        "logits": relative(logits, reference(ids).detach()),
        "evaluated": relative(evaluated, want),
    }


@pytest.mark.distributed
def test_the_head_says_what_it_needs(ranks: Ranks) -> None:
    for found in ranks(2).run(contract_case):
        assert "colrow.model_loss" in found["missing"]
        assert "linear_head" in found["no_head"]
        assert found["logits"] < TOLERANCE
        assert found["evaluated"] < TOLERANCE


def test_a_linear_head_needs_a_linear_loss() -> None:
    modules = {"lm_head": "linear_head"}
    with pytest.raises(PlanError, match="make it linear"):
        Plan(modules=modules, loss="replicated").check_shapes(build("gqa", "cpu"), 1)


def test_the_preset_is_data() -> None:
    plan = Plan.preset("llama", "linear")
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert plan.parameters(build("gqa", "cpu"), 4)["lm_head.weight"].local_shape == (16, 48)
