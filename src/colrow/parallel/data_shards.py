"""Parameters as DTensors on the data axes and tp, with FSDP2's placements and without FSDP2.

dp_shard shards dim 0 of what tp has left on a rank, as torch.chunk does; replicas hold copies. So a parameter's name,
mesh and placements, its files and the optimizer's state are the same under both data engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import ConfigError
from colrow.mesh import MeshAxes
from colrow.sharding.layout import chunk_sizes, local_tensor
from colrow.sharding.parameter_state import refuse_hooks, set_states, states_of
from colrow.torch_compat import StridedShard

_UNSHARDED = "_colrow_unsharded"  # module attribute: {parameter name: Unsharded}


@dataclass(frozen=True)
class Unsharded:
    """What the model computes with: a parameter before the data axes shard it.

    Attributes:
        local: this rank's shape of it.
        shape, stride: the global ones.
        mesh, placements: of tp; None and empty for a plain tensor.
    """

    local: torch.Size
    shape: torch.Size
    stride: tuple[int, ...]
    mesh: DeviceMesh | None
    placements: tuple[Placement, ...]

    def wrapped(self, local: Tensor) -> Tensor:
        """`local`, of this rank's shape, as the model's code expects it."""
        if self.mesh is None:
            return local
        options = {"run_check": False, "shape": self.shape, "stride": self.stride}
        return DTensor.from_local(local, self.mesh, self.placements, **options)  # type: ignore[arg-type]


@torch.no_grad()
def shard_over_data(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make every parameter a DTensor on the data axes that have several ranks, and tp, in place.

    Afterwards the model cannot run by itself: `FlatWeights` gives it what it computes with. Tied parameters stay tied,
    and keep their attributes.

    Raises:
        ConfigError: a parameter has a hook, no dimension to shard, or gaps in memory.
    """
    refuse_hooks(model, "mesh.data_engine: flat")
    states, axes = states_of(model), MeshAxes(mesh)
    made: dict[nn.Parameter, tuple[nn.Parameter, Unsharded]] = {}
    for module_name, module in model.named_modules():
        for name, param in list(module._parameters.items()):
            if param is None:
                continue
            if param not in made:
                made[param] = _sharded(param, mesh, axes, f"{module_name}.{name}".lstrip("."))
            sharded, unsharded = made[param]
            module.register_parameter(name, sharded)
            module.__dict__.setdefault(_UNSHARDED, {})[name] = unsharded
    set_states(model, states)


def unsharded_of(module: nn.Module, name: str) -> Unsharded:
    """What a module's own parameter was before `shard_over_data`."""
    found: Unsharded = module.__dict__[_UNSHARDED][name]
    return found


def _sharded(param: nn.Parameter, mesh: DeviceMesh, axes: MeshAxes, name: str) -> tuple[nn.Parameter, Unsharded]:
    """The parameter on the data axes and tp, and what the model computes with in its place."""
    local, shards = local_tensor(param.detach()), axes.size("dp_shard")
    advice = f"set it apart as a buffer, or set mesh.data_engine: fsdp2 (mesh.dp_shard is {shards})"
    if shards > 1 and local.dim() == 0:
        raise ConfigError(f"parameter {name} is a scalar, which data ranks cannot shard: make it [1], or a buffer")
    if not local.is_contiguous():
        raise ConfigError(f"parameter {name} has gaps in memory: make it contiguous, or {advice}")
    tp_mesh, tp_placements = (param.device_mesh, param.placements) if isinstance(param, DTensor) else (None, ())
    unsharded = Unsharded(local.shape, param.shape, param.stride(), tp_mesh, tuple(tp_placements))
    names, placements = _placements(axes, tp_placements)
    if shards > 1:
        # a clone: a view would keep the memory of the unsharded parameter
        local = local.split(chunk_sizes(local.shape[0], shards))[axes.rank("dp_shard")].clone()
    placed = DTensor.from_local(
        local, mesh[names], placements, run_check=False, shape=unsharded.shape, stride=unsharded.stride
    )
    return nn.Parameter(placed, requires_grad=param.requires_grad), unsharded


def _placements(axes: MeshAxes, tp: Sequence[Placement]) -> tuple[tuple[str, ...], list[Placement]]:
    """Axes and placements of a sharded parameter, by the placements of tp alone."""
    by_axis: dict[str, Placement] = {}
    if axes.size("dp_replicate") > 1:
        by_axis["dp_replicate"] = Replicate()
    if axes.size("dp_shard") > 1:
        along_tp = any(isinstance(p, Shard) and p.dim == 0 for p in tp)
        by_axis["dp_shard"] = StridedShard(0, split_factor=axes.size("tp")) if along_tp else Shard(0)
    if tp:
        (by_axis["tp"],) = tp
    return tuple(by_axis), list(by_axis.values())
