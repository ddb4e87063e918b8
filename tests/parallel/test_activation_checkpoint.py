"""Activation checkpointing recomputes what it says, and gradients do not change by a bit."""

from __future__ import annotations

import copy
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from colrow.errors import ConfigError
from colrow.models.blocks import blocks_of
from colrow.models.llama import Block, LlamaConfig, rope_tables
from colrow.parallel.activation_checkpoint import MODES, apply_activation_checkpoint
from colrow.parallel.random_state import Generators

CONFIG = LlamaConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=4,
    max_position_embeddings=8,
)


class Count(TorchDispatchMode):
    """Operations that run while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        self.seen["attention" if name.startswith("_scaled_dot_product") and "backward" not in name else name] += 1
        return func(*args, **(kwargs or {}))


def backward_of(mode: Any) -> tuple[Counter[str], list[torch.Tensor]]:
    """What backward runs, and the gradients."""
    torch.manual_seed(0)
    block = Block(CONFIG)
    apply_activation_checkpoint([block], mode)
    x = torch.randn(2, 8, 16, requires_grad=True)
    rope = rope_tables(CONFIG, torch.arange(8), torch.float32)
    y = block(x, rope=rope, mask=None)
    with Count() as count:
        y.square().sum().backward()
    assert x.grad is not None
    return count.seen, [x.grad, *[p.grad for p in block.parameters() if p.grad is not None]]


def test_gradients_are_the_same_bits() -> None:
    _, want = backward_of("none")
    for mode in MODES[1:]:
        _, got = backward_of(mode)
        assert len(got) == len(want) == 10
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_each_mode_recomputes_what_it_says() -> None:
    none, selective, full = (backward_of(mode)[0] for mode in MODES)
    assert none["attention"] == selective["attention"] == 0
    assert full["attention"] == 1
    assert selective["mm"] - none["mm"] == 3  # q, v and gate; k, o and up are kept, and down is not needed
    assert full["mm"] - none["mm"] == 6
    assert selective["silu"] - none["silu"] == full["silu"] - none["silu"] == 1


class Drawing(nn.Module):
    """A block that draws from every kind of generator, and skips a branch by one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.owned, self.random, self.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        factor = random.random() + np.random.random() + self.random.random() + self.numpy.random()
        h = self.linear(F.dropout(x, 0.5)) * factor
        h = h * torch.rand(8, generator=self.owned)
        return x + (torch.sin(h) if random.random() < 0.5 else h.square())


def gradients_of_drawing(mode: Any) -> list[torch.Tensor]:
    torch.manual_seed(0)
    blocks = [Drawing() for _ in range(6)]
    apply_activation_checkpoint(blocks, mode)
    Generators(blocks, "cpu").seed(3)
    x = y = torch.ones(2, 8, requires_grad=True)
    for block in blocks:
        y = block(y)
    y.sum().backward()
    y.detach().add_(random.random())  # the next draw is the one after the forward's
    assert x.grad is not None
    return [y.detach(), x.grad, *[p.grad for block in blocks for p in block.parameters() if p.grad is not None]]


def test_a_recomputation_draws_the_random_numbers_of_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    want = gradients_of_drawing("none")
    for mode in MODES[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients_of_drawing(mode), want, strict=True))
    # the negative control: a recomputation that leaves them as they are
    monkeypatch.setattr(Generators, "beyond_torch", lambda self: [])
    with pytest.raises((torch.utils.checkpoint.CheckpointError, AssertionError)):
        assert all(torch.equal(a, b) for a, b in zip(gradients_of_drawing("full"), want, strict=True))


def test_names_and_copies_stay() -> None:
    block = Block(CONFIG)
    names = list(block.state_dict())
    apply_activation_checkpoint([block], "full")
    assert list(block.state_dict()) == names
    assert list(copy.deepcopy(block).state_dict()) == names


def test_an_unknown_mode_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'selective'"):
        apply_activation_checkpoint([], "selectiv")  # type: ignore[arg-type]


class Experts(nn.Module):
    """x + the sum of experts, whose ModuleList is longer than the model's list of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.stack([expert(x) for expert in self.experts]).sum(0)


def test_of_a_layer_of_experts_the_input_alone_is_kept() -> None:
    layers = nn.ModuleList(Experts() for _ in range(4))
    apply_activation_checkpoint(blocks_of(layers), "full")
    kept: list[torch.Tensor] = []
    x = y = torch.randn(2, 4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for layer in layers:
            y = layer(y)
    assert sum(t.numel() for t in kept) == len(layers) * x.numel()
