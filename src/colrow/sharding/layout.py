"""Which part of a global tensor a rank holds, as boxes of indices.

A parameter is a plain tensor (held whole) or a DTensor. Three things decide what a DTensor's rank holds: plain shards,
FSDP's strided shards (FSDP cuts what TP left, although its mesh axis stands further out), and packing (a fused
weight such as qkv, of which TP takes one shard *of each segment*). Everything that reads or writes weights (seeded
init, import, checkpoint, export) goes through `boxes`, so each of them works on every mesh.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from colrow.torch_compat import StridedShard, local_shard

PACKED = "_colrow_packed"  # module attribute: {parameter name: Packed}

# Wrappers put these between a module's name and its parameters': torch.compile, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Box:
    """A block of indices: `size` elements from `global_offset` lie at `local_offset` of the local tensor."""

    global_offset: tuple[int, ...]
    local_offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def global_slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.global_offset, self.size, strict=True))

    @property
    def local_slices(self) -> tuple[slice, ...]:
        return tuple(slice(o, o + n) for o, n in zip(self.local_offset, self.size, strict=True))


@dataclass(frozen=True)
class Packed:
    """Dimension `dim` is a concatenation of `segments`, each of which TP shards on its own."""

    dim: int
    segments: tuple[int, ...]


@dataclass(frozen=True)
class _Run:
    """Indices start..start+size of the global dimension, in order, at `local` of the local one."""

    start: int
    local: int
    size: int


def mark_packed(module: nn.Module, name: str, packed: Packed) -> None:
    """Record that the local shard of `module`'s parameter `name` is one shard of each segment."""
    module.__dict__.setdefault(PACKED, {})[name] = packed


def unwrapped_name(fqn: str) -> str:
    """The name that a parameter has in the plain model, whatever wraps its modules here."""
    for wrapper in _WRAPPERS:
        fqn = fqn.replace(wrapper, "")
    return fqn


def packed_of(model: nn.Module, fqn: str) -> Packed | None:
    """The packing of the parameter with this fully qualified name, if it has one."""
    parent, _, name = fqn.rpartition(".")
    return getattr(model.get_submodule(parent), PACKED, {}).get(name)


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part, sharing memory; a plain tensor is its own part."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local() if torch.is_grad_enabled() else local_shard(tensor)


def boxes(param: Tensor, packed: Packed | None = None) -> list[Box]:
    """The blocks of the global tensor that this rank holds; none when its shard is empty.

    Raises:
        ValueError: a placement is neither a shard nor a replica, such as a pending sum.
    """
    if not isinstance(param, DTensor):
        return list(_boxes([[_Run(0, 0, n)] for n in param.shape]))
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        return []
    return boxes_at(tuple(param.shape), param.placements, tuple(param.device_mesh.shape), tuple(coordinate), packed)


def boxes_at(
    shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    packed: Packed | None = None,
) -> list[Box]:
    """`boxes` from bare facts: a global shape, a placement and a coordinate for each mesh axis."""
    runs = [[_Run(0, 0, n)] for n in shape]
    strided: list[tuple[int, int, int]] = []
    for placement, parts, index in zip(placements, mesh_shape, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, StridedShard):
            strided.append((placement.dim, parts, index))
        elif isinstance(placement, Shard):
            dim = placement.dim
            if packed is not None and packed.dim == dim:
                runs[dim] = _take_each(packed.segments, parts, index)
            else:
                runs[dim] = _take(runs[dim], parts, index)
        else:
            raise ValueError(f"placement {placement} holds no part of the tensor: redistribute it first")
    for dim, parts, index in reversed(strided):  # inner axes first: the outermost one cuts what is left
        runs[dim] = _take(runs[dim], parts, index)
    return list(_boxes(runs))


def full_tensor(param: Tensor, packed: Packed | None = None) -> Tensor:
    """The whole tensor in its global order, on every rank of its mesh. Collective."""
    if not isinstance(param, DTensor):
        return param
    mine = torch.zeros(param.shape, dtype=param.dtype, device=param.to_local().device)
    if packed is None:
        return param.full_tensor()
    held = boxes(param, packed)
    for box in held:
        mine[box.global_slices] = param.to_local()[box.local_slices]
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    if any(isinstance(p, Replicate) and c for p, c in zip(param.placements, coordinate, strict=True)):
        mine.zero_()  # one replica is enough in the sum
    for axis in range(param.device_mesh.ndim):
        torch.distributed.all_reduce(mine, group=param.device_mesh.get_group(axis))
    return mine


def _chunk(extent: int, parts: int, index: int) -> tuple[int, int]:
    """torch.chunk's bounds: every chunk has the first one's size as long as elements last."""
    size = -(-extent // parts)
    return min(index * size, extent), min((index + 1) * size, extent)


def _take(runs: list[_Run], parts: int, index: int) -> list[_Run]:
    first, end = _chunk(sum(run.size for run in runs), parts, index)
    taken = []
    for run in runs:
        low, high = max(run.local, first), min(run.local + run.size, end)
        if low < high:
            taken.append(_Run(run.start + low - run.local, low - first, high - low))
    return taken


def _take_each(segments: tuple[int, ...], parts: int, index: int) -> list[_Run]:
    taken, start, local = [], 0, 0
    for size in segments:
        first, end = _chunk(size, parts, index)
        taken.append(_Run(start + first, local, end - first))
        start, local = start + size, local + end - first
    return taken


def _boxes(runs: list[list[_Run]]) -> Iterator[Box]:
    for combination in product(*runs):
        yield Box(
            tuple(run.start for run in combination),
            tuple(run.local for run in combination),
            tuple(run.size for run in combination),
        )
