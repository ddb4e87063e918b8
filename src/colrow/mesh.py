"""How ranks are arranged: the four degrees and the DeviceMesh that they make.

Axes from the outside in: `pp` pipeline stages, `dp_replicate` copies, `dp_shard` FSDP shards, `tp` tensor parallel.
Neighbouring ranks share the innermost axis, so tp, which communicates in every layer, stays inside a node.
"""

from __future__ import annotations

from itertools import product
from math import prod

from pydantic import BaseModel, ConfigDict, PositiveInt
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from colrow.errors import ConfigError

AXES = ("pp", "dp_replicate", "dp_shard", "tp")


class Mesh(BaseModel):
    """The degree of each axis. `Mesh(tp=4)` is four ranks that share every sharded matrix."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pp: PositiveInt = 1
    dp_replicate: PositiveInt = 1
    dp_shard: PositiveInt = 1
    tp: PositiveInt = 1

    @property
    def degrees(self) -> tuple[int, int, int, int]:
        return (self.pp, self.dp_replicate, self.dp_shard, self.tp)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.degrees)

    @property
    def dp(self) -> int:
        """Number of ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        named = [f"{axis} {n}" for axis, n in zip(AXES, self.degrees, strict=True) if n > 1]
        return " × ".join(named) or "1 process"

    def build(self, device_type: str, world_size: int) -> DeviceMesh:
        """The DeviceMesh with all four named axes, over the default process group of `world_size` ranks.

        Raises:
            ConfigError: the degrees do not multiply to `world_size`.
        """
        self.require_world_size(world_size)
        return init_device_mesh(device_type, self.degrees, mesh_dim_names=AXES)

    def require_world_size(self, world_size: int) -> None:
        """Raise a ConfigError that lists the meshes which fit, unless the degrees multiply to `world_size`."""
        if self.world_size == world_size:
            return
        fits = [
            str(mesh)
            for pp, replicate, shard in product(_divisors(world_size), repeat=3)
            if world_size % (pp * replicate * shard) == 0
            and (mesh := Mesh(pp=pp, dp_replicate=replicate, dp_shard=shard, tp=world_size // (pp * replicate * shard)))
            and _changes(self, mesh) == 1
        ]
        asked = " × ".join(f"{axis}={n}" for axis, n in zip(AXES, self.degrees, strict=True))
        mend = f"; meshes that fit: {', '.join(fits[:6])}" if fits else ""
        raise ConfigError(
            f"mesh {asked} needs {self.world_size} ranks, but there are {world_size}{mend}; "
            f"or start {self.world_size} ranks"
        )

    def warning_across_hosts(self, local_world_size: int) -> str | None:
        """What to warn of when a tp group would span hosts of `local_world_size` ranks each; None when none does."""
        if self.tp == 1 or self.world_size <= local_world_size or local_world_size % self.tp == 0:
            return None
        fits = max(d for d in _divisors(local_world_size) if self.tp % d == 0)
        return (
            f"tp={self.tp} spans hosts of {local_world_size} ranks: every layer's all-gathers and reduce-scatters then "
            "wait for the network between hosts, many times slower than the links inside one; "
            f"use tp={fits} and give the rest to dp_shard or pp"
        )


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _changes(a: Mesh, b: Mesh) -> int:
    return sum(x != y for x, y in zip(a.degrees, b.degrees, strict=True))
