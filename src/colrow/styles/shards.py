"""How a parameter is sharded segment by segment.

[Note: segments]
A fused weight is a concatenation of segments along one dimension (q, k and v; gate and up). Sharded as one, a rank
would get half of q and none of v. Here each segment is sharded on its own, and a rank's shard is one shard of each, in
order. The global parameter keeps its name and shape; `Packed` on the module tells init, import, checkpoint and export
which rows a rank has. Of a segment that ranks use in common (k and v of fewer heads than ranks) each holds a shard too,
and gathers it when its module's forward reads the parameter.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from colrow.sharding.layout import Packed
from colrow.sharding.local_view import View, view_parameters
from colrow.sharding.packed_shard import PackedShard
from colrow.styles.base import ParameterLayout, Style
from colrow.styles.heads import Heads
from colrow.styles.rank_tensors import gathered, rank_table, same_on_all_ranks, summed
from colrow.styles.site import Site


@dataclass(frozen=True)
class ShardSpec:
    """How one parameter is held.

    Attributes:
        dim: the sharded dimension; None for a parameter that every rank holds.
        segments: the sizes that `dim` is made of, each sharded on its own ([Note: segments]).
        replicated: positions of segments that every rank uses completely (the one k and v head of multi-query
            attention).
        summed: without a dim: its gradient is a sum over ranks. False where every rank uses it on the same values.
        scaled: without a dim: the parameter is added to a partial sum on every rank, and so is divided by tp.
        kv: positions of segments that hold `kv_heads` heads for `heads` query heads, where tp does not divide
            `kv_heads`: a rank uses the kv heads that its query heads need.
    """

    dim: int | None = None
    segments: tuple[int, ...] = ()
    replicated: tuple[int, ...] = ()
    summed: bool = True
    scaled: bool = False
    kv: tuple[int, ...] = ()
    heads: int = 0
    kv_heads: int = 0

    @classmethod
    def declared(cls, dim: int, options: Mapping[str, Any], size: int) -> ShardSpec:
        """Of a plan's options; `size` of the dim is the segment where they name none."""
        return cls(
            dim,
            segments=tuple(options.get("segments") or (size,)),
            replicated=tuple(options.get("replicated") or ()),
            kv=tuple(options.get("kv") or ()),
            heads=options.get("heads", 0),
            kv_heads=options.get("kv_heads", 0),
        )

    @property
    def uneven(self) -> bool:
        """Whether ranks use overlapping rows: `held` says whether every rank holds the complete parameter for that."""
        return bool(self.replicated or self.kv)

    def held(self, tp: int) -> ShardSpec:
        """How the parameter is held between uses: of uneven segments beside split ones in shards, where tp divides
        them; what a rank uses of others' is gathered. All of one that is uneven as a whole, such as a k projection."""
        positions = range(len(self.segments))
        split = {*positions} - {*self.replicated, *self.kv}
        divides = all(size % tp == 0 for size in self.segments)
        return replace(self, replicated=(), kv=()) if split and divides else self

    def rows(self, tp: int, rank: int) -> list[int]:
        """Global indices of `dim` that a rank uses, in its order."""
        out: list[int] = []
        start = 0  # of the segment
        for position, size in enumerate(self.segments):
            if position in self.kv:
                width = size // self.kv_heads
                for head in Heads(self.heads, self.kv_heads, width).kv_heads_of_rank(tp, rank):
                    out += range(start + head * width, start + (head + 1) * width)
            elif position in self.replicated:
                out += range(start, start + size)
            else:
                out += range(start + rank * (size // tp), start + (rank + 1) * (size // tp))
            start += size
        return out

    def local_sizes(self, tp: int) -> tuple[int, ...]:
        """How many rows of each segment a rank uses."""
        starts, rows = [0, *accumulate(self.segments)], self.rows(tp, 0)
        return tuple(sum(first <= row < end for row in rows) for first, end in pairwise(starts))

    def layout(self, param: Tensor, tp: int, reason: str) -> ParameterLayout:
        """What the parameter becomes over tp; `reason` is that of a sharded one."""
        shape = tuple(param.shape)
        if self.dim is None:
            return ParameterLayout(
                Replicate(), shape, "added to a sum over ranks, 1/tp on each" if self.scaled else reason
            )
        if self.held(tp).uneven:
            why = "tp does not divide all of its segments: every rank holds it, uses its rows, and gradients are summed"
            return ParameterLayout(Replicate(), shape, why)
        local = (*shape[: self.dim], shape[self.dim] // tp, *shape[self.dim + 1 :])
        if self.uneven:
            reason = f"{reason}: those that ranks use in common are gathered"
        packed = Packed(self.dim, self.segments) if len(self.segments) > 1 else None
        return ParameterLayout(Shard(self.dim), local, reason, packed)

    def check(self, site: Site, name: str, extent: int) -> None:
        """Raise PlanError where the segments do not make up a dim of `extent`, or tp does not divide one of them."""
        if sum(self.segments) != extent:
            raise site.wrong_options(
                f"{name}: segments {list(self.segments)} sum to {sum(self.segments)}, but dim {self.dim} has {extent}",
                "give the sizes of the fused parts in order",
            )
        for position, size in enumerate(self.segments):
            if position in self.kv:
                if not self.kv_heads or size % self.kv_heads:
                    raise site.wrong_options(
                        f"segment {position} of {name}, of size {size}, does not hold kv_heads={self.kv_heads}",
                        "give heads and kv_heads as the model has them",
                    )
                site.divide(self.heads, "CR202", f"{name}: heads={self.heads}")
            elif position not in self.replicated:
                site.divide(size, "CR210", f"{name}: segment {position} of size {size}")

    def distribute(self, param: Tensor, mesh: DeviceMesh, source: int | None) -> DTensor:
        """The DTensor whose local tensor is a shard of each segment. `source`: the rank whose values all take; None:
        each rank keeps its values."""
        data, held = param.detach(), self.held(mesh.size())
        if self.dim is None or held.uneven:
            return distribute_tensor(data, mesh, [Replicate()], src_data_rank=source)
        if len(self.segments) == 1:
            return distribute_tensor(data, mesh, [Shard(self.dim)], src_data_rank=source)
        # DTensor chunks the dim as one: put the rows in the order of the ranks first, rank 0's of every segment, ...
        order = [row for rank in range(mesh.size()) for row in held.rows(mesh.size(), rank)]
        data = data.index_select(self.dim, torch.tensor(order, device=data.device))
        shard = distribute_tensor(data, mesh, [Shard(self.dim)], src_data_rank=source).to_local()
        placements = [PackedShard(self.dim, self.segments)]  # distribute_tensor would make a plain Shard of it
        return DTensor.from_local(shard, mesh, placements, run_check=False, shape=param.shape, stride=data.stride())

    def view(self, mesh: DeviceMesh) -> View:
        """What the module's forward sees (see [Note: whose gradient])."""
        tp = mesh.size()
        if self.dim is None and self.scaled:
            return lambda param: summed(param) / tp
        if self.dim is None and self.summed:
            return summed
        if self.dim is None or not self.uneven:
            return same_on_all_ranks
        dim, rows = self.dim, [self.rows(tp, rank) for rank in range(tp)]
        if not self.held(tp).uneven:
            return self._gathering_view(mesh, dim, rows)
        own = rank_table(mesh, rows)
        # all ranks hold the complete parameter, and each uses some rows: its gradient is one term of a sum over tp
        return lambda param: summed(param).index_select(dim, own)

    def _gathering_view(self, mesh: DeviceMesh, dim: int, rows: list[list[int]]) -> View:
        """`rows` of each rank, out of its shards and the gathered ones of uneven segments."""
        tp, uneven = mesh.size(), {*self.replicated, *self.kv}
        shards = [size // tp for size in self.segments]
        # where a row stands in [this rank's shards, gathered shards of rank 0, of rank 1, ...]; of a split segment as
        # its own rank has it
        places: list[int] = []
        common, inside = sum(shards[i] for i in uneven), 0
        for position, (size, shard) in enumerate(zip(self.segments, shards, strict=True)):
            before = sum(shards[:position])
            for row in range(size):
                owner, offset = divmod(row, shard)
                places.append(sum(shards) + owner * common + inside + offset if position in uneven else before + offset)
            inside += shard if position in uneven else 0
        own = rank_table(mesh, [[places[row] for row in each] for each in rows])

        def view(param: DTensor) -> Tensor:
            local = same_on_all_ranks(param)
            parts = local.split(shards, dim)
            mine = torch.cat([part for i, part in enumerate(parts) if i in uneven], dim)
            # each rank uses gathered rows on its own heads: backward sums the terms where it scatters them
            return torch.cat([local, gathered(mine, mesh, Shard(dim))], dim).index_select(dim, own)

        return view


def shards_of(value: Any) -> dict[str, Any] | None:
    """The option `shards`: parameter name to a dim, or to the fields of a ShardSpec; `whole` is what earlier releases
    called `replicated`."""
    if value is None:
        return None
    return {
        str(name): {("replicated" if key == "whole" else key): item for key, item in spec.items()}
        if isinstance(spec, dict)
        else spec
        for name, spec in value.items()
    }


def specs_of(site: Site, style: str, shards: dict[str, Any]) -> dict[str, ShardSpec]:
    """The spec of each of the module's own parameters, from what a plan declares for some of them; and of its buffers
    that the plan declares."""
    specs = {}
    own: dict[str, Tensor] = dict(site.module.named_parameters(recurse=False))
    own |= {name: buffer for name, buffer in site.module.named_buffers(recurse=False) if name in shards}
    for name in shards:
        if name not in own:
            raise site.wrong_options(
                f"the module has no parameter or buffer {name!r}", f"{style} can split {', '.join(own) or 'nothing'}"
            )
    for name, param in own.items():
        declared = shards.get(name)
        if isinstance(declared, int):
            declared = {"dim": declared}
        if declared is None:
            specs[name] = ShardSpec()
        elif declared.get("scaled"):
            specs[name] = ShardSpec(scaled=True)
        else:
            dim = declared.get("dim")
            if not isinstance(dim, int) or not 0 <= dim < param.ndim:
                raise site.wrong_options(
                    f"dim {dim!r} of {name}, which has {param.ndim} dims, cannot be sharded",
                    f"give a number from 0 to {param.ndim - 1}",
                )
            specs[name] = ShardSpec.declared(dim, declared, int(param.shape[dim]))
    return specs


class ShardedParameters(Style):
    """A style that holds each of its module's own parameters by a `ShardSpec`."""

    layout_reason: ClassVar[str]
    """The reason in a sharded parameter's layout."""

    @abstractmethod
    def specs(self, site: Site) -> dict[str, ShardSpec]:
        """How each parameter is held, and which rows of some buffers a rank uses."""

    def check(self, site: Site) -> None:
        for name, spec in self.specs(site).items():
            if spec.dim is not None:
                tensor = site.module._buffers.get(name)
                tensor = site.parameter(name) if tensor is None else tensor
                spec.check(site, name, int(tensor.shape[spec.dim]))

    def parameters(self, site: Site) -> dict[str, ParameterLayout]:
        return {
            name: spec.layout(site.parameter(name), site.tp, self.layout_reason)
            for name, spec in self.specs(site).items()
            if name in site.module._parameters
        }


def place_parameter(module: nn.Module, name: str, mesh: DeviceMesh, spec: ShardSpec, source: int | None) -> bool:
    """Put a DTensor in the parameter's place. False where a style has placed it already: of a module with two names."""
    param = module._parameters[name]
    assert param is not None
    if isinstance(param, DTensor):
        return False
    placed = spec.distribute(param, mesh, source)
    module.register_parameter(name, nn.Parameter(placed, requires_grad=param.requires_grad))
    return True


def shard_parameters(module: nn.Module, mesh: DeviceMesh, specs: dict[str, ShardSpec], source: int | None) -> None:
    """Shard the module's parameters by their specs, and let its forward see this rank's shards. Buffers are left to
    `local_buffers`."""
    own = {name: spec for name, spec in specs.items() if name in module._parameters}
    placed = [name for name, spec in own.items() if place_parameter(module, name, mesh, spec, source)]
    view_parameters(module, {name: specs[name].view(mesh) for name in placed})
