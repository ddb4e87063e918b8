"""A derived plan is one that the check does not refuse: what fails is given up, with the reason."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.checking.check import Findings, check
from colrow.checking.finding import Finding, finding
from colrow.derive import derivation, gathered, judged
from colrow.derive.derivation import derive
from colrow.derive.judged import Objection
from colrow.derive.trace import Trace, default_inputs, trace
from colrow.dryrun.planned_step import PlannedStep
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.plans.derive_options import DeriveOptions
from colrow.plans.plan import Plan
from colrow.verifying.report import Report
from helpers import broken_models as m
from helpers.unproven_models import FeatureMLP, NormalisedGradient


@pytest.fixture(scope="module")
def traced() -> tuple[nn.Module, Trace]:
    model = m.Gpt(layers=1)
    return model, trace(model, default_inputs(model, 2))


def sharded_modules(plan: Plan, model: nn.Module) -> set[str]:
    layouts = plan.parameters(model, 2)
    return {name.rpartition(".")[0] for name, layout in layouts.items() if layout.placement.is_shard()}


def test_the_classes_of_the_modules_at_fault_are_given_up(traced: tuple[nn.Module, Trace]) -> None:
    model, graph = traced

    def judge(plan: Plan) -> Objection | None:
        bad = "blocks.0.mlp.up" in sharded_modules(plan, model)
        return Objection("CR414 at blocks.*.mlp: nobody knows", ("blocks.*.mlp",)) if bad else None

    found = derive(model, 2, traced=graph, judge=judge)
    assert sharded_modules(found.plan(), model) == {"embed", "head", "blocks.0.attn.qkv", "blocks.0.attn.out"}
    assert found.sequence_parallel
    assert found.refused == {"blocks.*.mlp": "CR414 at blocks.*.mlp: nobody knows"}
    assert found.plan().notes["blocks.*.mlp"] == "CR414 at blocks.*.mlp: nobody knows"
    assert "nobody knows" in found.replicated["blocks.0.mlp.up.weight"]


def test_where_an_error_names_no_module_the_class_at_fault_is_found(traced: tuple[nn.Module, Trace]) -> None:
    model, graph = traced

    def judge(plan: Plan) -> Objection | None:
        bad = "blocks.0.mlp.up" in sharded_modules(plan, model)
        return Objection("CR401 at backward: it fails", ("backward",)) if bad else None

    found = derive(model, 2, traced=graph, judge=judge, options=DeriveOptions(sequence_parallel=False))
    sharded = sharded_modules(found.plan(), model)
    assert sharded == {"embed", "head", "blocks.0.attn.qkv", "blocks.0.attn.out", "blocks.0.mlp.down"}
    assert "it fails" in found.replicated["blocks.0.mlp.up.weight"]


@pytest.mark.exhaustive
def test_sequence_shards_are_given_up_first(traced: tuple[nn.Module, Trace]) -> None:
    model, graph = traced
    objection = Objection("CR414 at blocks.0: tokens meet", ("blocks.0",))
    found = derive(model, 2, traced=graph, judge=lambda plan: objection if plan.sequence_parallel() else None)
    assert not found.sequence_parallel
    assert "blocks.0.mlp.up" in sharded_modules(found.plan(), model)
    assert "no sequence shards: CR414 at blocks.0: tokens meet" in found.notes


@pytest.mark.exhaustive
def test_where_all_fails_nothing_is_split(traced: tuple[nn.Module, Trace]) -> None:
    model, graph = traced

    def judge(plan: Plan) -> Objection | None:
        return Objection("CR999 at model: no", ("model",)) if plan.modules else None

    assert derive(model, 2, traced=graph, judge=judge).plan().modules == {}
    with pytest.raises(PlanError, match=r"gets no fast styles.*CR999 at model: no"):
        derive(model, 2, traced=graph, judge=judge, options=DeriveOptions(styles="fast"))


@pytest.mark.exhaustive
def test_many_that_fail_one_after_another_end_in_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = m.Gpt(layers=1), list[int]()

    def judge(plan: Plan) -> Objection | None:
        bad = sorted(sharded_modules(plan, model))
        seen.append(len(bad))
        return Objection(f"CR414 at {bad[0]}: no", (bad[0],)) if bad else None

    monkeypatch.setattr(derivation, "ATTEMPTS", 1)
    found = derive(model, 2, judge=judge, options=DeriveOptions(sequence_parallel=False))
    assert found.plan().modules == {}
    assert (
        len(seen) == 2 + 2 * gathered.ATTEMPTS
    )  # in the end each layer alone, with its output, then its parameters gathered
    assert seen[0] > seen[1] > 0


def test_a_place_concerns_what_is_in_it_and_what_holds_it() -> None:
    objection = Objection("", ("blocks.*.mlp", "norm.weight"))
    concerned = ("blocks.3.mlp.up.weight", "blocks.0.mlp.scale", "norm.bias")
    assert all(map(objection.concerns, concerned))
    assert not any(map(objection.concerns, ("blocks.0.attn.q.weight", "blocks.0.mlp2.up.weight", "head.weight")))


def found_by(code: str) -> Finding:
    return finding(code, "blocks.*.mlp", "it is off", "")


@pytest.mark.parametrize(
    ("codes", "verdict", "why"),
    [
        ([], None, None),
        (["CR408"], None, None),
        (["CR501", "CR414"], None, "CR501 at blocks.*.mlp: it is off"),
        (["CR414"], "wrong", "CR414 at blocks.*.mlp: it is off; verify: shifted"),
        (["CR410"], "wrong", "CR410 at blocks.*.mlp: the check cannot run it; verify: shifted"),
        (["CR401"], None, "CR401 at blocks.*.mlp: its code fails on the shards that enter it"),
        (["CR414"], "inconclusive", None),
        (["CR414"], "proved", None),
        (["CR414"], "impossible", None),
    ],
)
def test_what_is_objected_to(codes: list[str], verdict: Any, why: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def prove(*args: Any, **options: Any) -> Report:
        assert verdict is not None, "no proof is due"
        if verdict == "impossible":
            raise PlanError("too large")
        return Report(verdict, 2, "local", 1, 1e-9, None, 0.0, cause="shifted")

    monkeypatch.setattr(judged, "prove", prove)
    findings = Findings(found_by(code) for code in codes)
    found = judged.judgement(PlannedStep(m.Gpt(layers=1), Plan({}), 2, 2, 16), findings)
    assert (found.objection and found.objection.why) == why
    assert [f.code for f in found.findings] == codes
    assert (found.report and found.report.verdict) == (None if verdict == "impossible" else verdict)


class TwoStreams(nn.Module):
    """What feeds the LSTM is split by its features; the LSTM itself gets gathered shards."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.lstm = nn.Linear(32, 64), nn.Linear(64, 32), nn.LSTM(32, 64, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.down(nn.functional.gelu(self.up(x))))[0]


@pytest.mark.parametrize("verdict", ["proved", "wrong"])
def test_the_plan_that_comes_out_is_proved_and_those_on_the_way_only_where_it_is_wrong(
    verdict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved: list[set[str]] = []

    def prove(step: PlannedStep, **options: Any) -> Report:
        proved.append(set(step.plan.modules))
        return Report(verdict if step.plan.modules else "proved", 2, "local", 1, 1e-9, None, 0.0, cause="shifted")

    monkeypatch.setattr(judged, "check_step", lambda *args, **options: Findings([found_by("CR414")]))
    monkeypatch.setattr(judged, "prove", prove)
    found = judged.derive_judged(TwoStreams(), 2, inputs=(torch.randn(3, 10, 32),))
    assert {"up", "down", "lstm"} <= proved[0]
    if verdict == "proved":
        assert [set(found.plan().modules)] == proved
    else:
        assert {"up", "down"} in proved[1:]
        assert found.plan().modules == {}


@pytest.mark.exhaustive
def test_what_a_trace_cannot_see_is_found_by_the_proof() -> None:
    """A custom backward that takes a norm over a shard: the loss is exact. It gets all features, gathered."""
    model = m.Gpt(mlp=lambda: FeatureMLP(NormalisedGradient.apply), layers=1)
    assert "blocks.0.mlp.up" in sharded_modules(derive(model, 2).plan(), model)
    plan = Plan.derive(model, 2)
    gathered = {"blocks.0.mlp.up", "blocks.0.mlp.down"}
    assert sharded_modules(plan, model) == {"embed", "head", "blocks.0.attn.qkv", "blocks.0.attn.out"} | gathered
    assert all(getattr(style, "gather", False) for key, style in plan.modules.items() if ".mlp." in key)
    assert "verify: the loss is exact and some gradients are wrong" in plan.notes["blocks.0.mlp"]
    assert [f.code for f in check(model, plan, Mesh(tp=2), 2, 16)] == []
    assert not torch.distributed.is_initialized()


def test_cycles_are_collected_seldom_in_a_derivation_and_as_before_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before, within = gc.get_threshold(), list[int]()

    def fails(*_: object, **__: object) -> None:
        within.append(gc.get_threshold()[0])
        raise PlanError("no plan")

    monkeypatch.setattr(judged, "derive", fails)
    with pytest.raises(PlanError):
        judged.derive_judged(nn.Linear(2, 2), 2)
    assert within == [judged.COLLECT_AFTER] > [before[0]]
    assert gc.get_threshold() == before
