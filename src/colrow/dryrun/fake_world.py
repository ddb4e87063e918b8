"""A world of N ranks of which only one exists: collectives return at once, with tensors of the right shape.

Works beside a process group that is already there: the fake one is then a second group, and nothing is sent.

DTensor keeps what it has worked out in caches whose keys hold meshes, and takes two meshes for one when their ranks and
the names of their axes agree; the groups behind them do not count. So the meshes made here have names that no real one
has: a run that follows must not be handed a fake group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colrow.sharding.parameter_state import copied_model, set_states, states_of
from colrow.torch_compat import fake_group_beside, fake_store


@contextmanager
def fake_tp_mesh(tp: int) -> Iterator[DeviceMesh]:
    """A 1-D mesh as its first rank sees it. Everything made here is gone afterwards."""
    if not dist.is_initialized():
        dist.init_process_group("fake", store=fake_store(), rank=0, world_size=tp)
        try:
            yield init_device_mesh("cpu", (tp,), mesh_dim_names=("dry_run",))
        finally:
            dist.destroy_process_group()
        return

    first = dist.get_rank()  # the mesh holds this process as its first rank, and labels that need not exist
    ranks = [first + i for i in range(tp)]
    # always the same name: the caches remember groups by it
    name = f"colrow_dry_run_{tp}"
    group = fake_group_beside(name, ranks, timedelta(seconds=30))
    try:
        yield DeviceMesh.from_group(group, "cpu", mesh=torch.tensor(ranks), mesh_dim_names=("dry_run_beside",))
    finally:
        dist.destroy_process_group(group)


def meta_copy(model: nn.Module) -> nn.Module:
    """A deep copy whose parameters and buffers are on the meta device; ties stay, no weight is copied."""
    memo: dict[int, Any] = {}
    for param in model.parameters():
        memo[id(param)] = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copied_model(model, memo)


def materialize_fake(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Replace the model's meta tensors by fake CPU tensors, in `dtype` where they are floating-point. Ties stay."""

    def fake(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device="cpu")
        return made.to(dtype) if dtype is not None and made.is_floating_point() else made

    replace_parameters(model, fake)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)


def replace_parameters(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace each parameter by one that holds `change(param)`. Modules that share a parameter share the new one."""
    made: dict[int, nn.Parameter] = {}
    states = states_of(model)
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(change(param.detach()), param.requires_grad)
                module._parameters[name] = made[id(param)]
    set_states(model, states)
