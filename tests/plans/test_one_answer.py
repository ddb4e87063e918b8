"""One function answers each question about a plan; each of these tests fails for one of the answers that there were."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle

from colrow.checking.check import check
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.parallel.parallelize import split_ties
from colrow.plans.patterns import matches, with_stars
from colrow.plans.plan import Plan
from colrow.styles.base import Style
from colrow.styles.site import Site
from helpers.parity import MODELS


def meta(name: str = "gqa") -> Llama:
    with torch.device("meta"):
        return Llama(MODELS[name])


def codes(model: nn.Module, plan: Plan, tp: int = 2, seq_len: int = 16) -> set[str]:
    return {finding.code for finding in check(model, plan, Mesh(tp=tp), 2, seq_len)}


def test_norms_of_style_grad_sum_leave_a_plan_sequence_parallel() -> None:
    plan = Plan.preset("llama")
    norms = {
        key: {"style": "grad_sum"} if isinstance(style, type(plan.modules["norm"])) else style
        for key, style in plan.modules.items()
    }
    changed = replace(plan, modules=norms)
    assert changed.sequence_parallel()
    assert "CR205" in codes(meta(), changed, seq_len=15)
    assert not Plan(modules={"layers.*.mlp.up_proj": "colwise"}).sequence_parallel()


@pytest.mark.parametrize(
    ("name", "stars"), [("layers.3.mlp", "layers.*.mlp"), ("0.weight", "*.weight"), ("h.10", "h.*"), ("l2.w", "l2.w")]
)
def test_a_number_becomes_a_star(name: str, stars: str) -> None:
    assert with_stars(name) == stars
    assert matches(stars, name)


def test_tied_weights_whose_rows_differ_are_refused() -> None:
    """Both are shard(0), and a rank holds other rows of the one than of the other."""
    model = meta("tied")
    head = {"style": "packed_colwise", "segments": [32, 32]}
    plan = Plan(modules={"embed_tokens": "rowwise", "lm_head": head})
    (names, different) = split_ties(model, plan.parameters(model, 2))[0]
    assert names == ["embed_tokens.weight", "lm_head.weight"]
    assert "of each of [32, 32]" in different
    assert "CR304" in codes(model, plan)


def test_heads_that_a_projection_does_not_have_are_wrong_options() -> None:
    plan = Plan.preset("llama")
    k_proj = {"style": "kv_replicate", "heads": 12, "kv_heads": 5, "head_dim": 4}
    assert codes(meta(), replace(plan, modules={**plan.modules, "layers.*.self_attn.k_proj": k_proj})) == {"CR211"}


def test_a_modules_name_decides_no_code() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vocab_mix = nn.Linear(8, 9)

    found = check(Mixer(), Plan(modules={"vocab_mix": "colwise"}), Mesh(tp=2))
    assert [(f.code, f.where, f.fix) for f in found] == [("CR201", "vocab_mix", "choose tp from 1, 3, 9")]


def test_an_error_in_words_alone_is_legal_in_a_users_style() -> None:
    class Mine(Style):
        def build(self, site: Site) -> ParallelStyle:
            raise NotImplementedError

        def check(self, site: Site) -> None:
            raise PlanError("n_heads=3 is not divisible by tp=2: buy another GPU")

    found = check(meta(), Plan(modules={"norm": Mine()}), Mesh(tp=2))
    assert [(f.code, f.where) for f in found] == [("CR211", "norm")]
    assert "buy another GPU" in found[0].message


def test_a_plan_error_says_where_what_and_the_fix() -> None:
    error = PlanError("CR203", "layers.0.k_proj", "n_kv_heads=3 is not divisible by tp=2", "choose tp=1")
    assert str(error) == "layers.0.k_proj: n_kv_heads=3 is not divisible by tp=2: choose tp=1"
    assert (PlanError("text").code, str(PlanError("text"))) == ("", "text")
    assert str(PlanError(*error.args)) == str(error), "as an error that crosses processes is made again"


def test_a_plan_is_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from colrow.dryrun.fake_world import fake_tp_mesh
    from colrow.parallel.parallelize import parallelize

    calls = []
    resolve = Plan.resolve
    monkeypatch.setattr(Plan, "resolve", lambda self, *args: (calls.append(1), resolve(self, *args))[1])
    with fake_tp_mesh(2) as mesh:
        parallelize(meta(), Plan.preset("llama-fast"), mesh)
    assert len(calls) == 1
