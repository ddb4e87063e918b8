"""How ranks are arranged: the degrees of a mesh, the DeviceMesh that they make, and what each of its axes means.

Axes from the outside in: `pp` pipeline stages, `dp_replicate` copies, `dp_shard` FSDP shards, `tp` tensor parallel.
Neighbouring ranks share the innermost axis, so tp, which communicates in every layer, stays inside a node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

from colrow.errors import ConfigError

if TYPE_CHECKING:  # a config is read before the seconds that torch takes
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class AxisRole:
    """What differs between the ranks along an axis.

    Attributes:
        parameters: they hold different parameters, or different shards. A gradient norm is summed over the axis, and
            each rank writes what it holds to a checkpoint. Otherwise they are copies: one of them counts and writes.
        batches: they read different micro-batches. Gradients and losses are averaged over the axis, and random numbers
            differ. Otherwise they must read the same ones.
    """

    parameters: bool
    batches: bool


ROLES = {
    "pp": AxisRole(parameters=True, batches=False),
    "dp_replicate": AxisRole(parameters=False, batches=True),
    "dp_shard": AxisRole(parameters=True, batches=True),
    "tp": AxisRole(parameters=True, batches=False),
}
"""Every axis, from the outside in. A new one is an entry here, a field of `Mesh`, and the code that uses it."""
AXES = tuple(ROLES)


_MOST_RANKS = 1_000_000


class Mesh(BaseModel):
    """The degree of each axis, and who runs the data axes. `Mesh(tp=4)` is four ranks that share every sharded
    matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pp: PositiveInt = 1
    dp_replicate: PositiveInt = 1
    dp_shard: PositiveInt = 1
    tp: PositiveInt = 1
    data_engine: Literal["fsdp2", "flat"] = "fsdp2"
    """What shards, gathers and reduces over the data axes: torch's FSDP2, or flat shards with a one-pass update."""

    @model_validator(mode="after")
    def _exists(self) -> Mesh:
        if self.world_size > _MOST_RANKS:
            raise ValueError(f"it has {self.world_size:,} ranks, and no cluster more than {_MOST_RANKS:,}")
        return self

    @property
    def degrees(self) -> tuple[int, ...]:
        """The degree of each axis, in the order of AXES."""
        return tuple(getattr(self, axis) for axis in AXES)

    @property
    def by_axis(self) -> dict[str, int]:
        """The degree of each axis, by name."""
        return dict(zip(AXES, self.degrees, strict=True))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.degrees)

    @property
    def dp(self) -> int:
        """Number of ranks that read different batches."""
        return prod(getattr(self, axis) for axis in AXES if ROLES[axis].batches)

    @property
    def tp_alone(self) -> bool:
        """Whether every other axis has one rank."""
        return self.world_size == self.tp

    @property
    def is_flat(self) -> bool:
        """Whether the data axes are those of the flat engine."""
        return self.data_engine == "flat" and self.dp > 1

    def __str__(self) -> str:
        named = [f"{axis} {n}" for axis, n in zip(AXES, self.degrees, strict=True) if n > 1]
        return " × ".join(named) or "1 process"

    def build(self, device_type: str, world_size: int) -> DeviceMesh:
        """The DeviceMesh with all named axes, over the default process group of `world_size` ranks.

        Raises:
            ConfigError: the degrees do not multiply to `world_size`.
        """
        from torch.distributed.device_mesh import init_device_mesh

        self.require_world_size(world_size)
        return init_device_mesh(device_type, self.degrees, mesh_dim_names=AXES)

    def require_world_size(self, world_size: int, runs: Callable[[Mesh], bool] = lambda mesh: True) -> None:
        """Raise a ConfigError that lists the meshes which fit, unless the degrees multiply to `world_size`.

        Args:
            runs: whether the model, its plan and its batch allow a mesh: only such meshes are listed.
        """
        if self.world_size == world_size:
            return
        fits = [
            # one degree changes at a time: with two it is another run, not a correction
            self.model_copy(update={axis: n})
            for axis in AXES
            for n in divisors(world_size)
            if self.world_size // getattr(self, axis) * n == world_size
        ]
        fits = [mesh for mesh in fits if runs(mesh)]
        fits.sort(key=lambda mesh: mesh.degrees)
        requested = " × ".join(f"{axis}={n}" for axis, n in zip(AXES, self.degrees, strict=True))
        fix = f"; meshes that fit: {', '.join(map(str, fits[:6]))}" if fits else ""
        raise ConfigError(
            f"mesh {requested} needs {self.world_size} ranks, but there are {world_size}{fix}; "
            f"or start {self.world_size} ranks"
        )

    def warning_across_hosts(self, local_world_size: int) -> str | None:
        """The warning when a tp group would span hosts of `local_world_size` ranks each; None when none does."""
        if self.tp == 1 or self.world_size <= local_world_size or local_world_size % self.tp == 0:
            return None
        # of the divisors of tp: what is left, tp / fits, is the degree of another axis
        fits = max(d for d in divisors(local_world_size) if self.tp % d == 0)
        return (
            f"tp={self.tp} spans hosts of {local_world_size} ranks: every layer's all-gathers and reduce-scatters then "
            "wait for the network between hosts, many times slower than the links inside one; "
            f"use tp={fits} and give the rest to dp_shard or pp"
        )


def divisors(n: int) -> list[int]:
    """The numbers that divide `n`, in order."""
    return [d for d in range(1, n + 1) if n % d == 0]


class MeshAxes:
    """This rank's place on each axis of `mesh`, and what follows from it. An axis that the mesh lacks has one rank.

    Args:
        mesh: of `Mesh.build`, or a submesh of one.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self._mesh = mesh

    def size(self, axis: str) -> int:
        return self._mesh[axis].size() if axis in (self._mesh.mesh_dim_names or ()) else 1

    def rank(self, axis: str) -> int:
        """This rank's index along the axis."""
        return self._mesh[axis].get_local_rank() if axis in (self._mesh.mesh_dim_names or ()) else 0

    @property
    def data_rank(self) -> int:
        """This rank's index of `Mesh.dp` among ranks that read different batches; ranks that read the same share it."""
        # row-major, as the mesh numbers its ranks: dp_replicate outside, dp_shard inside
        index = 0
        for axis in AXES:
            if ROLES[axis].batches:
                index = index * self.size(axis) + self.rank(axis)
        return index

    @property
    def loss_weight(self) -> float:
        """This rank's weight in a sum over all ranks that gives the mean loss.

        Of the ranks that read the same batches one counts: on the last stage, and first along the other axes.
        """
        counts = all(
            self.rank(axis) == (self.size(axis) - 1 if axis == "pp" else 0) for axis in AXES if not ROLES[axis].batches
        )
        return (1.0 if counts else 0.0) / prod(self.size(axis) for axis in AXES if ROLES[axis].batches)

    def norm_groups(self) -> list[dist.ProcessGroup]:
        """The groups over which squares of gradients are summed, where larger than 1."""
        return list(self._groups(axis for axis in AXES if ROLES[axis].parameters))

    def same_batch_groups(self) -> list[dist.ProcessGroup]:
        """The groups whose ranks must read the same batches, where larger than 1."""
        return list(self._groups(axis for axis in AXES if not ROLES[axis].batches))

    def data_groups(self) -> list[dist.ProcessGroup]:
        """The groups whose ranks read different batches, where larger than 1."""
        return list(self._groups(axis for axis in AXES if ROLES[axis].batches))

    def _groups(self, axes: Iterator[str]) -> Iterator[dist.ProcessGroup]:
        for axis in axes:
            if self.size(axis) > 1:
                yield self._mesh[axis].get_group()
