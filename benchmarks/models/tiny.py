"""Tiny configurations of the causal language models that the installed transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colrow.dryrun.reduced_model import (
    EXPERT_WIDTH,
    EXPERTS,
    FFN_WIDTH,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    QUERY_HEADS,
    WIDTH,
)

SIZES: dict[str, int] = {
    "vocab_size": 256,
    **dict.fromkeys((*WIDTH, "dim", "embedding_size"), 64),
    **dict.fromkeys((*FFN_WIDTH, "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 128),
    **dict.fromkeys((*LAYERS, "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys((*QUERY_HEADS, "num_heads", "decoder_attention_heads", "encoder_attention_heads"), 8),
    **dict.fromkeys(KV_HEADS, 4),
    **dict.fromkeys((*HEAD_DIM, "rotary_dim"), 8),
    **dict.fromkeys((*POSITIONS, "n_ctx"), 128),
    **dict.fromkeys(EXPERTS, 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys((*EXPERT_WIDTH, "expert_ffn_hidden_size"), 32),
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "first_k_dense_replace": 1,
}
OWN: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dots1": {"n_shared_experts": 1},
    # not run on token ids, and 300 million parameters as it is
    "gemma3n_vision": {"architecture": "mobilenetv3_small_050"},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 256},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 16},
    "prophetnet": {"num_hidden_layers": None, "num_encoder_layers": 2, "num_decoder_layers": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": None},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single types need beside the sizes; None leaves the configuration's own."""
ZERO = (
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "dropout",
    "attention_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
)


def causal_models() -> list[str]:
    """Model types of every causal language model that the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def classes(model_type: str) -> tuple[Any, Any]:
    """Configuration class and model class of one type; only its own modules are imported.

    The configuration is the one that the model takes: of text only, where the type's own holds images too.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model = getattr(transformers, name if isinstance(name, str) else name[0])
    return model.config_class, model


def tiny(config_class: Any, model_class: Any, seed: int = 0, **sizes: Any) -> nn.Module:
    """A two-layer model with small sizes, weights from `seed`, and vectors (norms, biases) that are not all alike.

    `sizes` replace those of the table, under the configuration's own names.
    """
    torch.manual_seed(seed)
    try:
        model = model_class(tiny_config(config_class, **sizes))
    except Exception as error:
        try:
            model = model_class(tiny_config(config_class, **(sizes | {"num_key_value_heads": None})))
        except Exception:
            raise error from None
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(0.1 * torch.randn_like(param))
    return model.eval()


def tiny_config(config_class: Any, **sizes: Any) -> Any:
    """A configuration with small sizes, and small ones in the configurations (of text, of images) that it holds.

    A size of None leaves the configuration's own.
    """
    default = config_class()
    mapped = getattr(config_class, "attribute_map", {})
    fixed = {k for k in (*SIZES, "layer_types", "mlp_layer_types") if _computed(config_class, mapped.get(k, k))}
    names = (vars(default).keys() | {k for k in SIZES if _readable(default, k)}) - fixed
    chosen: dict[str, Any] = {k: v for k, v in SIZES.items() if k in names}
    chosen |= {k: 0 if isinstance(vars(default).get(k), int) else 0.0 for k in ZERO if k in names}
    if "pad_token_id" in names:
        chosen["pad_token_id"] = 0
    for name in ("layer_types", "mlp_layer_types"):
        kinds = getattr(default, name, None)
        if isinstance(kinds, list) and kinds and name not in fixed:
            two = (kinds[:1] + [k for k in kinds if k != kinds[0]][:1] + kinds)[:2]
            chosen[name] = two[: sizes.get("num_hidden_layers", 2)]
    for name in getattr(config_class, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if inner is not None:
            chosen[name] = tiny_config(type(inner)).to_dict()
    chosen |= OWN.get(config_class.model_type, {}) | sizes
    return config_class(**{name: value for name, value in chosen.items() if value is not None})


def _readable(config: Any, name: str) -> bool:
    """Whether a configuration has one value of this name; some have one for each layer, and raise."""
    try:
        return hasattr(config, name)
    except Exception:
        return False


def _computed(config_class: Any, name: str) -> bool:
    """Whether a configuration computes this name and takes no value for it."""
    found = getattr(config_class, name, None)
    return isinstance(found, property) and found.fset is None
