"""The table of named sizes, and what follows from a size: parameters and FLOPs."""

from __future__ import annotations

from colrow.errors import ConfigError, did_you_mean
from colrow.models.llama import Llama3Scaling, LlamaConfig

_LLAMA_3_2 = Llama3Scaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)

SHAPES: dict[str, LlamaConfig] = {
    # minutes on two CPU cores
    "laptop": LlamaConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=256,
        rope_theta=1_000.0,
        initializer_range=0.05,
        embedding_range=0.25,
    ),
    # three kv heads: no usual tp divides them
    "article": LlamaConfig(
        vocab_size=50_000,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=2048,
    ),
    "llama2-7b": LlamaConfig(
        vocab_size=32_000,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        head_dim=128,
        max_position_embeddings=4096,
    ),
    "llama3-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    ),
    "llama3-70b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    ),
    "llama3.2-1b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rope_scaling=_LLAMA_3_2,
        tie_word_embeddings=True,
    ),
    "qwen3-8b": LlamaConfig(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_theta=1_000_000.0,
        rms_norm_eps=1e-6,
        qk_norm=True,
    ),
}


def shape(name: str) -> LlamaConfig:
    """The config of a named size. Raises ConfigError with the nearest name when there is none."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}{did_you_mean(name, SHAPES)}")
    return SHAPES[name]


def parameter_count(config: LlamaConfig) -> int:
    """Number of parameters; a head tied to the embedding is counted once."""
    embedding = config.vocab_size * config.hidden_size
    return _without_embedding(config) + (0 if config.tie_word_embeddings else embedding)


def flops_per_token(config: LlamaConfig, seq_len: int, *, causal: bool) -> int:
    """FLOPs of forward and backward for one token of a sequence of `seq_len`.

    6 N for the matrices, where N excludes the embedding table (a lookup) and includes the head (a matmul, also where
    tied); for attention 6 L d S if only the causal half of the scores counts, 12 L d S if the full square does.
    L layers, d = heads x head_dim, S = seq_len. Recomputed activations never count.
    """
    width = config.num_attention_heads * config.head_dim
    attention = (6 if causal else 12) * config.num_hidden_layers * width * seq_len
    return 6 * _without_embedding(config) + attention


def mfu(config: LlamaConfig, seq_len: int, tokens_per_second: float, peak: float) -> dict[str, float]:
    """A GPU's model FLOPs utilization: the share of its `peak` FLOP/s, by either count of attention's FLOPs."""
    return {
        name: tokens_per_second * flops_per_token(config, seq_len, causal=causal) / peak
        for name, causal in (("mfu_causal", True), ("mfu_full", False))
    }


def _without_embedding(config: LlamaConfig) -> int:
    D, E = config.hidden_size, config.head_dim
    q, kv = config.num_attention_heads * E, config.num_key_value_heads * E
    attention = D * (q + 2 * kv) + q * D
    if config.attention_bias:
        attention += q + 2 * kv
    if config.qk_norm:
        attention += 2 * E
    layer = attention + 3 * D * config.intermediate_size + 2 * D
    return config.num_hidden_layers * layer + D + config.vocab_size * D
