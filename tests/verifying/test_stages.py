"""A pipeline's stages, one after the other, compute what the model computes; or no run starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.errors import ConfigError
from colrow.models.llama import Llama, LlamaConfig
from colrow.verifying.stages import refuse_unequal_stages

SIZES = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
)  # fmt: skip


class Capped(Llama):
    """Caps its logits; of a stage without a head, `everywhere`, the hidden states too."""

    everywhere = False

    def forward(self, x: Tensor, positions: Tensor | None = None, *, seq_len: int | None = None) -> Tensor:
        out = super().forward(x, positions, seq_len=seq_len)
        return out if self.lm_head is None and not self.everywhere else torch.tanh(out / 5)


class CappedEverywhere(Capped):
    everywhere = True


class Positions(Llama):
    """Learned positions beside the embedding: each stage would have its own."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.places = nn.Parameter(torch.zeros(64, config.hidden_size))


class FirstValues(Llama):
    """What the first layer leaves in an attribute is added before the last."""

    def forward(self, x: Tensor, positions: Tensor | None = None, *, seq_len: int | None = None) -> Tensor:
        kept: list[Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda _, args: kept.append(args[0])) for layer in self._layers()]
        hooks.append(self._layers()[-1].register_forward_hook(lambda _, args, out: out + kept[0]))
        try:
            return super().forward(x, positions, seq_len=seq_len)
        finally:
            for hook in hooks:
                hook.remove()

    def _layers(self) -> list[Any]:
        return [layer for layer in self.layers if layer is not None]


class WithoutLength(Llama):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


@pytest.mark.parametrize("cls", [Llama, Capped])
def test_a_model_whose_stages_compute_it_passes(cls: type[Llama]) -> None:
    with torch.device("meta"):
        model = cls(SIZES)
    refuse_unequal_stages(model)


@pytest.mark.parametrize(
    ("cls", "text"),
    [
        (CappedEverywhere, "give other logits than the model"),
        (FirstValues, "give other logits than the model"),
        (Positions, "every stage holds places, and trains it on its own"),
        (WithoutLength, "a stage raises TypeError: .*seq_len"),
    ],
)
def test_a_model_whose_stages_compute_something_else_is_refused(cls: type[Llama], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        refuse_unequal_stages(cls(SIZES))
