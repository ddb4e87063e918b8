"""What a user wants unsharded stays so, and what must be split is split, or refused with the reason."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.config_sections import DeriveSection
from colrow.derive.derivation import derive
from colrow.derive.judged import Objection
from colrow.derive.requests import Requests
from colrow.derive.trace import Trace, default_inputs, trace
from colrow.errors import ConfigError, PlanError
from colrow.plans.derive_options import DeriveOptions
from colrow.plans.named import named_plan
from colrow.plans.plan import Plan
from colrow.verifying.verify import verify
from helpers import broken_models as m


@functools.cache
def traced() -> tuple[nn.Module, Trace]:
    model = m.Gpt(layers=1)
    return model, trace(model, default_inputs(model, 2))


def derived(**requests: Any) -> Plan:
    model, graph = traced()
    return derive(model, 2, traced=graph, options=DeriveOptions(**requests)).plan()


def split(plan: Plan) -> set[str]:
    layouts = plan.parameters(traced()[0], 2)
    return {name.removesuffix(".weight") for name, layout in layouts.items() if layout.placement.is_shard()}


ALL = {"embed", "head", *(f"blocks.0.{name}" for name in ("attn.qkv", "attn.out", "mlp.up", "mlp.down"))}


def test_what_is_kept_stays_unsharded_with_what_shares_its_heads() -> None:
    assert split(derived()) == ALL
    plan = derived(keep_whole=("blocks.*.attn.qkv", "head.weight"))
    assert split(plan) == {name for name in ALL if "attn" not in name} - {"head"}
    assert "keep_whole='blocks.*.attn.qkv' requests" in plan.notes["blocks.0.attn.out.weight"]


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (["blocks.*.mlp"], {"blocks.0.mlp.up.weight", "blocks.0.mlp.down.weight"}),
        (["blocks.*.m*.up", "h*"], {"blocks.0.mlp.up.weight", "head.weight"}),
        ([""], {name for name, _ in m.Gpt(layers=1).named_parameters()}),
    ],
)
def test_a_pattern_names_parameters_and_modules_that_hold_them(patterns: list[str], kept: set[str]) -> None:
    found = Requests.of(traced()[0], DeriveOptions(keep_whole=tuple(patterns)))
    assert found.kept.keys() == kept


def test_a_plan_with_requests_is_right() -> None:
    plan = Plan.derive(traced()[0], 2, keep_whole=["blocks.*.attn", "embed"], split=["blocks.*.mlp"])
    assert split(plan) == {name for name in ALL if "attn" not in name} - {"embed"}
    assert verify(traced()[0], plan, 2).ok


class Products(nn.Module):
    """Each matrix can be split by one of its two dimensions, beside a neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 32), nn.Linear(32, 16), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).relu())


@pytest.mark.parametrize("requests", [(), ("first",)])
def test_what_must_be_split_comes_before_what_is_larger(requests: tuple[str, ...]) -> None:
    found = derive(Products(), 2, inputs=(torch.zeros(3, 34, 8),), options=DeriveOptions(split=requests))
    assert ("first.weight" in found.sharded) is bool(requests)


@pytest.mark.parametrize(
    ("requests", "words"),
    [
        ({"split": ("norm",)}, r"split='norm': norm.weight cannot be split over tp=2: .*normalised over"),
        ({"split": ("blocks.*.mlp",), "keep_whole": ("blocks.0.mlp.up",)}, "by keep_whole .* and by split"),
        (
            {"split": ("blocks.*.mlp.down",), "keep_whole": ("blocks.0.mlp.up",)},
            r"blocks.0.mlp.down.weight cannot be split over tp=2: .*keep_whole='blocks.0.mlp.up'",
        ),
        ({"keep_whole": ("blocks.*.atn",)}, r"keep_whole: 'blocks.\*.atn' matches no .*mean 'blocks.\*.attn'"),
        ({"split": ("blocks",), "styles": "fast", "keep_whole": ("head.bias",)}, "keep_whole: 'head.bias' matches no"),
    ],
)
def test_what_would_be_wrong_is_refused(requests: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        derived(**requests)


@pytest.mark.exhaustive
def test_a_request_that_the_judge_objects_to_is_refused() -> None:
    model, graph = traced()

    def judge(plan: Plan) -> Objection | None:
        return Objection("CR414 at blocks.*.mlp: no", ("blocks.*.mlp",)) if "blocks.0.mlp.up" in split(plan) else None

    with pytest.raises(PlanError, match=r"blocks.0.mlp.up.weight cannot be split over tp=2: .*CR414 at blocks"):
        derive(model, 2, traced=graph, judge=judge, options=DeriveOptions(split=("blocks.*.mlp",)))


def test_only_a_derived_plan_takes_requests() -> None:
    with pytest.raises(ConfigError, match="keep_whole and split are requests to a derived plan, and plan is llama"):
        named_plan("llama", traced()[0], 2, requests=DeriveSection(keep_whole=("head",)))
