"""The shipped plans for models with Hugging Face's Llama names (`embed_tokens`, `layers.N.self_attn.q_proj`, ...).

`llama`: Megatron's split with sequence parallelism. Attention runs on local heads; two all-gathers and two
reduce-scatters a layer, each way. `article`: the form that tutorials teach, in which q, k and v are gathered and
every rank computes all heads: simple, and right for any head count, but attention is not shared.
"""

from __future__ import annotations

from typing import Any

from colrow.errors import PlanError, did_you_mean
from colrow.plans.plan import Loss, Plan

Modules = dict[str, Any]

_GATHER = {"style": "prepare_input", "input": ["shard(1)"], "desired": ["replicate"]}


def preset(name: str, loss: Loss = "vocab_parallel") -> Plan:
    """The plan of this name. Raises PlanError for an unknown one."""
    if name not in PRESETS:
        raise PlanError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    modules = _ends_before() | PRESETS[name] | _ends_after(loss)
    return Plan(modules=modules, loss=loss, name=name)


def _ends_before() -> Modules:
    return {"embed_tokens": {"style": "rowwise", "input": "replicate", "output": "shard(1)"}}


def _ends_after(loss: Loss) -> Modules:
    if loss == "linear":
        return {"norm": "sequence", "lm_head": "linear_head"}
    head = {"use_local_output": False} if loss == "vocab_parallel" else {"output": "replicate"}
    return {"norm": "sequence", "lm_head": {"style": "colwise", "input": "shard(1)", **head}}


def _block(attention: Modules) -> Modules:
    return {
        f"layers.*.{name}": style
        for name, style in {
            "input_layernorm": "sequence",
            "self_attn": _GATHER,
            **{f"self_attn.{name}": style for name, style in attention.items()},
            "post_attention_layernorm": "sequence",
            "mlp": _GATHER,
            "mlp.gate_proj": "colwise",
            "mlp.up_proj": "colwise",
            "mlp.down_proj": {"style": "rowwise", "output": "shard(1)"},
        }.items()
    }


PRESETS: dict[str, Modules] = {
    "llama": _block(
        {
            "q_proj": "colwise",
            "k_proj": "kv_replicate",
            "v_proj": "kv_replicate",
            "q_norm": {"style": "grad_sum", "optional": True},
            "k_norm": {"style": "grad_sum", "optional": True},
            "o_proj": {"style": "rowwise", "output": "shard(1)"},
        }
    ),
    "article": _block(
        {
            "q_proj": {"style": "colwise", "output": "replicate"},
            "k_proj": {"style": "colwise", "output": "replicate"},
            "v_proj": {"style": "colwise", "output": "replicate"},
            "q_norm": {"style": "replicate", "optional": True},
            "k_norm": {"style": "replicate", "optional": True},
            "o_proj": {"style": "rowwise", "input": "replicate", "output": "shard(1)"},
        }
    ),
}
