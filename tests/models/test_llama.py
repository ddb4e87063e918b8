"""The Llama computes what the transformers library computes, and its parts run alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from colrow.errors import ConfigError
from colrow.models.huggingface import config_from_huggingface, name_from_huggingface
from colrow.models.llama import Llama, rope_tables
from helpers.families import FAMILIES, token_ids, transformers_model
from helpers.llamas import tiny


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name: str) -> None:
    theirs = transformers_model(name)
    model = Llama(config_from_huggingface(theirs.config.to_dict()))
    model.load_state_dict({name_from_huggingface(k): v for k, v in theirs.state_dict().items()})
    ids = token_ids()
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_llama3_scaling_matters() -> None:
    """The comparison above would see a rope that ignores the scaling."""
    theirs = transformers_model("llama3-rope")
    tree = theirs.config.to_dict()
    tree["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    model = Llama(config_from_huggingface(tree))
    model.load_state_dict({name_from_huggingface(k): v for k, v in theirs.state_dict().items()})
    ids = token_ids()
    with torch.no_grad():
        assert (model(ids) - theirs(input_ids=ids).logits).abs().max() > 1e-3


def test_attention_is_causal() -> None:
    model, ids = tiny(), torch.arange(12)[None]
    changed = ids.clone()
    changed[0, 7] = 50
    with torch.no_grad():
        same = (model(ids) == model(changed)).all(-1)[0]
    assert same[:7].all()
    assert not same[7:].any()


def test_positions_may_be_given() -> None:
    model, ids = tiny(), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        plain = model(ids)
        assert torch.equal(plain, model(ids, torch.arange(6)))
        assert torch.equal(plain, model(ids, torch.arange(6).expand(2, 6)))
        shifted = model(ids, torch.arange(6) + 3)
    torch.testing.assert_close(shifted, plain)  # only distances count
    with torch.no_grad():
        assert not torch.allclose(model(ids, torch.arange(6) * 2), plain)


def test_a_mask_replaces_the_causal_one() -> None:
    model = tiny()
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    rope = rope_tables(model.config, torch.arange(6), x.dtype)
    block = model.layers[0]
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    torch.testing.assert_close(block(x, rope=rope, mask=causal), block(x, rope=rope))
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert not torch.allclose(block(x, rope=rope, mask=everything), block(x, rope=rope))


def test_stages_of_a_model_compute_what_the_model_computes() -> None:
    whole, ids = tiny(), torch.arange(12).reshape(2, 6)
    first, last = tiny(), tiny()
    first.norm = first.lm_head = first.layers[2] = None
    last.embed_tokens = last.layers[0] = last.layers[1] = None
    names = {name for name, _ in whole.named_parameters()}
    held = [{name for name, _ in stage.named_parameters()} for stage in (first, last)]
    assert held[0] | held[1] == names
    assert not held[0] & held[1]
    assert "layers.2.mlp.up_proj.weight" in held[1]
    with torch.no_grad():
        hidden = first(ids)
        assert hidden.shape == (2, 6, 32)
        assert torch.equal(last(hidden), whole(ids))
        assert torch.equal(last(hidden, seq_len=6), whole(ids))
        assert torch.equal(last(hidden, torch.arange(6)), whole(ids))


def test_rope_covers_the_whole_sequence_when_hidden_states_are_a_part() -> None:
    """Under sequence parallelism a stage receives a part of dim 1; the gather happens inside the block."""

    class Gather(nn.Module):
        def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
            lengths.append(kwargs["rope"][0].shape[-2])  # type: ignore[index]
            return x

    lengths: list[int] = []
    stage = tiny()
    stage.embed_tokens = stage.norm = stage.lm_head = None
    stage.layers = nn.ModuleList([Gather()])
    stage(torch.zeros(1, 3, 32), seq_len=6)
    stage(torch.zeros(1, 3, 32), torch.arange(6))
    assert lengths == [6, 6]


def test_tied_weights_are_one_parameter() -> None:
    model = tiny(tie_word_embeddings=True)
    assert model.lm_head is not None
    assert model.embed_tokens is not None
    assert model.lm_head.weight is model.embed_tokens.weight


def test_bf16_stays_bf16() -> None:
    model = tiny(qk_norm=True).bfloat16()
    assert model(torch.arange(6)[None]).dtype == torch.bfloat16


def test_there_are_no_buffers() -> None:
    assert not dict(tiny(qk_norm=True, attention_bias=True).named_buffers())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny(**options)
