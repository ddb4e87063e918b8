"""Which modules are gathered together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from colrow.errors import ConfigError
from colrow.models.llama import Llama
from colrow.parallel.data_parallel import head_unit, refuse_scalars
from helpers.parity import TINY


def test_norm_and_head_are_one_unit() -> None:
    model = Llama(TINY)
    assert head_unit(model, list(model.layers)) == [model.norm, model.lm_head]


def test_a_head_that_shares_the_embedding_stays_in_the_root_unit() -> None:
    model = Llama(replace(TINY, tie_word_embeddings=True))
    assert head_unit(model, list(model.layers)) == []


def test_a_stage_without_a_head_has_no_head_unit() -> None:
    model = Llama(TINY)
    model.norm = model.lm_head = None
    assert head_unit(model, list(model.layers)) == []


def test_blocks_that_share_a_parameter_are_refused() -> None:
    model = Llama(TINY)
    first, second = model.layers
    assert isinstance(first.mlp, nn.Module)
    second.mlp = first.mlp
    with pytest.raises(ConfigError, match=r"block 1 shares its parameter mlp\.\w+_proj\.weight"):
        head_unit(model, [first, second])


def test_parameters_without_dims_are_refused_by_name() -> None:
    model = Llama(TINY)
    refuse_scalars(model)
    model.norm.gain = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ConfigError, match=r"^norm\.gain: .*torch\.ones\(1\)"):
        refuse_scalars(model)
