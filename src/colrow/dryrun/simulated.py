"""All ranks of a tp mesh in this process: torch's LocalTensorMode runs every rank's tensors side by side.

The collectives are real in what they compute, and no data leaves the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colrow.errors import PlanError
from colrow.ops.parallel_linear import OPERATORS
from colrow.torch_compat import (
    TorchDispatchMode,
    fake_store,
    from_tensors_of_ranks,
    local_tensor_mode,
    tensors_of_ranks,
)


class Simulation:
    """The mesh, and what each rank has."""

    def __init__(self, mesh: DeviceMesh, mode: Any) -> None:
        self.mesh, self._mode = mesh, mode

    def parts(self, tensor: Tensor) -> dict[int, Tensor]:
        """A local tensor's value on each rank."""
        locals_ = tensors_of_ranks(tensor)
        if locals_ is None:
            return dict.fromkeys(range(self.mesh.size()), tensor)
        with self._mode.disable():
            return {rank: locals_[rank].clone() for rank in sorted(locals_)}

    def spread(self, model: nn.Module) -> None:
        """Give parameters memory for each rank: in one memory, a step in place would be taken tp times."""
        made: dict[int, nn.Parameter] = {}
        with self._mode.disable():
            for module in model.modules():
                for name, param in module._parameters.items():
                    if param is not None:
                        if id(param) not in made:
                            each = from_tensors_of_ranks(
                                {rank: param.detach().clone() for rank in range(self.mesh.size())}
                            )
                            made[id(param)] = nn.Parameter(each, param.requires_grad)
                        module._parameters[name] = made[id(param)]


class _Inside(TorchDispatchMode):
    """Runs what is inside the operators of `ops.parallel_linear` on all ranks' tensors: taken rank by rank, as torch
    takes an operator that it does not know, their collectives would meet nobody."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = OPERATORS.get(str(func.name())) if hasattr(func, "name") else None
        return (inside or func)(*args, **(kwargs or {}))


@contextmanager
def simulated_ranks(tp: int) -> Iterator[Simulation]:
    """A tp mesh of simulated ranks. Everything made here is gone afterwards.

    Raises:
        PlanError: a process group is there already.
    """
    if dist.is_initialized():
        raise PlanError("a process group exists already: simulated ranks need a process without one")
    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=tp)
    try:
        with local_tensor_mode(tp) as mode, _Inside():
            # a name of its own: DTensor's caches would hand these groups to a real mesh called alike
            yield Simulation(init_device_mesh("cpu", (tp,), mesh_dim_names=("simulated",)), mode)
    finally:
        dist.destroy_process_group()
