"""The function by which `colrow train` decides: no wrong plan is accepted, whether the check sees it or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.checking.check import Findings
from colrow.checking.finding import finding
from colrow.derive.judged import Judgement
from colrow.mesh import Mesh
from colrow.plans.plan import Plan, is_preset
from colrow.run import decision
from colrow.run.decision import Decision, Start, decide, is_own
from colrow.verifying.report import Report
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan, llama, preset
from helpers.unproven_models import FeatureMLP
from helpers.variants import params


def decided(model: nn.Module, plan: Plan, tp: int = 2, **options: Any) -> Decision:
    start = {key: options.pop(key) for key in ("judgement", "proofs", "say") if key in options}
    return decide(model, plan, Mesh(tp=tp), 2, 16, start=Start(**start), **options)


def normalised(h: Tensor) -> Tensor:
    return h / h.norm(dim=-1, keepdim=True)


def gpt(function: Callable[[Tensor], Tensor] | None = None) -> m.Gpt:
    return m.Gpt(mlp=m.MLP if function is None else lambda: FeatureMLP(function), layers=1)


def test_a_users_model_starts_when_its_plan_is_proved() -> None:
    said: list[str] = []
    seen = decided(gpt(), gpt_plan(), say=said.append, name="mine:build")
    assert seen.accepted
    assert seen.report is not None
    assert seen.report.verdict == "proved"
    assert said[0] == "mine:build is a model that nobody here has seen: a reduced model is verified at tp=2, in seconds"
    assert said[1].startswith("proved: loss and 12 gradients are those of one process (")


@pytest.mark.parametrize("check", params([True, False], lambda check: check))
def test_a_wrong_plan_is_refused_with_the_check_or_without(check: bool) -> None:
    seen = decided(gpt(normalised), gpt_plan(), stop_on_errors=check, name="mine:build")
    assert not seen.accepted
    assert seen.report is not None
    assert seen.report.verdict == "wrong"
    assert [f.code for f in seen.findings] == (["CR414"] if check else [])
    assert seen.refusal.startswith("plan gpt for mine:build at tp=2 is wrong, and nothing was started\n  what  ")
    assert ("linalg_vector_norm on a shard of dim 2 at test_decision.py" in seen.refusal) is check
    assert max(map(len, seen.refusal.partition("\nwarning")[0].splitlines())) <= 80


class FromLength(m.MLP):
    """Rolls its features where it gets more than 64 tokens, or multiplies them by the unit matrix at any length."""

    def __init__(self, rolls: bool) -> None:
        super().__init__()
        self.rolls = rolls

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        if not self.rolls:
            return self.down(h @ torch.eye(h.shape[-1], dtype=h.dtype))
        return self.down(h.roll(1, -1) if h.shape[1] > 64 else h)


@pytest.mark.parametrize(("rolls", "lengths"), [(True, [(1, 64), (1, 96)]), (False, [(1, 64)])])
def test_what_runs_on_long_sequences_alone_is_verified_on_them(
    rolls: bool, lengths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    verified = []

    def verify(*args: Any, batch_size: int, seq_len: int, **options: Any) -> Report:
        verified.append((batch_size, seq_len))
        return Report("proved", 2, "local", 12, 1e-9, None, 0.0)

    monkeypatch.setattr("colrow.derive.proof.verify", verify)
    model = m.Gpt(mlp=lambda: FromLength(rolls), layers=1)
    assert decide(model, gpt_plan(), Mesh(tp=2), 1, 96).findings == ()
    assert verified == lengths


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_what_is_wrong_on_long_sequences_alone_is_refused() -> None:
    model = m.Gpt(mlp=lambda: FromLength(rolls=True), layers=1)
    assert decide(model, gpt_plan(), Mesh(tp=2), 2, 96).report.verdict == "wrong"  # type: ignore[union-attr]
    assert decide(model, gpt_plan(), Mesh(tp=2), 2, 64).accepted


class Fails:
    """Stands for the proof: is never to be called."""

    def __call__(self, *args: Any, **options: Any) -> Report:
        raise AssertionError("verified")


@pytest.mark.parametrize("name", params(["llama", "llama-fast"], lambda name: name == "llama-fast"))
def test_the_projects_own_models_do_not_pay_for_a_proof(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "prove", Fails())
    assert decided(llama(), Plan.preset(name)).accepted
    assert "AssertionError: verified" in decided(llama(), Plan.preset(name), verify="always").refusal
    monkeypatch.setattr(decision, "check_step", Fails())
    assert decided(llama(), Plan.preset(name), stop_on_errors=False).accepted
    assert decided(gpt(), gpt_plan(), tp=1).accepted, "nothing is split"


def test_an_unproven_operator_in_a_model_of_the_projects_own_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "prove", Fails())
    model = llama()
    assert is_own(model)
    assert not is_own(gpt())
    model.norm.register_forward_hook(lambda module, args, out: out * 2)  # type: ignore[union-attr]
    assert not is_own(model)
    unproven = llama()
    unproven.layers[0].mlp.forward = lambda x: x.roll(1, dims=1)  # type: ignore[union-attr,index]
    assert not is_own(unproven)
    assert is_preset(Plan.preset("llama-overlap", "linear"))
    assert not is_preset(preset(drop="norm"))


def test_without_a_proof_only_never_starts() -> None:
    said: list[str] = []
    assert decided(gpt(normalised), gpt_plan(), verify="never", say=said.append).accepted
    assert said == []
    with torch.device("meta"):
        huge = nn.Sequential(nn.Embedding(100_000, 4096), nn.Linear(4096, 100_000))
    seen = decided(huge, Plan({"1": {"style": "colwise", "output": "replicate"}}), say=said.append)
    assert not seen.accepted
    assert "Sequential has 819 million parameters" in seen.refusal
    assert "model.reduced: package.module:callable" in seen.refusal
    assert "verify: never" in seen.refusal


class Jagged(m.MLP):
    """Its tokens are one short sequence and one long one inside, in a nested tensor."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        ends = torch.tensor([0, 3, x.shape[0] * x.shape[1]])
        inside = torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), ends)
        return self.down(self.function(self.up(inside))).values().view_as(x)


@pytest.mark.exhaustive
def test_nested_tensors_in_a_local_block_are_proved() -> None:
    styles = {
        "blocks.*.mlp": {"style": "local_block", "input": ["replicate"], "output": ["replicate"]},
        "blocks.*.mlp.up": "packed_colwise",
        "blocks.*.mlp.down": {"style": "packed_rowwise", "output": "partial"},
    }
    plan = gpt_plan()
    plan = replace(plan, modules={**plan.modules, **Plan(styles).modules})
    for function, right in ((F.gelu, True), (lambda h: h.softmax(-1), False)):
        seen = decided(m.Gpt(mlp=lambda function=function: Jagged(function), layers=1), plan)
        assert seen.accepted is right
        assert ("CR410" in [f.code for f in seen.findings]) is not right


class Alone(nn.Module):
    """A parameter that nothing can break: a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_what_a_proof_cannot_tell_is_refused() -> None:
    seen = decided(Alone(), Plan({}), inputs=(torch.randn(2, 4, m.D),))
    assert seen.report is not None
    assert seen.report.verdict == "inconclusive"
    assert "none in plans broken on purpose either" in seen.refusal
    assert "model.reduced" in seen.refusal


class Memory:
    """Proofs in a list."""

    def __init__(self) -> None:
        self.kept: list[Report] = []

    def find(self, say: Callable[[str], None]) -> bool:
        return bool(self.kept)

    def keep(self, report: Report) -> None:
        self.kept.append(report)


def test_a_kept_proof_is_used_and_only_proofs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter(("wrong", "inconclusive", "proved"))
    made: list[str] = []

    def prove(*args: Any, **options: Any) -> Report:
        made.append(next(verdicts))
        return Report(made[-1], 2, "local", 12, 1e-9, None, 0.1)  # type: ignore[arg-type]

    monkeypatch.setattr(decision, "prove", prove)
    monkeypatch.setattr(decision, "check_step", lambda *args, **options: Findings())
    memory = Memory()
    accepted = [decided(gpt(), gpt_plan(), proofs=memory).accepted for _ in range(4)]
    assert accepted == [False, False, True, True]
    assert made == ["wrong", "inconclusive", "proved"]
    assert [report.verdict for report in memory.kept] == ["proved"]


@pytest.mark.parametrize(("codes", "vary"), [((), False), (("CR414",), True), (("CR410",), True)])
def test_what_is_unproven_is_compared_with_other_values(
    monkeypatch: pytest.MonkeyPatch, codes: tuple[str, ...], vary: bool
) -> None:
    asked: list[bool] = []

    def prove(*args: Any, vary: bool, **options: Any) -> Report:
        asked.append(vary)
        return Report("proved", 2, "local", 12, 1e-9, None, 0.1)

    monkeypatch.setattr(decision, "prove", prove)
    found = Findings(finding(code, "blocks.0", "a message", "a fix") for code in codes)
    monkeypatch.setattr(decision, "check_step", lambda *args, **options: found)
    assert decided(gpt(), gpt_plan()).accepted
    assert asked == [vary]


def test_a_model_that_raises_in_training_is_not_proved_by_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    proof = Report("proved", 2, "local", 12, 1e-9, None, 0.1)
    in_eval = replace(proof, modes=("eval",), training_failure="RuntimeError: no labels")
    monkeypatch.setattr(decision, "prove", lambda *args, **options: in_eval)
    monkeypatch.setattr(decision, "check_step", lambda *args, **options: Findings())
    assert "in training mode the model itself raises RuntimeError: no labels" in decided(gpt(), gpt_plan()).refusal
    monkeypatch.setattr(decision, "prove", lambda *args, **options: proof)
    assert decided(gpt(), gpt_plan()).accepted


def test_what_a_derivation_has_proved_is_not_proved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("judged already")

    monkeypatch.setattr(decision, "check_step", never)
    monkeypatch.setattr(decision, "prove", never)
    memory = Memory()
    report = Report("proved", 2, "local", 12, 1e-9, None, 0.1)
    judgement = Judgement(None, Findings(), report)
    assert decided(gpt(), gpt_plan(), proofs=memory, judgement=judgement).report is report
    assert memory.kept == [report]
    assert not decided(gpt(), gpt_plan(), judgement=judgement, verify="always").accepted  # `never` was called
    assert not decided(gpt(), gpt_plan(), judgement=Judgement(None, Findings())).accepted


@pytest.mark.exhaustive  # that such a model is no own one is asserted above; that a wrong one is refused, too
def test_tokens_that_a_hook_mixes_in_a_model_of_the_projects_own_are_seen() -> None:
    model = llama()
    model.layers[0].register_forward_hook(lambda module, args, out: out.roll(1, dims=1))  # type: ignore[union-attr,index]
    assert not decided(model, Plan.preset("llama")).accepted
