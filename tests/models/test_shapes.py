"""Named sizes, and the numbers that follow from them."""

from __future__ import annotations

import pytest
import torch

from colrow.errors import ConfigError
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES, flops_per_token, parameter_count, shape


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted_as_the_model_has_them(name: str) -> None:
    with torch.device("meta"):
        model = Llama(shape(name))
    assert parameter_count(shape(name)) == sum(p.numel() for p in model.parameters())


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
    assert parameter_count(shape(name)) / 1e9 == pytest.approx(billions, abs=5e-4)


def test_flops_of_llama3_8b() -> None:
    """51.5 and 57.9 GFLOP a token at 8,192 tokens: the two conventions of the field."""
    config = shape("llama3-8b")
    assert flops_per_token(config, 8192, causal=True) / 1e9 == pytest.approx(51.5, abs=0.05)
    assert flops_per_token(config, 8192, causal=False) / 1e9 == pytest.approx(57.9, abs=0.05)


def test_a_tied_head_still_costs_its_product() -> None:
    config = shape("llama3.2-1b")
    matrices = parameter_count(config)  # the tied table counts once, as the head
    assert flops_per_token(config, 0, causal=True) == 6 * matrices


def test_an_unknown_shape_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown shape 'llama3_8b'; did you mean 'llama3-8b'\?"):
        shape("llama3_8b")
