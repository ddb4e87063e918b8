"""Memory for a model of the meta device, and the same initial bits on every mesh."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from colrow.errors import ConfigError
from colrow.mesh import Mesh
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.initialize import fill_seeded, materialize
from colrow.parallel.parallelize import parallelize, tied_parameters
from colrow.plans.plan import Plan
from colrow.sharding.layout import full_tensor, held_regions, local_tensor, packed_of
from helpers.harness import Ranks
from helpers.llamas import OPTIONS, meta, seeded


def test_tied_parameters_stay_tied() -> None:
    model = meta(tie_word_embeddings=True)
    assert materialize(model, "cpu") is model
    assert tied_parameters(model) == [["embed_tokens.weight", "lm_head.weight"]]
    assert not any(p.is_meta for p in model.parameters())


def test_values_that_exist_are_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model.append(nn.Linear(2, 2, device="meta"))
    before = model[0].weight.clone()
    model[1].running_mean.fill_(5.0)
    materialize(model, "cpu")
    assert torch.equal(model[0].weight, before)
    assert model[1].running_mean.eq(5.0).all()
    assert not model[2].weight.is_meta


def test_a_lost_buffer_is_refused() -> None:
    with torch.device("meta"):
        model = nn.BatchNorm1d(2)
    with pytest.raises(ConfigError, match="buffer running_mean and 2 more were lost"):
        materialize(model, "cpu")


def test_a_wrapped_block_starts_from_the_same_bits() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = meta()
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    materialize(model, "cpu")
    fill_seeded(model, 3)
    for ours, theirs in zip(model.parameters(), seeded().parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_tied_head_of_a_last_stage_is_the_embedding() -> None:
    whole, last = seeded(tie_word_embeddings=True), meta(tie_word_embeddings=True)
    last.embed_tokens = None
    materialize(last, "cpu")
    fill_seeded(last, 3)
    assert last.lm_head is not None
    assert whole.lm_head is not None
    assert torch.equal(last.lm_head.weight, whole.lm_head.weight)


def test_a_model_without_a_config_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Linear has no config\.num_hidden_layers"):
        fill_seeded(nn.Linear(2, 2), 0)


def sharded_case(device: str, preset: str, mesh: Mesh, options: dict[str, object]) -> dict[str, bool]:
    """For each parameter: whether this rank's shard, and the gathered whole, have the bits of one process."""
    model = meta(**options)
    device_mesh = mesh.build(device, dist.get_world_size())
    parallelize(model, Plan.preset(preset), device_mesh)
    apply_data_parallel(model, device_mesh, model.layers, param_dtype=None, reshard_after_forward=False)
    materialize(model, device)
    fill_seeded(model, 3)
    whole = dict(seeded(device, **options).named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(whole)
    assert len(tied_parameters(model)) == int(bool(options.get("tie_word_embeddings")))
    same = {"something is sharded": any(local_tensor(p).shape != p.shape for p in model.parameters())}
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor), name
        packed = packed_of(model, name)
        same[f"{name} here"] = all(
            torch.equal(local_tensor(param)[place.slices], whole[name][region.slices])
            for region, place in held_regions(param, packed).items()
        )
        same[name] = torch.equal(full_tensor(param.detach(), packed), whole[name])
    return same


@pytest.mark.distributed
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("preset", ["llama", "article"])
def test_every_mesh_starts_from_the_bits_of_one_process(ranks: Ranks, preset: str, options: dict[str, object]) -> None:
    for same in ranks(2).run(sharded_case, preset, Mesh(tp=2), options):
        assert all(same.values()), [name for name, equal in same.items() if not equal]


@pytest.mark.distributed
@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2, tp=2), Mesh(dp_replicate=2, tp=2)], ids=str)
def test_data_parallel_meshes_start_from_the_bits_of_one_process(
    ranks: Ranks, mesh: Mesh, options: dict[str, object]
) -> None:
    for same in ranks(4).run(sharded_case, "llama", mesh, options):
        assert all(same.values()), [name for name, equal in same.items() if not equal]


def unseeded_case(device: str) -> bool:
    """What torch's own initialisation gives to the shards of a rank-wise seeded model."""
    model = meta()
    parallelize(model, Plan.preset("llama"), Mesh(tp=2).build(device, 2))
    materialize(model, device)
    torch.manual_seed(3)
    param = model.layers[0].mlp.up_proj.weight
    nn.init.normal_(local_tensor(param.detach()), std=0.02)
    return torch.equal(full_tensor(param.detach()), seeded(device).layers[0].mlp.up_proj.weight)


@pytest.mark.distributed
def test_drawing_from_a_generator_on_each_rank_would_be_seen(ranks: Ranks) -> None:
    assert ranks(2).run(unseeded_case) == [False, False]
