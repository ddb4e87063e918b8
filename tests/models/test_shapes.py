"""Named sizes, and the numbers that follow from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from colrow import config_sections
from colrow.errors import ConfigError
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES, flops_per_token, shape


def parameter_count(name: str) -> int:
    with torch.device("meta"):
        return sum(param.numel() for param in Llama(shape(name)).parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_flops_count_every_matrix_and_no_lookup(name: str) -> None:
    """A head that is tied to the embedding still costs its product."""
    config = shape(name)
    lookup = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    assert flops_per_token(config, 0, causal=True) == 6 * (parameter_count(name) - lookup)


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("llama2-7b", 6.738),
        ("llama3-8b", 8.030),
        ("llama3-70b", 70.554),
        ("qwen3-8b", 8.191),
        ("llama3.2-1b", 1.236),
    ],
)
def test_sizes_are_those_of_the_published_models(name: str, billions: float) -> None:
    assert parameter_count(name) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_the_help_of_the_config_key_lists_every_shape() -> None:
    listed = re.search(r'"""A named shape: (.*)\."""', Path(config_sections.__file__).read_text(encoding="utf-8"))
    assert listed is not None
    assert listed[1].split(", ") == list(SHAPES), "list the names of SHAPES, in order, in ModelSection.shape"


def test_flops_of_llama3_8b() -> None:
    """51.5 and 57.9 GFLOP a token at 8,192 tokens: the two conventions of the field."""
    config = shape("llama3-8b")
    assert flops_per_token(config, 8192, causal=True) / 1e9 == pytest.approx(51.5, abs=0.05)
    assert flops_per_token(config, 8192, causal=False) / 1e9 == pytest.approx(57.9, abs=0.05)


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown shape 'llama3_8b'; did you mean 'llama3-8b'\?"):
        shape("llama3_8b")
