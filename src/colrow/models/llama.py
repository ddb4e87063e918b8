"""The Llama architecture, for one device.

Options: Llama-3 frequency scaling, tied embeddings, Qwen2's q/k/v bias, Qwen3's q/k norm.
Modules have Hugging Face's names, without the `model.` prefix.

Legend: B batch, T tokens, D hidden size, F ffn, V vocabulary, H heads, K kv heads, E head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.errors import ConfigError

Rope = tuple[Tensor, Tensor]
"""cos and sin of the rotation angles, each [1, T, E/2], or [B, 1, T, E/2] when sequences differ in positions."""


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling of low rotary frequencies (`rope_type: llama3` of a Hugging Face config)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and options, under the names of a Hugging Face config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """A bias on q_proj, k_proj and v_proj, not on o_proj."""
    qk_norm: bool = False
    """RMSNorm over each head of q and k, before the rotation."""
    initializer_range: float = 0.02
    """Standard deviation of the initial matrices."""
    embedding_range: float | None = None
    """That of the initial embedding where it is another: with 1 a small model learns faster."""

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: each kv head serves a group of query heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} is odd: the rotary embedding turns pairs of dimensions")


SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"),
)
"""The fields of a LlamaConfig that have no default."""


class Attention(nn.Module):
    """Causal self-attention with grouped kv heads.

    The number of heads is read from the projections' outputs, so that a rank which holds some of the heads computes
    those.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, E, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = E
        self.q_proj = nn.Linear(D, config.num_attention_heads * E, bias=bias)
        self.k_proj = nn.Linear(D, config.num_key_value_heads * E, bias=bias)
        self.v_proj = nn.Linear(D, config.num_key_value_heads * E, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * E, D, bias=False)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(E, eps=config.rms_norm_eps)
            self.k_norm = nn.RMSNorm(E, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(self, x_BTD: Tensor, *, rope: Rope, mask: Tensor | None = None) -> Tensor:
        """[B, T, D] -> [B, T, D]. `mask` (broadcastable to [B, H, T, T], True = attend) replaces the causal one."""
        q, k, v = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        B, T, _ = q.shape  # not of x, which may be a shard of the sequence, gathered by the projections
        q_BTHE = q.view(B, T, -1, self.head_dim)
        k_BTKE = k.view(B, T, -1, self.head_dim)
        v_BTKE = v.view(B, T, -1, self.head_dim)
        if self.qk_norm:
            q_BTHE, k_BTKE = self.q_norm(q_BTHE), self.k_norm(k_BTKE)
        q_BHTE = rotate(q_BTHE.transpose(1, 2), rope)
        k_BKTE = rotate(k_BTKE.transpose(1, 2), rope)
        o_BHTE = F.scaled_dot_product_attention(
            q_BHTE,
            k_BKTE,
            v_BTKE.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=q_BHTE.shape[1] != k_BKTE.shape[1],
        )
        return self.o_proj(o_BHTE.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F_, bias=False)
        self.up_proj = nn.Linear(D, F_, bias=False)
        self.down_proj = nn.Linear(F_, D, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """One layer: attention and MLP, each after a norm and added to its input."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, *, rope: Rope, mask: Tensor | None = None) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope=rope, mask=mask)
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nn.Module):
    """Token ids [B, T] -> logits [B, T, V].

    A pipeline stage is this model with `embed_tokens`, `norm`, `lm_head` or entries of `layers` set to None: the rest
    keeps its names. Without an embedding the input is hidden states, without a head the output is.

    Weights are those that torch's modules start with; `colrow.parallel.initialize.fill_seeded` gives those of a seed.
    There are no buffers: a model built on the meta device has nothing to fill but its parameters.
    """

    embed_tokens: nn.Embedding | None
    norm: nn.RMSNorm | None
    lm_head: nn.Linear | None

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        # nn.Embedding would draw the same; but on the meta device its normal_() imports torch's compiler: 1 s
        weight = torch.randn(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=weight)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x: Tensor, positions: Tensor | None = None, *, seq_len: int | None = None) -> Tensor:
        """Logits, or hidden states when there is no head.

        Args:
            x: token ids [B, T]; hidden states [B, T, D] when there is no embedding.
            positions: [T] or [B, T], from 0 upwards unless given.
            seq_len: T, for hidden states that are a shard of the sequence.
        """
        T = x.shape[1] if seq_len is None else seq_len
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        if positions is None:
            positions = torch.arange(T, device=x.device)
        rope = rope_tables(self.config, positions, x.dtype)
        for layer in self.layers:
            if layer is not None:
                x = layer(x, rope=rope, mask=None)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.lm_head is None else self.lm_head(x)


def rope_tables(config: LlamaConfig, positions: Tensor, dtype: torch.dtype) -> Rope:
    """cos and sin for `positions` ([T] or [B, T]), computed in fp32 and returned in `dtype`."""
    E, scaling = config.head_dim, config.rope_scaling
    exponent = torch.arange(0, E, 2, dtype=torch.float32, device=positions.device) / E
    inv_freq = 1.0 / config.rope_theta**exponent
    if scaling is not None:
        # Wavelengths that fit `high_freq_factor` times into the original context stay, those that fit less than
        # `low_freq_factor` times are stretched by `factor`, and those between are blended linearly.
        turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = keep.clamp(0.0, 1.0)
        inv_freq = keep * inv_freq + (1.0 - keep) * inv_freq / scaling.factor
    angle = positions.float().unsqueeze(-1) * inv_freq
    return angle.cos().to(dtype).unsqueeze(-3), angle.sin().to(dtype).unsqueeze(-3)  # a dim of 1: alike for all heads


def rotate(x_BHTE: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (i, i + E/2) of each head: Hugging Face's order of dims; the paper's is (2i, 2i + 1)."""
    cos, sin = rope
    a, b = x_BHTE.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BHTE.dtype)
