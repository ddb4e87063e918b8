"""A lower bound of a step's time: its work, at the rates that each kind of work reaches alone.

    matmuls     6 FLOPs a parameter and token (the embedding is a look-up)
    attention   2 S d FLOPs a token and layer forward under the causal mask, 2.5 times that backward
    memory      bytes that everything else reads and writes: norms, residuals, rope, SwiGLU, the loss, the optimizer
    tp          8 collectives a layer and 4 at the ends, each of one activation

`hidden` overlaps all collectives with other work, `exposed` none of tp's; FSDP's are overlapped in both. The CPU's time
is not counted. A step's fraction of the bound says how much is left to win; how well a GPU is used is what MFU says.
"""

from __future__ import annotations

from dataclasses import dataclass

from colrow.forecasting.devices import of_device
from colrow.mesh import Mesh
from colrow.models.llama import LlamaConfig
from colrow.models.shapes import flops_per_token


@dataclass(frozen=True)
class Rates:
    """Rates measured inside steps: FLOP/s (attention by the causal count) and bytes/s.

    Args:
        bus: bytes/s that a rank sends, by the number of ranks n; of a gathered activation it sends (n - 1) / n.
    """

    matmuls: float
    attention_forward: float
    attention_backward: float
    memory: float
    bus: dict[int, float]


RATES = {"H200": Rates(746e12, 567e12, 472e12, 4.0e12, {2: 190e9, 4: 290e9})}
"""By a part of the GPU's name; bf16, NVLink, torch 2.11. tp over other numbers of ranks has no `exposed` bound."""
OPTIMIZER_BYTES = 42
"""Bytes a parameter: AdamW 28, the gradient's norm and clipping 10, the bf16 copy 4."""


@dataclass(frozen=True)
class Bound:
    """Milliseconds of a step; `exposed` is None where the bus has no rate."""

    hidden: float
    exposed: float | None


def bound(config: LlamaConfig, mesh: Mesh, seq_len: int, tokens: int, device_name: str) -> Bound | None:
    """The bounds of a step of `tokens`, counted over all ranks; None for GPUs without rates and for pipelines."""
    rates = of_device(RATES, device_name)
    if rates is None or mesh.pp > 1:
        return None
    own = tokens / mesh.world_size  # tp splits activations too, along the sequence or along features
    layers, width = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    attention = 2 * seq_len * width * layers * own
    matmuls = flops_per_token(config, seq_len, causal=True) * own - 3 * attention
    compute = (
        matmuls / rates.matmuls
        + attention / rates.attention_forward
        + 2.5 * attention / rates.attention_backward
        + (_bytes_per_token(config) * own + OPTIMIZER_BYTES * _parameters(config) / (mesh.tp * mesh.dp_shard))
        / rates.memory
    )
    exposed = None
    if mesh.tp == 1:
        exposed = compute
    elif bus := rates.bus.get(mesh.tp):
        activation = 2 * config.hidden_size * tokens / mesh.dp
        exposed = compute + (8 * layers + 4) * activation * (mesh.tp - 1) / mesh.tp / bus
    return Bound(compute * 1e3, None if exposed is None else exposed * 1e3)


def _bytes_per_token(config: LlamaConfig) -> float:
    """Forward and backward in bf16, each chain of pointwise operations as one pass."""
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    norms = 2 * 2 * 4 * 2 * config.hidden_size  # two a layer, with the residual: two read, two written, both ways
    rope = 2 * 2 * 2 * heads
    swiglu = (3 + 6) * 2 * config.intermediate_size
    loss = 3 * 2 * config.vocab_size
    return config.num_hidden_layers * (norms + rope + swiglu) + loss


def _parameters(config: LlamaConfig) -> float:
    """Matrices; an untied embedding too."""
    linear = flops_per_token(config, 0, causal=True) / 6
    return linear + (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
