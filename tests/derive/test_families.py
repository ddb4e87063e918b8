"""Plans derived for tiny models of the transformers library, each proved on simulated ranks: loss and every gradient.

The sweep (`python -m benchmarks.models.sweep`) does this for all of them; here are those that differ in kind. Fast
styles are proved on more than one sequence: ranks' parts of the tokens begin in the middle of one.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import Tensor, nn

from benchmarks.models.examine import TOLERANCE, TOLERANCE_FP32, judge, narrow, prepared
from benchmarks.models.tiny import classes, tiny
from colrow.derive.derivation import derive
from colrow.derive.result import Derivation
from colrow.derive.trace import Trace, trace
from colrow.dryrun.dry_run import dry_run
from colrow.mesh import Mesh
from colrow.plans.derive_options import DeriveOptions, Styles
from colrow.plans.plan import Plan
from colrow.verifying.verify import parity
from helpers.collectives import FEWEST, per_layer
from helpers.variants import params

pytest.importorskip("transformers")

ONE = {"num_hidden_layers": 1}
LATENT = ONE | {"num_key_value_heads": 8, "first_k_dense_replace": 0}
"""Attention whose second columns take what the first ones, whole on every rank, have made."""


@functools.cache
def family(kind: str, tp: int, **sizes: Any) -> tuple[nn.Module, tuple[Tensor, ...], Trace]:
    """A tiny model, token ids with the one that pads among them, and the trace that plain and fast plans come from."""
    model, inputs = prepared(tiny(*classes(kind), **sizes), tp)
    inputs[0][:, ::5] = 0
    return model, inputs, trace(model, inputs)


def proved(
    kind: str, tp: int, styles: Styles = "plain", **sizes: Any
) -> tuple[Derivation, nn.Module, tuple[Tensor, ...]]:
    """The derivation of a tiny model, after its plan was proved."""
    model, inputs, traced = family(kind, tp, **sizes)
    found = derive(model, tp, inputs=inputs, traced=traced, options=DeriveOptions(styles=styles))
    proof = parity(model, found.plan(), tp, inputs)
    tolerance = TOLERANCE_FP32 if narrow(traced) else TOLERANCE
    assert proof.loss < tolerance
    assert proof.worst < tolerance, max(proof.gradients, key=lambda n: proof.gradients[n])
    return found, model, inputs


@pytest.mark.parametrize(
    ("kind", "tp", "sizes"),
    params(
        [
            ("gpt2", 4, {"n_layer": 1}),
            ("phi3", 4, ONE),
            ("bloom", 2, {"n_layer": 1}),
            ("gpt_neox", 2, ONE),
            ("opt", 2, ONE),
            ("mixtral", 2, ONE),
            ("deepseek_v3", 2, LATENT),
        ],
        exhaustive=lambda kind, *_: True,
    ),
)
def test_a_family_gets_the_full_split(kind: str, tp: int, sizes: dict[str, Any]) -> None:
    found, model, _ = proved(kind, tp, **sizes)
    assert judge(found, model) == ("full", "")


@pytest.mark.parametrize(
    ("kind", "sizes"),
    params(
        [
            ("qwen3", ONE | {"num_key_value_heads": 2}),
            ("phi3", ONE | {"num_key_value_heads": 2}),
            ("falcon", ONE | {"multi_query": True, "new_decoder_architecture": False}),
        ],
        exhaustive=lambda kind, _: kind in ("phi3", "falcon"),
    ),
)
def test_fewer_kv_heads_than_ranks(kind: str, sizes: dict[str, Any]) -> None:
    """k and v of their own stay whole, beside q they are shards; a rank computes the kv heads of its query heads, whose
    gradients are summed."""
    found, model, _ = proved(kind, 4, **sizes)
    assert judge(found, model) == ("full", "")
    assert 4 in found.legal


@pytest.mark.parametrize(
    ("kind", "tp", "sizes", "layer"),
    params(
        [
            ("llama", 2, ONE, "model.layers.0."),
            ("qwen3", 4, ONE | {"num_key_value_heads": 2}, ""),
            ("olmo2", 4, ONE, ""),
            ("gpt2", 4, {"n_layer": 1}, "transformer.h.0."),
            ("opt", 2, ONE, ""),
            ("falcon", 2, ONE, ""),
            ("deepseek_v3", 2, LATENT, ""),
        ],
        exhaustive=lambda *_: True,
    ),
)
def test_a_family_runs_on_fast_styles(kind: str, tp: int, sizes: dict[str, Any], layer: str) -> None:
    """Those that differ from these in little that styles know are in docs/models-fast.md."""
    found, model, _ = proved(kind, tp, "fast", **sizes)
    plan = found.plan()
    assert {"rowwise", "sequence", "prepare_input", "local_block"}.isdisjoint(s.name for s in plan.modules.values())
    assert Plan.from_yaml(plan.to_yaml()) == plan
    if layer:
        assert per_layer(dry_run(model, plan, Mesh(tp=tp), 2, 4 * tp), layer) == FEWEST


@pytest.mark.exhaustive
def test_gradients_summed_at_the_second_columns_and_at_the_gather_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("colrow.styles.fast.column.mark_grads_summed_at_entry", lambda block: None)
    model, inputs, traced = family("deepseek_v3", 2, **LATENT)
    found = derive(model, 2, inputs=inputs, traced=traced, options=DeriveOptions(styles="fast"))
    proof = parity(model, found.plan(), 2, inputs)
    assert proof.loss < TOLERANCE_FP32
    assert proof.gradients["model.layers.0.self_attn.q_a_proj.weight"] == pytest.approx(1.0, rel=1e-3), "twice its own"


def test_a_broken_plan_of_a_family_is_seen() -> None:
    sizes = ONE | {"num_key_value_heads": 2}  # proved above
    model, inputs, traced = family("qwen3", 4, **sizes)
    plan = derive(model, 4, inputs=inputs, traced=traced).plan()
    norm = next(key for key in plan.modules if key.endswith("q_norm"))
    rest = {key: style for key, style in plan.modules.items() if key != norm}
    proof = parity(model, Plan(modules=rest, loss=plan.loss), 4, inputs)
    assert max(proof.gradients, key=lambda n: proof.gradients[n]).endswith("q_norm.weight")
    assert proof.worst > 1e-3
