"""CR414: what is not known to be right on a shard is listed; what is right is not."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.composed.truth import truths
from benchmarks.models.examine import build
from colrow.checking.check import Finding, check
from colrow.derive.derivation import derive
from colrow.dryrun.lockstep import unproven_operators
from colrow.dryrun.planned_step import PlannedStep
from colrow.mesh import Mesh
from colrow.plans.plan import Plan
from colrow.sharding.operator_rules import RULES
from helpers import broken_models as m
from helpers import unproven_plans
from helpers.broken_plans import gpt_plan, llama
from helpers.families import FAMILIES, transformers_model
from helpers.harness import Ranks
from helpers.sound_plans import SOUND
from helpers.unproven_models import Case, LoggedMLP, features
from helpers.unproven_plans import OLD_TORCH, RIGHT, WRONG
from helpers.variants import params


def found_by(case: Case) -> list[Finding]:
    return check(case.model().train(case.train), case.plan(), Mesh(tp=2), batch_size=4, seq_len=16)


ALIKE = {  # a kept case walks the same code
    "last token",  # as the first one
    "tokens rolled",  # as tokens shifted; rolls are in "features rolled"
    "features flipped",  # as rolled
    "kth feature",  # as the largest and the median
    "features summed",  # as their norm; sums are in "features normalised by einsum"
    "tokens summed",  # a running sum of a DTensor is in "a cumulative sum of the logits"
    "scores capped",  # as attention written out, with functions of elements as "features clamped"
    "capped logits",  # as "log-probabilities for logits", with the same functions
    "channels of flattened tokens dropped",
    "norm of each group of features, in code with sizes",
    "features at their own positions",
}


@pytest.mark.parametrize("name", params(WRONG, lambda name: name in ALIKE))
def test_a_wrong_plan_is_an_error_or_unproven(name: str) -> None:
    found = found_by(WRONG[name])
    # torch 2.11 cannot run `quantile` on fake tensors, and CR410 says so
    unproven = ("CR414", "CR410") if OLD_TORCH else ("CR414",)
    assert any(f.severity == "error" or f.code in unproven for f in found), [str(f) for f in found]


@pytest.mark.parametrize("name", params(RIGHT, lambda name: name in ALIKE))
def test_a_right_plan_is_proven(name: str) -> None:
    assert [str(f) for f in found_by(RIGHT[name])] == []


def test_what_waits_for_the_collector_of_cycles_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = RIGHT["statistics that nothing needs"]
    gc.disable()
    try:
        assert [str(f) for f in found_by(case)] == []
        monkeypatch.setattr(gc, "collect", lambda: 0)  # the negative control
        assert {f.code for f in found_by(case)} == {"CR414"}
    finally:
        gc.enable()


@pytest.mark.parametrize(("used", "codes"), [(False, [("warning", "CR414")]), (True, [("error", "CR413")])])
def test_a_statistic_that_is_only_logged_is_no_error(used: bool, codes: list[tuple[str, str]]) -> None:
    found = found_by(Case(lambda: m.Gpt(mlp=lambda: LoggedMLP(used))))
    assert [(f.severity, f.code) for f in found] == codes


@pytest.mark.parametrize(
    ("shift", "code"),
    [
        (lambda h: h.flatten().logsumexp(0), "CR414"),
        (lambda h: h.mean(), "CR414"),
        (lambda h: h.mean((1, 2), keepdim=True), "CR414"),
        (lambda h: h.logsumexp(-1, keepdim=True), "CR413"),
        (lambda h: h.mean((-1,), keepdim=True), "CR413"),
    ],
    ids=["flattened", "all", "two dims", "one dim", "one of a list"],
)
def test_a_shift_that_a_norm_of_another_dim_may_take_away_is_no_error(shift: Any, code: str) -> None:
    assert [f.code for f in found_by(features(lambda h: h - shift(h)))] == [code]


@pytest.mark.exhaustive  # the check of `llama-fast` on every model (`styles/test_fast_plan.py`) asks this too
@pytest.mark.parametrize("loss", ["vocab_parallel", "replicated", "linear"])
@pytest.mark.parametrize("name", ["llama-fast", "llama-overlap"])
def test_fast_presets_are_proven(name: str, loss: Any) -> None:
    for model in ("gqa", "qk_norm_kv3", "bias"):
        assert unproven_operators(PlannedStep(llama(model), Plan.preset(name, loss), 4, 2, 16)) == [], model


@pytest.mark.exhaustive  # a derived plan that the check does not prove is given up: `tests/derive` would see it
@pytest.mark.parametrize("family", FAMILIES)
def test_derived_plans_are_proven(family: str) -> None:
    pytest.importorskip("transformers")
    model = transformers_model(family)
    assert unproven_operators(PlannedStep(model, Plan.derive(model, 2), 2, 2, 16)) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("model_type", ["bloom", "codegen", "falcon", "gpt_bigcode"])
def test_plans_of_models_that_cut_their_heads_in_other_ways_are_proven(model_type: str) -> None:
    """Batch and heads in one dim, segments of heads, one k and v head."""
    pytest.importorskip("transformers")
    model, inputs = build(model_type, 2)
    assert unproven_operators(PlannedStep(model, derive(model, 2, inputs=inputs).plan(), 2, inputs=inputs)) == []


FAST_DERIVED = {
    "OPT": {"ffn_dim": 64, "num_hidden_layers": 2, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "GPT2": {"num_hidden_layers": 2, "max_position_embeddings": 64, "tie_word_embeddings": True},
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAST_DERIVED)
def test_a_derived_plan_of_fast_styles_is_proven(family: str) -> None:
    """Of models whose table of positions has all of a sequence's tokens; GPT-2 writes the tokens' number too."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 8}
    config = getattr(transformers, f"{family}Config")(**sizes, **FAST_DERIVED[family])
    model = getattr(transformers, "GPT2LMHeadModel" if family == "GPT2" else "OPTForCausalLM")(config).eval()
    plan = Plan.derive(model, 2, styles="fast")
    assert {"fast_colwise", "fast_shard_tokens"} <= {style.name for style in plan.modules.values()}
    assert unproven_operators(PlannedStep(model, plan, 2, 2, 16)) == []


@dataclass(frozen=True)
class InMode:
    """A case with its model in its mode."""

    case: Case

    def model(self) -> nn.Module:
        return self.case.model().train(self.case.train)

    def plan(self) -> Plan:
        return self.case.plan()


def verdicts(device: str) -> dict[str, str]:
    """What each case is, by the ranks of this group."""
    ids = torch.randint(0, m.V, (2, 8), generator=torch.Generator().manual_seed(0))
    cases = WRONG | RIGHT
    found = truths(device, [(InMode(case), ids) for case in cases.values()])
    return {name: truth.verdict for name, truth in zip(cases, found, strict=True)}


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_the_labels_are_what_two_ranks_compute(ranks: Ranks) -> None:
    found = ranks(2).run(verdicts)[0]
    assert {name for name, verdict in found.items() if verdict == "right"} == RIGHT.keys()
    assert {name for name, verdict in found.items() if verdict == "wrong"} == WRONG.keys()


def test_a_finding_names_the_operator_the_dim_and_the_line() -> None:
    (found,) = found_by(WRONG["features rolled"])
    line = f"unproven_plans.py:{_line_of('features rolled')}"
    assert (found.code, found.severity, found.where) == ("CR414", "warning", "blocks.0.mlp")
    assert found.message.startswith(f"roll on a shard of dim 2 at {line} is not proven: ")


@pytest.mark.parametrize(
    ("function", "fix"),
    [
        (lambda h: h * h.detach().abs().mean().item(), "compute with tensors"),
        (lambda h: torch.nested.as_nested_tensor(list(h), layout=torch.jagged).values().view(h.shape), "pad the sequ"),
    ],
    ids=["item", "nested"],
)
def test_code_that_needs_values_is_told_what_helps(function: Callable[[Tensor], Tensor], fix: str) -> None:
    found = found_by(features(function))
    assert not any(f.severity == "error" for f in found)
    assert [fix in f.fix for f in found if f.code == "CR410"] == [True]


def _line_of(text: str) -> int:
    lines = Path(unproven_plans.__file__).read_text(encoding="utf-8").splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_a_hook_in_a_custom_backward_is_traced_to_its_line() -> None:
    found = found_by(WRONG["backward normalises"])
    assert all(".mlp" in f.where and "unproven_models.py" in f.message for f in found)


def test_what_follows_an_unproven_operator_is_not_listed() -> None:
    found = unproven_operators(PlannedStep(WRONG["norm of features"].model(), gpt_plan(), 2, 4, 16))
    assert [f.operator for f in found] == ["linalg_vector_norm"]


@pytest.mark.parametrize("weigh", [lambda i: 1, lambda i: i + 1], ids=["alike", "by their number"])
def test_blocks_of_a_shard_are_left_to_verify(weigh: Callable[[int], int]) -> None:
    """Used alike they are right, by their number they are not; neither are they fused parts (CR208)."""

    def in_blocks(h: Tensor) -> Tensor:
        return torch.cat([F.normalize(t, dim=-1) * weigh(i) for i, t in enumerate(h.split(8, -1))], -1)

    assert {f.code for f in found_by(features(in_blocks))} == {"CR414"}


class _Keeping(nn.Module):
    """Scales by what it has kept of the forward before."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones(())

    def forward(self, h: Tensor) -> Tensor:
        scale, self.kept = self.kept, h.detach().norm()
        return h * scale


def test_what_is_kept_for_the_next_forward_is_unproven() -> None:
    case = features(_Keeping())
    assert {f.operator for f in unproven_operators(PlannedStep(case.model(), gpt_plan(), 2, 4, 16))} == {
        "linalg_vector_norm"
    }


@pytest.mark.parametrize("rule", ["slice", "_scaled_dot_product_flash_attention_for_cpu"])
def test_without_its_rule_a_right_plan_is_unproven(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: these rules are what proves them."""
    monkeypatch.delitem(RULES, rule)
    case = Case(*SOUND["heads"]) if "attention" in rule else RIGHT["every other feature"]
    names = {f.operator for f in unproven_operators(PlannedStep(case.model(), case.plan(), 2, 2, 16))}
    assert rule in {name.removesuffix("_backward") for name in names}


def test_the_model_is_left_alone() -> None:
    model = RIGHT["hook on a gradient"].model()
    before = copy.deepcopy(model.state_dict())
    unproven_operators(PlannedStep(model, gpt_plan(), 2, 2, 16))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(mod._forward_hooks or mod._forward_pre_hooks for mod in model.modules())
    assert all(param.grad is None for param in model.parameters())


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(m.D, m.D)

    def forward(self, x: Any) -> Any:
        return self.up(x) if x.sum().item() > 0 else x


def test_a_model_that_does_not_run_on_fake_tensors_is_unproven() -> None:
    (found,) = unproven_operators(PlannedStep(_Counting(), Plan({"up": "colwise"}), 2, 2, 16))
    assert found.reason.startswith("the unsharded run raises DataDependentOutputException")
