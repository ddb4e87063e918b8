"""Tensor parallelism computes what one process computes: loss, every gradient, parameters after five steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from colrow.plans.plan import Plan
from helpers import parity
from helpers.harness import Ranks
from helpers.parity import batch, tp_difference, tp_mesh
from helpers.variants import params

TOLERANCE = 1e-10
LOSSES = ("vocab_parallel", "replicated")
NAMES = [name if name == "gqa" else f"{name}-1" for name in parity.MODELS]
"""One of two layers; one layer shows what the others differ in."""
COMBINATIONS = [(preset, loss, name) for preset in ("llama", "article") for loss in LOSSES for name in NAMES]
COMBINATIONS += [("llama-fast", "vocab_parallel", name) for name in NAMES]
COMBINATIONS += [("llama-fast", "replicated", "gqa"), ("article", "linear", "kv3")]
COMBINATIONS += [(preset, "linear", name) for preset in ("llama", "llama-fast") for name in ("gqa", "tied")]
COMBINATIONS += [("llama-fast", "replicated", "odd-1"), ("llama-fast", "linear", "odd_tied-1")]
COMBINATIONS += [("article", "linear", "kv3-1"), ("llama-fast", "linear", "tied-1")]

KEPT = {
    2: [
        *[("llama", "vocab_parallel", name) for name in NAMES if name != "odd-1"],
        *[("llama-fast", "vocab_parallel", name) for name in NAMES if not name.startswith("odd")],
        ("article", "vocab_parallel", "gqa"),
        ("article", "vocab_parallel", "tied-1"),
        ("article", "vocab_parallel", "qk_norm_kv3-1"),
        ("article", "replicated", "gqa"),
        ("article", "linear", "kv3"),
        ("llama", "replicated", "tied-1"),
        ("llama", "linear", "tied"),
        ("llama-fast", "replicated", "gqa"),
        ("llama-fast", "linear", "gqa"),
    ],
    4: [
        ("llama", "vocab_parallel", "gqa"),
        ("llama", "replicated", "kv3-1"),
        ("article", "vocab_parallel", "kv1-1"),
        ("article", "replicated", "tied-1"),
        ("article", "linear", "kv3-1"),
        ("llama-fast", "vocab_parallel", "kv1-1"),
        ("llama-fast", "linear", "tied-1"),
        ("llama", "vocab_parallel", "odd-1"),
        ("llama-fast", "linear", "odd_tied-1"),
    ],
}
"""Without --exhaustive: on two ranks each model under each preset that computes it in its own way, and each loss under
each preset; on four, where kv heads are fewer than ranks, each preset and each loss."""


def parity_case(device: str, preset: str, loss: Any, name: str) -> dict[str, float]:
    mesh = tp_mesh(device, dist.get_world_size())
    difference = tp_difference(device, name, Plan.preset(preset, loss), mesh)
    return {
        "loss": difference.loss,
        **difference.gradients,
        **{f"step5 {k}": v for k, v in difference.parameters.items()},
    }


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tp", "preset", "loss", "name"),
    params([(tp, *one) for tp in (2, 4) for one in COMBINATIONS], lambda tp, *one: one not in KEPT[tp]),
)
def test_gradients_equal_the_unsharded_model(ranks: Ranks, tp: int, preset: str, loss: str, name: str) -> None:
    for errors in ranks(tp).run(parity_case, preset, loss, name):
        assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


def without(plan: Plan, key: str) -> Plan:
    return replace(plan, modules={k: v for k, v in plan.modules.items() if k != key})


def missing_norm_case(device: str, key: str, name: str) -> dict[str, float]:
    """The plan leaves a norm out: as torch's own parallelize_module would, its gradient is this rank's part."""
    mesh = tp_mesh(device, dist.get_world_size())
    return tp_difference(device, name, without(Plan.preset("llama"), key), mesh, steps=1).gradients


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("key", "name", "wrong", "right"),
    [
        ("layers.*.input_layernorm", "gqa", "layers.0.input_layernorm.weight", "layers.1.mlp.down_proj.weight"),
        ("layers.*.self_attn.q_norm", "qk_norm", "layers.0.self_attn.q_norm.weight", "layers.0.mlp.down_proj.weight"),
        ("layers.*.self_attn.k_norm", "qk_norm", "layers.0.self_attn.k_norm.weight", "layers.0.mlp.down_proj.weight"),
    ],
)
def test_a_norm_left_out_of_the_plan_is_seen(ranks: Ranks, key: str, name: str, wrong: str, right: str) -> None:
    for gradients in ranks(2).run(missing_norm_case, key, name):
        assert gradients[wrong] > 0.05
        assert gradients[right] < 0.05  # behind it, or beside it: the error does not reach everything


def missing_all_reduce_case(device: str) -> dict[str, float]:
    """Take the pending sum of the norms' gradients for their value."""
    from torch.distributed.tensor import DTensor, Replicate

    def keep_parts(model: torch.nn.Module) -> None:
        for param in model.parameters():
            grad = param.grad
            if isinstance(grad, DTensor) and any(p.is_partial() for p in grad.placements):
                param.grad = DTensor.from_local(grad.to_local(), grad.device_mesh, [Replicate()], run_check=False)

    mesh = tp_mesh(device, dist.get_world_size())
    return tp_difference(device, "gqa", Plan.preset("llama"), mesh, steps=1, before_step=keep_parts).gradients


@pytest.mark.distributed
def test_an_all_reduce_left_out_is_seen(ranks: Ranks) -> None:
    for gradients in ranks(2).run(missing_all_reduce_case):
        assert gradients["layers.0.input_layernorm.weight"] > 0.05
        assert gradients["layers.0.mlp.down_proj.weight"] < TOLERANCE


def other_data_case(device: str) -> float:
    """Ranks of one TP group read different batches."""

    def data(step: int) -> tuple[Tensor, Tensor]:
        return batch(device, seed=step + 100 * dist.get_rank())

    mesh = tp_mesh(device, dist.get_world_size())
    return tp_difference(device, "gqa", Plan.preset("llama"), mesh, steps=1, data=data).worst


@pytest.mark.distributed
def test_different_data_inside_a_tp_group_is_seen(ranks: Ranks) -> None:
    assert min(ranks(2).run(other_data_case)) > 0.05
