"""Regions say exactly which indices a rank holds: together the ranks' regions tile the tensor."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from colrow.mesh import Mesh
from colrow.sharding.layout import Packed, full_tensor, held_regions, regions_at
from helpers.harness import Ranks


@pytest.mark.parametrize("shape", [(12, 6), (7, 5), (2, 3)])
@pytest.mark.parametrize(
    "placements",
    [
        (Shard(0), Shard(1)),
        (Shard(0), Shard(0)),
        (_StridedShard(0, split_factor=2), Shard(0)),
        (Replicate(), Shard(1)),
        (Replicate(), Replicate()),
    ],
)
def test_regions_tile_the_tensor(shape: tuple[int, int], placements: tuple[Placement, Placement]) -> None:
    seen = torch.zeros(shape)
    for coordinate in product(range(3), range(2)):
        for region in regions_at(shape, placements, (3, 2), coordinate):
            seen[region.slices] += 1
    copies = 1
    for placement, parts in zip(placements, (3, 2), strict=True):
        copies *= parts if placement.is_replicate() else 1
    assert torch.equal(seen, torch.full(shape, float(copies)))


def test_a_packed_shard_takes_its_part_of_each_segment() -> None:
    first = regions_at((16, 3), (Shard(0),), (2,), (0,), Packed(0, (8, 4, 4)))
    assert [(region.offset[0], place.offset[0], region.size[0]) for region, place in first.items()] == [
        (0, 0, 4),
        (8, 4, 2),
        (12, 6, 2),
    ]
    fsdp = regions_at((16, 3), (_StridedShard(0, split_factor=2), Shard(0)), (2, 2), (1, 0), Packed(0, (8, 4, 4)))
    assert [(region.offset[0], place.offset[0], region.size[0]) for region, place in fsdp.items()] == [
        (8, 0, 2),
        (12, 2, 2),
    ]


def test_a_pending_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="redistribute it first"):
        regions_at((4,), (Partial(),), (2,), (0,))


def largest_allocation_case(device: str) -> int:
    """Elements of the largest tensor that this project's code makes to gather a parameter without segments."""
    mesh = Mesh(tp=2).build(device, 2)
    sharded = distribute_tensor(torch.arange(8.0, device=device), mesh["tp"], [Shard(0)])
    made, zeros = [0], torch.zeros

    def counted(shape: tuple[int, ...], **options: Any) -> torch.Tensor:
        made.append(torch.Size(shape).numel())
        return zeros(shape, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", counted)
        full_tensor(sharded)
        assert max(made) == 0
        full_tensor(sharded, Packed(0, (4, 4)))  # the control: here it is needed
    return max(made)


@pytest.mark.distributed
def test_only_a_packed_parameter_is_gathered_into_zeros(ranks: Ranks) -> None:
    assert ranks(2).run(largest_allocation_case) == [8, 8]


def real_shards_case(device: str) -> None:
    """What regions say is what FSDP2 over TP, and TP alone, really hold."""
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = Mesh(dp_shard=2, tp=2).build(device, 4)
    for rows, style in product((8, 12, 10), (ColwiseParallel, RowwiseParallel)):
        torch.manual_seed(0)
        linear = nn.Linear(8, rows, bias=False, device=device)
        whole = linear.weight.detach().clone()
        model = fully_shard(
            parallelize_module(nn.Sequential(linear), mesh["tp"], {"0": style()}), mesh=mesh["dp_shard"]
        )
        weight = model.get_parameter("0.weight")
        assert isinstance(weight, DTensor)
        local = weight.to_local().detach()
        filled = torch.full_like(local, float("nan"))
        for region, place in held_regions(weight).items():
            filled[place.slices] = whole[region.slices]
        assert torch.equal(filled, local)
        assert torch.equal(full_tensor(weight.detach()), whole)
    packed = Packed(0, (4, 2, 2))
    order = torch.tensor([0, 1, 4, 6, 2, 3, 5, 7], device=device)  # rank 0's rows, then rank 1's
    whole = torch.arange(8.0, device=device)
    sharded = distribute_tensor(whole[order], mesh["tp"], [Shard(0)])
    assert torch.equal(full_tensor(sharded, packed), whole)
    assert not torch.equal(full_tensor(sharded), whole)  # without the packing the order is the ranks'


@pytest.mark.distributed
def test_regions_are_what_ranks_hold(ranks: Ranks) -> None:
    ranks(4).run(real_shards_case)
