"""A fix that is printed works: it was tried against all constraints, not only the one that failed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import yaml
from torch import nn

from colrow.checking.check import check_static, check_step
from colrow.checking.degrees import plan_degrees
from colrow.checking.tried import with_tried_fixes
from colrow.dryrun.planned_step import PlannedStep
from colrow.errors import ConfigError, did_you_mean
from colrow.mesh import Mesh
from colrow.models.llama import Llama, LlamaConfig
from colrow.plans.patterns import nearest
from colrow.plans.plan import Plan
from helpers.broken_plans import BROKEN


def llama(**changes: int) -> Llama:
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 1, "head_dim": 12}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64}
    with torch.device("meta"):
        return Llama(LlamaConfig(**{**sizes, **changes}))  # type: ignore[arg-type]


def degrees_in(text: str) -> list[int]:
    (listed,) = re.findall(r"choose tp from ([\d, ]+)", text)
    return [int(n) for n in listed.split(",") if n.strip()]


@pytest.mark.parametrize(
    ("changes", "tp", "legal"),
    [
        ({}, 3, [1, 2, 4, 8]),  # the widths allow 3, the heads do not
        ({"intermediate_size": 102}, 4, [1, 2]),  # 17 × 6: the heads allow 4 and 8
        ({"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 16}, 4, [1, 2, 3, 6]),
        ({"vocab_size": 10}, 16, [1, 2, 4]),  # more ranks than rows come out without any
    ],
)
def test_degrees_fit_the_complete_plan(changes: dict[str, int], tp: int, legal: list[int]) -> None:
    model, plan = llama(**changes), Plan.preset("llama")
    found = [f for f in check_static(model, plan, tp, 48 * tp) if f.severity == "error"]
    assert found
    advised = [degrees_in(f.fix) for f in found]
    assert all(degrees == advised[0] for degrees in advised)
    assert set(legal) <= set(advised[0])
    for degree in advised[0]:
        assert not [f for f in check_static(model, plan, degree, 48 * degree) if f.severity == "error"]
        assert degree in plan_degrees(model, plan)


def test_no_degree_is_invented() -> None:
    found = check_static(llama(num_attention_heads=7, num_key_value_heads=7, head_dim=14), Plan.preset("llama"), 2, 64)
    assert {f.fix for f in found if f.code == "CR202"} == {
        "no tp above 1 fits all modules of this plan: leave modules out of it, or use plan: derive"
    }


def test_a_preset_of_another_model_is_one_finding() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer = nn.ModuleList([nn.Linear(4, 4)])

    (found,) = [f for f in check_static(Other(), Plan.preset("llama"), 2, 64) if f.code == "CR101"]
    assert "keys match no module" in found.message
    assert "plan: derive" in found.fix


def test_the_name_of_another_key_is_not_suggested() -> None:
    plan = Plan.preset("llama")
    plan = replace(plan, modules={**plan.modules, "layers.*.mlp.up_porj": "colwise", "layers.7.mlp.up_proj": "colwise"})
    found = [f for f in check_static(llama(), plan, 2, 64) if f.code == "CR101"]
    assert all("remove it: the nearest name" in f.fix and "'layers.*.mlp.up_proj'" in f.fix for f in found)
    assert len(found) == 2
    (alone,) = [f for f in check_static(llama(), Plan({"norn": "sequence"}), 2, 64) if f.code == "CR101"]
    assert alone.fix == "use 'norm'"


def test_meshes_are_listed_only_if_they_run() -> None:
    with pytest.raises(ConfigError, match=r"meshes that fit: .*tp 3") as unfiltered:
        Mesh(tp=2).require_world_size(3)
    with pytest.raises(ConfigError) as caught:
        Mesh(tp=2).require_world_size(3, lambda mesh: 8 % mesh.tp == 0)
    assert "tp 3" in str(unfiltered.value)
    assert "tp 3" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("stepz", ["steps", "lr"], "steps"),
        ("pt", ["tp", "pp"], "tp"),
        ("q_porj", ["q_proj", "k_proj"], "q_proj"),
        ("learning_rate", ["lr", "min_lr_ratio", "warmup_steps"], None),
        ("dropout", ["decay_steps", "compile"], None),
    ],
)
def test_only_near_names_are_suggested(name: str, known: list[str], hint: str | None) -> None:
    assert (f"did you mean {hint!r}" in did_you_mean(name, known)) == (hint is not None)
    if len(name) > 2:
        assert nearest(name, known) == hint


FOLLOWED = ("colwise on a norm", "kv_replicate on embedding", "batch norm of sequence shards", "mlp output whole")


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", FOLLOWED)
def test_a_fix_that_is_followed_to_the_letter_ends_the_finding(name: str) -> None:
    case = BROKEN[name]
    step = PlannedStep(case.model(), case.plan(), 4, 2, 16)
    found = next(f for f in with_tried_fixes(step, check_step(step)) if f.code == case.code)
    place, style = re.fullmatch(r"give (.+?) the style (.+)", found.fix).groups()  # type: ignore[union-attr]
    place = found.where if place == "the module" else place
    followed = replace(step.plan, modules={**step.plan.modules, place: yaml.safe_load(style)})
    assert not [f for f in check_step(replace(step, plan=followed)) if f.severity == "error"]


@pytest.mark.exhaustive
def test_a_change_that_does_not_help_is_not_advised() -> None:
    """The buffer's module holds norms that stand on shards: it cannot get the complete tensor."""
    case = BROKEN["moving average of sequence shards"]
    step = PlannedStep(case.model(), case.plan(), 4, 2, 16)
    (found,) = [f for f in with_tried_fixes(step, check_step(step)) if f.code == "CR415"]
    assert "style" not in found.fix
