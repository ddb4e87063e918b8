"""Sequence shards of activations [batch, tokens, features] whose tokens are not those of the input: behind a patch
embedding, with a class token, and of an encoder and a decoder of different lengths."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.derive.derivation import derive
from colrow.derive.result import Derivation
from colrow.verifying.verify import parity
from helpers.layers import MLP

TOLERANCE = 1e-9
D, VOCAB = 16, 48
IMAGES = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Of `x` over `memory`."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (self.q(x), self.k(memory), self.v(memory)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mix, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), Attention(), MLP(D)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.mix(y, y if memory is None else memory)
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """16 patches of an image, and a class token where it has one."""

    def __init__(self, has_class: bool) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(3, D, 2, 2), nn.Parameter(torch.randn(1, 16 + has_class, D))
        self.first = nn.Parameter(torch.randn(1, 1, D)) if has_class else None
        self.blocks, self.norm, self.head = nn.ModuleList([Block(), Block()]), nn.LayerNorm(D), nn.Linear(D, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        if self.first is not None:
            x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], 1)
        x = x + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.decoder = nn.Embedding(VOCAB, D), Block(), Block()
        self.between, self.norm, self.head = nn.LayerNorm(D), nn.LayerNorm(D), nn.Linear(D, VOCAB, bias=False)

    def forward(self, target: Tensor, source: Tensor) -> Tensor:
        memory = self.between(self.encoder(self.embed(source)))
        return self.head(self.norm(self.decoder(self.embed(target), memory)))


def derived(model: nn.Module, *inputs: Tensor) -> Derivation:
    """The plan at tp 2, proved in fp64."""
    found = derive(model.double(), 2, inputs=inputs)
    assert parity(model, found.plan(), 2, inputs).worst < TOLERANCE
    return found


def test_patches_are_split_over_ranks_between_blocks() -> None:
    found = derived(Patches(has_class=False), IMAGES)
    assert found.sequence_parallel
    assert found.modules["blocks.*.norm1"]["style"] == "sequence"


@pytest.mark.exhaustive
def test_a_class_token_leaves_a_count_that_does_not_divide_and_a_note_says_so() -> None:
    found = derived(Patches(has_class=True), IMAGES)
    assert not found.sequence_parallel
    assert any("17 tokens at blocks.0, which tp=2 does not divide" in note for note in found.notes)
    assert found.share > 0.8


@pytest.mark.exhaustive
def test_an_encoder_and_a_decoder_may_have_different_lengths() -> None:
    found = derived(Translator(), torch.arange(32).view(2, 16), torch.arange(24).view(2, 12))
    assert found.sequence_parallel
    assert found.modules["encoder.norm1"]["style"] == found.modules["decoder.norm1"]["style"] == "sequence"
