"""Which modules are gathered together."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.errors import ConfigError
from colrow.mesh import Mesh
from colrow.models.llama import Llama
from colrow.parallel.data_parallel import apply_data_parallel, head_unit, refuse_scalars
from colrow.parallel.outputs import flatten_tensors
from colrow.torch_compat import fake_store, fsdp_units
from helpers.parity import TINY


@dataclass(frozen=True)
class Output:
    logits: Tensor
    name: str = "output"


def test_tensors_of_outputs_that_are_no_trees_of_torch_are_replaced() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    for output in (one, (one, 3), Output(one), SimpleNamespace(logits=one, size=2), [Output(one), {"more": 1}]):
        leaves, rebuild = flatten_tensors(output)
        made = rebuild([two if leaf is one else leaf for leaf in leaves])
        assert type(made) is type(output)
        assert [leaf is two for leaf in flatten_tensors(made)[0]] == [leaf is one for leaf in leaves]
        assert sum(leaf is one for leaf in flatten_tensors(output)[0]) == 1, "the given one is as it was"
    assert rebuild([two, "output"]) == [Output(two), {"more": 1}]


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


def test_a_head_whose_norm_is_in_an_inner_module_is_one_unit_of_data_ranks() -> None:
    """As in transformers' models, where the head's first module is not the first of the model's."""
    inner = nn.Module()
    inner.embed_tokens, inner.layers, inner.norm = nn.Embedding(4, 4), nn.ModuleList([nn.Linear(4, 4)]), nn.LayerNorm(4)
    model = nn.Sequential(OrderedDict(model=inner, lm_head=nn.Linear(4, 4)))
    assert head_unit(model, list(inner.layers)) == [model.lm_head, inner.norm]
    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=2)
    try:
        mesh = Mesh(dp_shard=2).build("cpu", 2)
        apply_data_parallel(model, mesh, inner.layers, param_dtype=None)
        assert [len(unit.parameters()) for unit in fsdp_units(model)] == [1, 2, 4]
    finally:
        dist.destroy_process_group()
