"""Modules whose dropout on shards is arranged: nested, recomputed, compiled, and where they draw more than was seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colrow.parallel.activation_checkpoint import MODES, apply_activation_checkpoint
from colrow.parallel.compile import compile_forward
from colrow.parallel.random_draws import DrawsChangedError, arrange_draws
from colrow.sharding.draws import Draw
from colrow.sharding.local_layout import REPLICATED, sharded
from colrow.torch_compat import compiled_graph_count, fake_store

ROWS, COLUMNS = Draw(sharded(0)), Draw(sharded(1))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5)


class Block(nn.Module):
    """Drops elements of a tensor that every rank holds; the module inside, of a shard."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = Inner(), nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale) * F.dropout(torch.ones(3, dtype=torch.float64), 0.5)


class Outer(nn.Module):
    """Drops elements of a shard before and after the block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.block(F.dropout(x, 0.5)), 0.5)


DRAWS = {"": (ROWS, ROWS), "block.inner": (COLUMNS,), "block": (Draw(REPLICATED),)}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """The second of two ranks, of which the others do not exist."""
    dist.init_process_group("fake", store=fake_store(), rank=1, world_size=2)
    yield init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    dist.destroy_process_group()


def masks_of_the_second_rank() -> Tensor:
    """The product of the masks that `Outer` draws, of the shards of rank 1, in the order of its forward."""
    torch.manual_seed(3)
    rows, columns, ones = ((4, 3), (2, 6), (3,))
    first, inner, whole, last = (
        F.dropout(torch.ones(n, dtype=torch.float64), 0.5) for n in (rows, columns, ones, rows)
    )
    return first[2:] * inner[:, 3:] * whole * last[2:]


def step(model: nn.Module) -> list[Tensor]:
    x = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y = model(x)
    y.sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad]


@pytest.mark.parametrize("mode", MODES)
def test_each_module_draws_its_own_shards(mesh: DeviceMesh, mode: Any) -> None:
    model = Outer()
    arrange_draws(model, DRAWS, mesh)
    apply_activation_checkpoint([model.block], mode)
    want = masks_of_the_second_rank()
    assert want.count_nonzero() > 0
    assert all(torch.equal(got, want) for got in step(model))


@pytest.mark.parametrize(("block", "graphs"), [(ROWS, 0), (Draw(REPLICATED), 2)])
def test_compiled_blocks_leave_out_what_draws_for_shards(mesh: DeviceMesh, block: Draw, graphs: int) -> None:
    """A block that draws for shards itself is not compiled; one with such a module in it, in two graphs."""
    torch._dynamo.reset()
    model = Outer()
    arrange_draws(model, DRAWS | {"block": (block,)}, mesh, compiled=[model.block])
    compile_forward(model.block, backend="aot_eager")
    before = compiled_graph_count()
    got = step(model)
    assert compiled_graph_count() - before == graphs
    if graphs:
        assert all(torch.equal(each, masks_of_the_second_rank()) for each in got)


def test_a_module_that_draws_more_than_was_seen_is_named(mesh: DeviceMesh) -> None:
    model = Outer()
    arrange_draws(model, {"": (ROWS,), "block.inner": (COLUMNS,), "block": (Draw(REPLICATED),)}, mesh)
    with pytest.raises(
        DrawsChangedError, match="module model draws random numbers for more tensors than in the dry run"
    ):
        step(model)
