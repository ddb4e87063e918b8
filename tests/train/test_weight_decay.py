"""Matrices and embeddings decay; norms, biases and what the config names do not, whatever their number of dims."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from colrow.config_sections import TrainSection
from colrow.errors import ConfigError
from colrow.train.weight_decay import decay_by_name

D, H, E = 8, 2, 4  # hidden size, heads, experts


def section(*no_decay: str) -> TrainSection:
    return TrainSection(steps=1, global_batch=1, micro_batch=1, lr=1.0, no_decay=no_decay)


def decaying(model: nn.Module, *no_decay: str) -> set[str]:
    return {name for name, decays in decay_by_name(model, section(*no_decay)).items() if decays}


def holder(class_name: str, **params: tuple[int, ...]) -> nn.Module:
    """A module of a class of this name with these parameters."""
    module: nn.Module = type(class_name, (nn.Module,), {})()
    for name, shape in params.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    return module


def inside(name: str, child: nn.Module) -> nn.Module:
    parent = nn.Module()
    parent.add_module(name, child)
    return parent


def marked() -> nn.Module:
    module = holder("Mixer", A_log=(D, H), x_proj=(D, H))
    module.A_log._no_weight_decay = True  # type: ignore[union-attr]
    return module


EXPERTS = {"gate_up": (E, D, 2 * D), "down": (E, D, D)}

UNDECAYED: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "layer norm over two dims": (lambda: nn.LayerNorm((H, D)), {"weight", "bias"}),
    "rms norm over two dims": (lambda: nn.RMSNorm((H, D)), {"weight"}),
    "a norm's subclass": (lambda: type("Scaled", (nn.LayerNorm,), {})((H, D)), {"weight", "bias"}),
    "a norm by its class": (lambda: holder("CohereRMSNormGated", weight=(H, D)), {"weight"}),
    "a norm by its module's name": (lambda: inside("q_norm", holder("PerHead", weight=(H, D))), {"q_norm.weight"}),
    "a norm in a list": (
        lambda: inside("k_norms", nn.ModuleList([holder("HeadRms", gamma=(H, 1, D))])),
        {"k_norms.0.gamma"},
    ),
    "a norm's gain in attention": (lambda: holder("Attention", q_norm=(H, D), k_scale=(H, 1)), {"q_norm", "k_scale"}),
    "norms of experts": (
        lambda: holder("Experts", **EXPERTS, ln_weight=(E, D), post_rms=(E, D), scales=(E, D)),
        {"ln_weight", "post_rms", "scales"},
    ),
    "vectors to broadcast": (
        lambda: holder("Attention", time_mix=(1, 1, D), temperature=(H, 1, 1), out=(D, D)),
        {"time_mix", "temperature"},
    ),
    "what the author marked": (marked, {"A_log"}),
    "gains in a list": (
        lambda: inside("norms", nn.ParameterList([torch.zeros(H, D), torch.zeros(H, D)])),
        {"norms.0", "norms.1"},
    ),
    "biases of experts": (
        lambda: holder("Experts", **EXPERTS, gate_up_bias=(E, 2 * D), bias_down=(E, D)),
        {"gate_up_bias", "bias_down"},
    ),
    "short biases of experts": (
        lambda: holder("Experts", w1=(E, D, 3 * D), w2=(E, 3 * D, D), b1=(E, 3 * D), b2=(E, D)),
        {"b1", "b2"},
    ),
    "short biases to broadcast": (
        lambda: holder("Experts", w_up=(E, D, 3 * D), up_b=(E, 1, 3 * D), w_down=(E, 3 * D, D), b_down=(E, 1, D)),
        {"up_b", "b_down"},
    ),
    "a linear": (lambda: nn.Linear(D, D), {"bias"}),
    "torch's attention": (
        lambda: nn.MultiheadAttention(D, H, add_bias_kv=True),
        {"in_proj_bias", "bias_k", "bias_v", "out_proj.bias"},
    ),
}


@pytest.mark.parametrize("case", UNDECAYED)
def test_norms_and_biases_do_not_decay(case: str) -> None:
    build, undecayed = UNDECAYED[case]
    model = build()
    assert {name for name, _ in model.named_parameters()} - decaying(model) == undecayed


DECAYED: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(D, D),
    "a bias looked up by position": lambda: inside("relative_attention_bias", nn.Embedding(D, H)),
    "positions": lambda: holder("Model", pos_embed=(1, D, D)),
    "experts": lambda: holder("Experts", **EXPERTS),
    "a router beside its experts": lambda: holder("Experts", router=(E, D), w1=(E, D, 3 * D)),
    "low-rank factors": lambda: holder("Lora", lora_A=(H, D), lora_B=(D, H)),
    "a head that normalises its rows": lambda: holder("NormHead", weight=(D, D)),
    "a linear in an adaptive norm": lambda: inside("norm1", nn.Linear(D, 2 * D, bias=False)),
    "convolution": lambda: nn.Conv1d(D, D, 4, groups=D, bias=False),
    "a convolution of one channel": lambda: nn.Conv1d(1, 1, 4, bias=False),
    "low-rank factors of rank 1": lambda: holder("Lora", lora_A=(1, D), lora_B=(D, 1)),
    "scales that are computed": lambda: holder("Adaptive", scale_proj=(D, D), lnx=(D, D)),
    "a single output": lambda: nn.Linear(D, 1, bias=False),
}


@pytest.mark.parametrize("case", DECAYED)
def test_matrices_and_embeddings_decay(case: str) -> None:
    model = DECAYED[case]()
    assert decaying(model) == {name for name, _ in model.named_parameters()}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(D, D)
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(2))
        self.lm_head = nn.Linear(D, D, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        ([], {"embed_tokens.weight", "lm_head.weight", "layers.0.weight", "layers.1.weight"}),
        (["embed_tokens"], {"layers.0.weight", "layers.1.weight"}),
        (["lm_head.weight"], {"layers.0.weight", "layers.1.weight"}),
        (["*.1.*"], {"embed_tokens.weight", "lm_head.weight", "layers.0.weight"}),
        (["layers.*", "*embed*"], set()),
        (["*.weight"], set()),
    ],
)
def test_patterns_name_parameters_or_modules_and_a_tie_under_each_name(patterns: list[str], left: set[str]) -> None:
    assert decaying(Tied(), *patterns) == left


def test_a_pattern_that_matches_nothing_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'layer.0.weight' matches no parameter .* did you mean 'layers.0.weight'"):
        decaying(Tied(), "layers.1", "layer.0.weight")


def test_frozen_parameters_do_not_decay() -> None:
    model = Tied()
    model.embed_tokens.weight.requires_grad_(False)
    assert decaying(model) == {"layers.0.weight", "layers.1.weight"}
