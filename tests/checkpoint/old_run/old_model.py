"""The model of the stored run."""

from __future__ import annotations

from colrow.models.llama import Llama, LlamaConfig


def build() -> Llama:
    return Llama(
        LlamaConfig(
            vocab_size=264,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )
