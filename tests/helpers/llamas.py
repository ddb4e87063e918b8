"""Small Llamas whose values depend on the seed and the names alone."""

from __future__ import annotations

import torch

from colrow.models.llama import Llama, LlamaConfig
from colrow.parallel.initialize import fill_seeded, materialize

OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "kv heads do not divide": {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4},
    "bias": {"attention_bias": True},
    "qk norm": {"qk_norm": True},
}


def tiny(**options: object) -> Llama:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    model = Llama(LlamaConfig(**(sizes | options)))  # type: ignore[arg-type]
    fill_seeded(model, 0)
    return model


def meta(**options: object) -> Llama:
    sizes = {
        "vocab_size": 66,
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 64,
    }
    with torch.device("meta"):
        return Llama(LlamaConfig(**(sizes | options)))  # type: ignore[arg-type]


def seeded(device: str = "cpu", **options: object) -> Llama:
    model = meta(**options)
    materialize(model, device)
    fill_seeded(model, 3)
    return model
