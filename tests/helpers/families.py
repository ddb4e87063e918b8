"""Tiny random models of the transformers library, one for each option that the Llama here computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-wide-heads": ("Llama", {"head_dim": 16}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
}


def transformers_model(name: str, **sizes: Any) -> Any:
    """A model of the transformers library whose every parameter, norms and biases too, is random."""
    import transformers

    family, options = FAMILIES[name]
    config = getattr(transformers, f"{family}Config")(**(SIZES | options | sizes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn_like(param) * 0.2 + (1.0 if param.ndim == 1 else 0.0))
    return model


def save_transformers(name: str, folder: Path, **options: Any) -> Any:
    """The model, saved as `save_pretrained` does."""
    model = transformers_model(name)
    model.save_pretrained(folder, **options)
    return model


def token_ids(length: int = 40) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (2, length), generator=torch.Generator().manual_seed(1))


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's safetensors files, by name."""
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}
