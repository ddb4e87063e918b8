"""The wrappers of FSDP2's private names, called: see `test_torch_compat.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from colrow import torch_compat as tc


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which only the first exists."""
    dist.init_process_group("fake", store=tc.fake_store(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_units_of_fsdp2_show_and_fill_their_gradients(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ModuleDict({"used": nn.Linear(2, 2), "not": nn.Linear(2, 2)}))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    root, first = tc.fsdp_units(model)
    assert (root.module, first.module) == (model, model[0])
    assert len(root.parameters()) == 4
    seen: list[Any] = []
    root.before_reduction(lambda unit: seen.append([g is not None for g in unit.unreduced_gradients(fill=True)]))
    root.at_end_of_backward(lambda: (seen.append("before the end"), root.reduce_if_left()), lambda: seen.append("end"))

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        passed = first.run_without_forward(torch.zeros(()), trained=True)
        return self[1]["used"](x).sum() + passed  # type: ignore[index]

    with mock.patch.object(type(model), "forward", forward):
        model(torch.ones(1, 2)).backward()
    assert seen == ["before the end", [True, True, False, False], "end"]  # the root's input has no gradient
    assert all(param.grad is not None for param in root.parameters())


def test_a_unit_of_fsdp2_of_which_one_module_ran_ends_its_forward(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    fully_shard([model[0], model[1]], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    reduced: list[tc.FsdpUnit] = []
    for each in tc.fsdp_units(model):  # backward ends in the one in which it began
        each.at_end_of_backward(lambda: None, lambda: None)
    unit = next(unit for unit in tc.fsdp_units(model) if unit.parameters())
    unit.before_reduction(reduced.append)
    forward = mock.patch.object(type(model), "forward", lambda self, x: unit.finish_forward(self[1](x)))
    for _ in range(2):  # in torch 2.11 the second forward would gather nothing, and each backward reduce twice
        with forward:
            model(torch.ones(1, 2, requires_grad=True)).sum().backward()
    assert reduced == [unit, unit]
    assert model[1].weight.grad is not None


def test_a_unit_of_fsdp2_takes_part_in_a_backward_that_does_not_reach_its_output(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for module in (model[0], model):
        fully_shard(module, mesh=mesh)
    _, first = tc.fsdp_units(model)
    reduced: list[tc.FsdpUnit] = []
    first.before_reduction(reduced.append)

    def forward(self: nn.Sequential, x: Tensor) -> Tensor:
        hidden = self[0](x).detach()
        passed = first.run_backward_alone(torch.zeros((), requires_grad=True), trained=True)
        return self[1](hidden) + passed

    with mock.patch.object(type(model), "forward", forward):
        output = model(torch.ones(1, 2))
        assert not reduced
        output.sum().backward()
    assert reduced == [first]
    assert model[0].weight.grad is None
    assert model[1].weight.grad is not None


def test_replicas_of_fsdp2_exist() -> None:
    assert callable(tc.replicas_of_fsdp2())
