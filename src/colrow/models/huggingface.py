"""Hugging Face's config.json and parameter names: Llama, Qwen2, Qwen3, and Mistral without a sliding window."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from colrow.errors import ConfigError, did_you_mean
from colrow.models.llama import SIZES, Llama3Scaling, LlamaConfig
from colrow.yaml_text import read_text

FAMILIES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
"""model_type -> the first part of the class's name; what can be written. Mistral is read, and written as Llama."""

_PREFIX = "model."
_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"
_TOP = ("embed_tokens", "layers", "norm")


class UnsupportedModelError(ConfigError):
    """A config.json describes a model that colrow's own Llama does not compute; transformers may."""


def read_config(path: Path | str) -> LlamaConfig:
    """The config in a folder's config.json, or in the file itself.

    Raises:
        UnsupportedModelError: it describes a model that `colrow.models.llama` cannot compute.
        ConfigError: there is none.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"{path} holds no config.json: give a Hugging Face folder or its config.json")
    text = read_text(file, "config", ConfigError)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} holds no mapping: give a Hugging Face folder or its config.json")
    return config_from_huggingface(tree, str(file))


def json_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one where there is none, or it cannot be read."""
    try:
        tree = json.loads(read_text(file, "file", ConfigError))
    except (ValueError, RecursionError):  # a ConfigError too
        return {}
    return tree if isinstance(tree, dict) else {}


def config_from_huggingface(tree: dict[str, Any], source: str = "config.json") -> LlamaConfig:
    """The config in the mapping that a config.json holds. Raises ConfigError as `read_config` does."""
    family = tree.get("model_type")
    if family not in (*FAMILIES, "mistral"):
        known = (*FAMILIES, "mistral")
        near = did_you_mean(family, known) if isinstance(family, str) else f"; known names: {', '.join(known)}"
        raise UnsupportedModelError(
            f"{source}: model_type {family!r} is not one that colrow's Llama computes{near}; "
            "for another family set model.implementation to transformers"
        )
    try:
        _refuse_other_arithmetic(tree, family)
        rope = _rope(tree)
        heads, hidden = _size(tree, "num_attention_heads"), _size(tree, "hidden_size")
        return LlamaConfig(
            vocab_size=_size(tree, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(tree, "intermediate_size"),
            num_hidden_layers=_size(tree, "num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=_size(tree, "num_key_value_heads", heads),
            head_dim=_size(tree, "head_dim", 128 if family == "qwen3" else hidden // heads),
            max_position_embeddings=_size(tree, "max_position_embeddings"),
            rope_theta=_positive(rope, "rope_theta", 10_000.0),
            rope_scaling=_scaling(rope),
            rms_norm_eps=_positive(tree, "rms_norm_eps", 1e-6),
            tie_word_embeddings=bool(tree.get("tie_word_embeddings", False)),
            attention_bias=family == "qwen2",
            qk_norm=family == "qwen3",
            initializer_range=_number(tree, "initializer_range", 0.02),
            embedding_range=None if tree.get("embedding_range") is None else _number(tree, "embedding_range"),
        )
    except KeyError as error:
        raise UnsupportedModelError(f"{source}: {error.args[0]} is missing") from error
    except ConfigError as error:
        raise type(error)(f"{source}: {error}") from error


def config_to_huggingface(config: LlamaConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The content of config.json for a model whose weights are stored in `dtype`.

    The rotary embedding is written twice, as transformers 5 (`rope_parameters`) and as transformers 4 (`rope_theta`,
    `rope_scaling`) read it.

    Raises:
        ConfigError: no class of transformers has this combination of options.
    """
    if config.attention_bias and config.qk_norm:
        raise ConfigError(
            "attention_bias and qk_norm together are no Hugging Face model that has no bias on o_proj: "
            "a model with one of them can be exported"
        )
    family = "llama"
    if config.attention_bias:
        family = "qwen2"
    elif config.qk_norm:
        family = "qwen3"
    scaling = None
    if config.rope_scaling is not None:
        scaling = {"rope_type": "llama3", **asdict(config.rope_scaling)}
    tree: dict[str, Any] = {
        "architectures": [f"{FAMILIES[family]}ForCausalLM"],
        "model_type": family,
        **{key: getattr(config, key) for key in SIZES},
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "rope_parameters": {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"})},
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
    }
    if config.embedding_range is not None:  # a key of ours, which transformers keeps and does not use
        tree["embedding_range"] = config.embedding_range
    if scaling is not None:
        tree["rope_scaling"] = {**scaling, "rope_theta": config.rope_theta}
    if family == "llama":
        tree |= {"attention_bias": False, "mlp_bias": False}
    if family == "qwen3":
        tree |= {"attention_bias": False}
    if family != "llama":
        tree |= {"use_sliding_window": False, "sliding_window": None}
    return tree


def name_to_huggingface(name: str) -> str:
    """`layers.0.mlp.up_proj.weight` -> `model.layers.0.mlp.up_proj.weight`; the head and names of other models stay."""
    return _PREFIX + name if name.partition(".")[0] in _TOP else name


def name_from_huggingface(name: str) -> str:
    """The inverse of `name_to_huggingface`."""
    bare = name.removeprefix(_PREFIX)
    return bare if bare.partition(".")[0] in _TOP else name


def stored_name(name: str, tied: bool) -> str:
    """The name under which a parameter is initialised and stored: a tied head is the embedding."""
    return _EMBEDDING if tied and name == _HEAD else name


_MOST_LAYERS = 10_000
"""The bound of `model.layers` too: building a layer takes milliseconds."""


def _size(tree: dict[str, Any], key: str, default: int | None = None) -> int:
    """A positive whole number. Raises KeyError where it is missing without a default, ConfigError where it is none."""
    value = tree.get(key) if default is not None else tree[key]
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1 or not 0 < value < 1 << 40:
        raise ConfigError(f"{key} is {str(tree.get(key, value))[:40]!r}: give a positive whole number")
    if key == "num_hidden_layers" and value > _MOST_LAYERS:
        raise ConfigError(f"{key} is {value}: no model has more than {_MOST_LAYERS:,} layers")
    return int(value)


def _number(tree: dict[str, Any], key: str, default: float | None = None) -> float:
    """A finite number. Raises as `_size` does."""
    value = tree[key] if default is None else tree.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise ConfigError(f"{key} is {str(value)[:40]!r}: give a finite number")
    return float(value)


def _positive(tree: dict[str, Any], key: str, default: float) -> float:
    """A finite number above 0. Raises as `_size` does."""
    value = _number(tree, key, default)
    if value <= 0:
        raise ConfigError(f"{key} is {value:g}: give a number above 0")
    return value


def _refuse_other_arithmetic(tree: dict[str, Any], family: str) -> None:
    """Raise for options that change the logits and that colrow's Llama would ignore."""
    wrong = None
    if tree.get("hidden_act", "silu") != "silu":
        wrong = f"hidden_act={tree['hidden_act']!r}: only silu is computed"
    elif family != "qwen2" and tree.get("attention_bias"):
        wrong = "attention_bias puts a bias on o_proj too, which is not computed"
    elif tree.get("mlp_bias"):
        wrong = "mlp_bias is not computed"
    elif tree.get("use_sliding_window") or (family == "mistral" and tree.get("sliding_window") is not None):
        wrong = f"sliding_window={tree.get('sliding_window')}: only full attention is computed"
    elif "quantization_config" in tree:
        wrong = "quantized weights are not read: give a folder in bfloat16 or float32"
    elif _number(_rope(tree), "partial_rotary_factor", 1.0) != 1.0:
        wrong = "partial_rotary_factor: only a rotation of complete heads is computed"
    if wrong is not None:
        raise UnsupportedModelError(f"{wrong}; set model.implementation to transformers to train it as it is")


def _rope(tree: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of transformers 4."""
    top = {key: tree[key] for key in ("rope_theta", "partial_rotary_factor") if tree.get(key) is not None}
    rope = tree.get("rope_scaling") or tree.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"rope_scaling is {str(rope)[:40]!r}: give a mapping")
    return {**top, **rope}


def _scaling(rope: dict[str, Any]) -> Llama3Scaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise UnsupportedModelError(
            f"rope_type {rope_type!r} is not computed, only default and llama3; "
            "set model.implementation to transformers to train it as it is"
        )
    return Llama3Scaling(
        factor=_number(rope, "factor"),
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position_embeddings=_size(rope, "original_max_position_embeddings"),
    )
