"""The table of named sizes, and what follows from a size: parameters and FLOPs."""

from __future__ import annotations

from typing import Any

from colrow.errors import ConfigError, did_you_mean
from colrow.models.llama import SIZES, Llama3Scaling, LlamaConfig

_LLAMA_3_2 = Llama3Scaling(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def _sized(*sizes: int, **options: Any) -> LlamaConfig:
    return LlamaConfig(**options, **dict[str, Any](zip(SIZES, sizes, strict=True)))


# fmt: off
SHAPES: dict[str, LlamaConfig] = {
    #                       vocab  hidden     ffn  layers  heads  kv  head  context
    # minutes on two CPU cores
    "laptop":      _sized(  4_096,    128,    384,      4,     8,  4,   16,     256,
                          rope_theta=1_000.0, initializer_range=0.05, embedding_range=0.25),
    # three kv heads: no usual tp divides them
    "article":     _sized( 50_000,    768,  3_072,     12,    12,  3,   64,   2_048),
    "llama2-7b":   _sized( 32_000,  4_096, 11_008,     32,    32, 32,  128,   4_096),
    "llama3-8b":   _sized(128_256,  4_096, 14_336,     32,    32,  8,  128,   8_192, rope_theta=500_000.0),
    "llama3-70b":  _sized(128_256,  8_192, 28_672,     80,    64,  8,  128,   8_192, rope_theta=500_000.0),
    "llama3.2-1b": _sized(128_256,  2_048,  8_192,     16,    32,  8,   64, 131_072,
                          rope_theta=500_000.0, rope_scaling=_LLAMA_3_2, tie_word_embeddings=True),
    "qwen3-8b":    _sized(151_936,  4_096, 12_288,     36,    32,  8,  128,  40_960,
                          rope_theta=1_000_000.0, rms_norm_eps=1e-6, qk_norm=True),
}
# fmt: on


def shape(name: str) -> LlamaConfig:
    """The config of a named size. Raises ConfigError with the nearest name when there is none."""
    if name not in SHAPES:
        raise ConfigError(f"unknown shape {name!r}{did_you_mean(name, SHAPES)}")
    return SHAPES[name]


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
