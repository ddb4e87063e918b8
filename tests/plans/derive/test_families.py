"""Plans derived for tiny models of the transformers library, each proved on simulated ranks: loss and every gradient.

The sweep (`python -m colrow.plans.derive.sweep`) does this for all of them; here are those that differ in kind.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from colrow.plans.derive.derivation import Derivation, derive
from colrow.plans.derive.examine import TOLERANCE, TOLERANCE_FP32, judge, narrow, prepared
from colrow.plans.derive.tiny import classes, tiny
from colrow.plans.derive.trace import trace
from colrow.plans.plan import Plan
from colrow.plans.tracing.simulated import available
from colrow.plans.verify.parity import parity

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not available, reason="this torch has no LocalTensorMode")

ONE = {"num_hidden_layers": 1}


def proved(kind: str, tp: int, **sizes: Any) -> tuple[Derivation, nn.Module, tuple[Tensor, ...]]:
    """The derivation of a tiny model, after its plan was proved."""
    model, inputs = prepared(tiny(*classes(kind), **sizes), tp)
    traced = trace(model, inputs)
    found = derive(model, tp, inputs=inputs, traced=traced)
    proof = parity(model, found.plan(), tp, inputs)
    tolerance = TOLERANCE_FP32 if narrow(traced) else TOLERANCE
    assert proof.loss < tolerance
    assert proof.worst < tolerance, max(proof.gradients, key=lambda n: proof.gradients[n])
    return found, model, inputs


@pytest.mark.parametrize(
    ("kind", "tp", "sizes"),
    [
        ("gpt2", 4, {"n_layer": 1}),
        ("phi3", 4, ONE),
        ("bloom", 2, {"n_layer": 1}),
        ("gpt_neox", 2, ONE),
        ("opt", 2, ONE),
        ("olmo2", 4, ONE),
        ("mixtral", 2, ONE),
        ("deepseek_v3", 2, ONE | {"num_key_value_heads": 8, "first_k_dense_replace": 0}),
    ],
)
def test_a_family_gets_the_full_split(kind: str, tp: int, sizes: dict[str, Any]) -> None:
    found, model, _ = proved(kind, tp, **sizes)
    assert judge(found, model) == ("full", "")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("llama", ONE | {"num_key_value_heads": 2}),
        ("qwen3", ONE | {"num_key_value_heads": 2}),
        ("phi3", ONE | {"num_key_value_heads": 2}),
        ("falcon", ONE | {"multi_query": True, "new_decoder_architecture": False}),
    ],
)
def test_fewer_kv_heads_than_ranks(kind: str, sizes: dict[str, Any]) -> None:
    """k and v stay whole; each rank computes the kv heads of its query heads, and their gradients are summed."""
    found, model, _ = proved(kind, 4, **sizes)
    assert judge(found, model) == ("full", "")
    assert 4 in found.legal


def test_a_broken_plan_of_a_family_is_seen() -> None:
    found, model, inputs = proved("qwen3", 2, **ONE)
    plan = found.plan()
    norm = next(key for key in plan.modules if key.endswith("q_norm"))
    rest = {key: style for key, style in plan.modules.items() if key != norm}
    proof = parity(model, Plan(modules=rest, loss=plan.loss), 2, inputs)
    assert max(proof.gradients, key=lambda n: proof.gradients[n]).endswith("q_norm.weight")
    assert proof.worst > 1e-3
