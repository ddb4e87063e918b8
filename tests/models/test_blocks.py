"""Which modules are a model's blocks: the layers, whatever container they stand in and whatever stands in them."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from colrow.models.blocks import block_stacks, blocks_of
from colrow.models.llama import Llama
from helpers.parity import TINY


class Layer(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)
        if experts:
            self.experts = nn.ModuleList(Layer() for _ in range(experts))


class Wrapped(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def layers(n: int, **options: int) -> list[Layer]:
    return [Layer(**options) for _ in range(n)]


CONTAINERS: dict[str, Any] = {
    "list": nn.ModuleList,
    "sequential": lambda blocks: nn.Sequential(*blocks),
    "dict": lambda blocks: nn.ModuleDict({str(i): block for i, block in enumerate(blocks)}),
    "named dict": lambda blocks: nn.ModuleDict({f"layer_{i}": block for i, block in enumerate(blocks)}),
    "named sequential": lambda blocks: nn.Sequential(OrderedDict((f"h{i}", b) for i, b in enumerate(blocks))),
}


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=list(CONTAINERS))
def test_layers_are_the_blocks_in_any_container(container: Any) -> None:
    blocks = layers(3)
    model = Wrapped(embed=nn.Embedding(8, 4), layers=container(blocks), head=nn.Linear(4, 8))
    assert blocks_of(model) == blocks
    assert [stack.name for stack in block_stacks(model)] == ["layers"]


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=list(CONTAINERS))
def test_experts_belong_to_their_layer(container: Any) -> None:
    blocks = layers(4, experts=8)
    assert blocks_of(Wrapped(layers=container(blocks))) == blocks


def test_a_model_that_is_a_sequential_has_the_layers_between_embedding_and_head() -> None:
    blocks = layers(3)
    model = nn.Sequential(nn.Embedding(8, 4), *blocks, nn.LayerNorm(4), nn.Linear(4, 8))
    (stack,) = block_stacks(model)
    assert (stack.name, list(stack.blocks)) == ("", ["1", "2", "3"])


@pytest.mark.parametrize(
    "join",
    [
        lambda encoder, decoder: Wrapped(encoder=encoder, decoder=decoder),
        nn.Sequential,
        lambda encoder, decoder: nn.ModuleDict({"encoder": encoder, "decoder": decoder}),
    ],
    ids=["attributes", "sequential", "dict"],
)
def test_an_encoder_and_a_decoder_are_two_stacks(join: Any) -> None:
    model = join(nn.Sequential(*layers(2)), nn.Sequential(*layers(3)))
    assert [len(stack.blocks) for stack in block_stacks(model)] == [2, 3]


def test_a_layer_may_be_a_sequential() -> None:
    blocks = [nn.Sequential(nn.LayerNorm(4), Layer(), nn.Linear(4, 4)) for _ in range(3)]
    assert blocks_of(Wrapped(layers=nn.ModuleList(blocks))) == blocks


def test_one_layer_is_a_block_and_linears_are_none() -> None:
    assert len(blocks_of(Wrapped(layers=nn.ModuleList(layers(1))))) == 1
    assert blocks_of(Wrapped(heads=nn.ModuleList(nn.Linear(4, 4) for _ in range(9)))) == []
    assert blocks_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == []


def test_a_pipeline_stage_has_the_blocks_that_are_left() -> None:
    model = Llama(TINY)
    kept = model.layers[1]
    model.layers[0] = None  # type: ignore[assignment]
    assert blocks_of(model) == [kept]


SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
T5: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_heads": 2, "vocab_size": 32, "num_layers": 4}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], dict[str, tuple[str, int]]]] = {
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2, "num_local_experts": 8},
        {"model.layers": ("MixtralDecoderLayer", 4)},
    ),
    "switch": (
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {**T5, "num_decoder_layers": 3, "num_experts": 8},
        {"encoder.block": ("SwitchTransformersBlock", 4), "decoder.block": ("SwitchTransformersBlock", 3)},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**T5, "num_decoder_layers": 2},
        {"encoder.block": ("T5Block", 4), "decoder.block": ("T5Block", 2)},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": 32, "n_embd": 16, "n_layer": 3, "n_head": 2},
        {"transformer.h": ("GPT2Block", 3)},
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {**SIZES, "num_hidden_layers": 3},
        {"bert.encoder.layer": ("BertLayer", 3)},
    ),
}


@pytest.mark.parametrize(("config", "cls", "sizes", "want"), TRANSFORMERS.values(), ids=list(TRANSFORMERS))
def test_stacks_of_transformers_models(
    config: str, cls: str, sizes: dict[str, Any], want: dict[str, tuple[str, int]]
) -> None:
    import transformers

    with torch.device("meta"):
        model = getattr(transformers, cls)(getattr(transformers, config)(**sizes))
    found = {stack.name: [type(block).__name__ for block in stack.blocks.values()] for stack in block_stacks(model)}
    assert found == {name: [block] * n for name, (block, n) in want.items()}
