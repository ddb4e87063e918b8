"""config.json in and out, and parameter names both ways."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.errors import ConfigError
from colrow.models.huggingface import (
    config_from_huggingface,
    config_to_huggingface,
    name_from_huggingface,
    name_to_huggingface,
    read_config,
    stored_name,
)
from colrow.models.llama import Llama, Llama3Scaling
from colrow.models.shapes import SHAPES, shape
from helpers.families import FAMILIES, transformers_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_comes_back_as_it_was_written(name: str) -> None:
    assert config_from_huggingface(config_to_huggingface(shape(name), torch.bfloat16)) == shape(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_config_that_transformers_wrote_comes_back_too(name: str, tmp_path: Path) -> None:
    theirs = transformers_model(name).config
    theirs.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    assert config == config_from_huggingface(theirs.to_dict())
    assert config_from_huggingface(config_to_huggingface(config, torch.float32)) == config


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_reads_the_written_config(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    config = replace(shape(name), num_hidden_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(config_to_huggingface(config, torch.bfloat16)))
    with caplog.at_level(logging.WARNING):
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert not caplog.records, caplog.text
    assert theirs.dtype == torch.bfloat16
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
        ours = Llama(config)
    names = {name_from_huggingface(k): v.shape for k, v in model.state_dict().items()}
    assert names == {k: v.shape for k, v in ours.state_dict().items()}


def test_a_config_of_transformers_4_is_read() -> None:
    rope = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192}
    config = config_from_huggingface(LLAMA | {"rope_theta": 5e5, "rope_scaling": rope})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )
    assert config.num_key_value_heads == 4
    assert config.head_dim == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "gemma3"}, "model_type 'gemma3' is not one that colrow's Llama computes"),
        ({"model_type": "qwen"}, "did you mean 'qwen[23]'"),
        ({"model_type": None}, "known names: llama, qwen2, qwen3, mistral"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias puts a bias on o_proj too"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8}, "sliding_window=8"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type 'yarn' is not computed"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantized weights"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        config_from_huggingface(LLAMA | change)


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ConfigError, match="x: hidden_size is missing"):
        config_from_huggingface({k: v for k, v in LLAMA.items() if k != "hidden_size"}, "x")


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no mapping"):
        read_config(tmp_path / "config.json")


def test_options_that_no_class_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="attention_bias and qk_norm"):
        config_to_huggingface(replace(shape("laptop"), attention_bias=True, qk_norm=True), torch.float32)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_names_are_translated_both_ways(ours: str, theirs: str) -> None:
    assert name_to_huggingface(ours) == theirs
    assert name_from_huggingface(theirs) == ours
    assert name_to_huggingface(theirs) == theirs  # a model of the transformers library has its own names already


def test_a_tied_head_is_stored_as_the_embedding() -> None:
    assert stored_name("lm_head.weight", tied=True) == "embed_tokens.weight"
    assert stored_name("lm_head.weight", tied=False) == "lm_head.weight"
