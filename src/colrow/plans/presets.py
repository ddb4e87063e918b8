"""The shipped plans for models with Hugging Face's Llama names (`embed_tokens`, `layers.N.self_attn.q_proj`, ...).

`llama`: Megatron's split with sequence parallelism. Attention runs on local heads; two all-gathers and two
reduce-scatters a layer, each way. `article`: the form that tutorials teach, in which q, k and v are gathered and
every rank computes all heads: simple, and right for any head count, but attention is not shared. `llama-fast`: the
split of `llama` with the fast styles, on local tensors. `llama-overlap`: the same with its blocks' collectives on the
copy engines, in chunks that overlap with matmuls; for GPUs of one host.
"""

from __future__ import annotations

from typing import Any

from colrow.errors import PlanError, did_you_mean
from colrow.ops.carriers import Overlap
from colrow.plans.loss import LOSSES, Loss

Modules = dict[str, Any]

_GATHER = {"style": "prepare_input", "input": ["shard(1)"], "desired": ["replicate"]}


def preset_modules(name: str, loss: Loss) -> Modules:
    """Patterns to styles of this preset. Raises PlanError for an unknown one, or an unknown loss."""
    if name not in PRESETS:
        raise PlanError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    if loss not in LOSSES:
        raise PlanError(f"unknown loss {loss!r}{did_you_mean(str(loss), LOSSES)}")
    fast = name in FAST
    embedding = "fast_embedding" if fast else {"style": "rowwise", "input": "replicate", "output": "shard(1)"}
    return {"embed_tokens": embedding, **PRESETS[name], **(_fast_end(loss) if fast else _end(loss))}


def _in_layers(styles: Modules) -> Modules:
    return {f"layers.*.{name}": style for name, style in styles.items()}


def _fast_end(loss: Loss) -> Modules:
    # the final norm works on this rank's tokens: its weight's gradient is a term of a sum, as those in the layers
    heads: dict[Loss, Any] = {
        "linear": {"style": "linear_head", "layout": "flattened"},
        "vocab_parallel": "fast_head",
        "replicated": {"style": "fast_head", "gather": True},
    }
    return {"norm": "grad_sum", "lm_head": heads[loss]}


def _end(loss: Loss) -> Modules:
    if loss == "linear":
        return {"norm": "sequence", "lm_head": "linear_head"}
    # a DTensor, so that loss_parallel knows which classes this rank's logits are
    head = {"use_local_output": False} if loss == "vocab_parallel" else {"output": "replicate"}
    return {"norm": "sequence", "lm_head": {"style": "colwise", "input": "shard(1)", **head}}


def _block(attention: Modules) -> Modules:
    return _in_layers(
        {
            "input_layernorm": "sequence",
            "self_attn": _GATHER,  # once for q, k and v, which would gather the same input three times
            **{f"self_attn.{name}": style for name, style in attention.items()},
            "post_attention_layernorm": "sequence",
            "mlp": _GATHER,
            "mlp.gate_proj": "colwise",
            "mlp.up_proj": "colwise",
            "mlp.down_proj": {"style": "rowwise", "output": "shard(1)"},  # a reduce-scatter: residuals are shards
        }
    )


def _fast_block(overlap: Overlap) -> Modules:
    return _in_layers(
        {
            "input_layernorm": "grad_sum",  # on this rank's tokens
            "self_attn": {"style": "fast_gather", "columns": ["q_proj", "k_proj", "v_proj"], "overlap": overlap},
            "self_attn.q_proj": "fast_colwise",
            "self_attn.k_proj": "fast_kv_replicate",
            "self_attn.v_proj": "fast_kv_replicate",
            "self_attn.q_norm": {"style": "grad_sum", "optional": True},  # on this rank's heads
            "self_attn.k_norm": {"style": "grad_sum", "optional": True},
            "self_attn.o_proj": {"style": "fast_rowwise", "overlap": overlap},
            "post_attention_layernorm": "grad_sum",
            "mlp": {"style": "fast_gather", "columns": ["gate_proj", "up_proj"], "overlap": overlap},
            "mlp.gate_proj": "fast_colwise",
            "mlp.up_proj": "fast_colwise",
            "mlp.down_proj": {"style": "fast_rowwise", "overlap": overlap},
        }
    )


FAST: dict[str, Overlap] = {"llama-fast": "collectives", "llama-overlap": "copy_engine"}
"""Presets of fast styles, and what overlaps with their matmuls."""
PRESETS: dict[str, Modules] = {
    **{name: _fast_block(overlap) for name, overlap in FAST.items()},
    "llama": _block(
        {
            "q_proj": "colwise",
            "k_proj": "kv_replicate",  # colwise where tp divides the kv heads
            "v_proj": "kv_replicate",
            "q_norm": {"style": "grad_sum", "optional": True},  # on this rank's heads
            "k_norm": {"style": "grad_sum", "optional": True},
            "o_proj": {"style": "rowwise", "output": "shard(1)"},
        }
    ),
    "article": _block(
        {
            "q_proj": {"style": "colwise", "output": "replicate"},
            "k_proj": {"style": "colwise", "output": "replicate"},
            "v_proj": {"style": "colwise", "output": "replicate"},
            "q_norm": {"style": "replicate", "optional": True},  # every rank normalises all heads
            "k_norm": {"style": "replicate", "optional": True},
            "o_proj": {"style": "rowwise", "input": "replicate", "output": "shard(1)"},
        }
    ),
}
