"""A model's memory divided over ranks, for reading and writing weights: no rank could hold it alone, none computes."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from colrow.parallel.parallelize import tie, tied_parameters


def spread(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut every parameter of a model on the meta device along its first dimension over a 1-D mesh, in place."""
    ties = tied_parameters(model)
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            placed = distribute_tensor(param.detach(), mesh, [Shard(0)], src_data_rank=None)
            module.register_parameter(name, nn.Parameter(placed, requires_grad=param.requires_grad))
    tie(model, ties)
    return model
