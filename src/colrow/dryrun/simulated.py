"""All ranks of a tp mesh in this process: torch's LocalTensorMode runs every rank's tensors side by side.

The collectives are real in what they compute, and no data leaves the process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colrow.dryrun.fake_world import replace_parameters
from colrow.errors import PlanError
from colrow.ops.parallel_linear import OPERATORS
from colrow.torch_compat import (
    TorchDispatchMode,
    fake_store,
    forget_shardings,
    from_tensors_of_ranks,
    local_tensor_mode,
    tensors_of_ranks,
)


class Simulation:
    """A mesh whose ranks run side by side in this process."""

    def __init__(self, mesh: DeviceMesh, mode: Any) -> None:
        self.mesh, self._mode = mesh, mode

    def local_tensors(self, tensor: Tensor) -> dict[int, Tensor]:
        """A local tensor's value on each rank."""
        locals_ = tensors_of_ranks(tensor)
        if locals_ is None:
            return dict.fromkeys(range(self.mesh.size()), tensor)
        with self._mode.disable():
            return {rank: locals_[rank].clone() for rank in sorted(locals_)}

    def copy_to_ranks(self, model: nn.Module, buffers: Iterable[str] = ()) -> None:
        """Give each rank its own memory for parameters, and for the buffers that forward writes: in shared memory, an
        in-place change would be made tp times."""
        with self._mode.disable():
            replace_parameters(model, self._copies)
            for name in buffers:
                owner, _, leaf = name.rpartition(".")
                model.get_submodule(owner)._buffers[leaf] = self._copies(model.get_buffer(name))

    def _copies(self, tensor: Tensor) -> Tensor:
        return from_tensors_of_ranks({rank: tensor.clone() for rank in range(self.mesh.size())})


class _Inside(TorchDispatchMode):
    """Runs the bodies of the operators of `ops.parallel_linear` on all ranks' tensors at once. LocalTensorMode would
    run an operator that it does not know rank by rank, and its collectives would find no other rank."""

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
            # a name of its own: DTensor's caches would return these groups for a real mesh of the same name
            yield Simulation(init_device_mesh("cpu", (tp,), mesh_dim_names=("simulated",)), mode)
    except BaseException:
        forget_shardings()
        raise
    finally:
        dist.destroy_process_group()
