"""Which regions of a global tensor a rank holds.

A parameter is a plain tensor (each rank holds all of it) or a DTensor. Three things decide what a DTensor's rank holds:
plain shards, FSDP's strided shards (FSDP shards what TP has left, although its mesh axis is further out), and packing
(a fused weight such as qkv, of which TP takes one shard *of each segment*). Everything that reads or writes weights
(seeded init, import, checkpoint, export) goes through `held_regions`, so each of them works on every mesh.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, product
from math import prod

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from colrow.sharding.packed_shard import PackedShard
from colrow.torch_compat import StridedShard, is_async, local_shard

PACKED = "_colrow_packed"  # module attribute: {parameter name: Packed}

# Wrappers put these between a module's name and its parameters': torch.compile, activation checkpointing.
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Region:
    """A rectangular block of a tensor: `size` elements from `offset`, in each dim. Empty tuples: a scalar's element."""

    offset: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def slices(self) -> tuple[slice, ...]:
        """The region as an index: `tensor[region.slices]`."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.size, strict=True))

    @property
    def numel(self) -> int:
        return prod(self.size)


@dataclass(frozen=True)
class Packed:
    """Dim `dim` is a concatenation of `segments`, each of which TP shards on its own."""

    dim: int
    segments: tuple[int, ...]


def mark_packed(module: nn.Module, name: str, packed: Packed) -> None:
    """Record that the local shard of `module`'s parameter `name` is one shard of each segment.

    The placement records it too (`PackedShard`), but not for good: DTensor gives the result of an elementwise operator
    a plain `Shard`, so a parameter loses it in `model.to(dtype)`.
    """
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
    """This rank's shard, sharing memory; a plain tensor as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    # to_local() is an autograd function: without grad it is time spent for nothing, for each parameter in each step
    return tensor.to_local() if torch.is_grad_enabled() else local_shard(tensor)


def waited_local(tensor: Tensor) -> Tensor:
    """This rank's shard, detached, after the collective that makes it."""
    local = local_tensor(tensor.detach())
    return local.trigger_wait() if is_async(local) else local  # type: ignore[attr-defined]


def held_regions(param: Tensor, packed: Packed | None = None) -> dict[Region, Region]:
    """Which regions of the global tensor this rank holds, each with its place in the local tensor.

    Empty where the rank's shard is, or where the rank is not on the tensor's mesh.

    Raises:
        ValueError: a placement is neither a shard nor replicated, such as a partial sum.
    """
    if not isinstance(param, DTensor):
        return _regions([[range(n)] for n in param.shape])
    coordinate = param.device_mesh.get_coordinate()
    if coordinate is None:
        return {}
    return regions_at(tuple(param.shape), param.placements, tuple(param.device_mesh.shape), tuple(coordinate), packed)


def regions_at(
    shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    packed: Packed | None = None,
) -> dict[Region, Region]:
    """`held_regions` of the rank at `coordinate`, from a global shape and one placement for each mesh axis."""
    held = [[range(n)] for n in shape]  # for each dim, the global indices held, in the order of the local tensor
    strided: list[tuple[int, int, int]] = []
    for placement, parts, index in zip(placements, mesh_shape, coordinate, strict=True):
        if isinstance(placement, Replicate):
            continue
        if isinstance(placement, StridedShard):
            strided.append((placement.dim, parts, index))
        elif isinstance(placement, Shard):
            dim = placement.dim
            if packed is not None and packed.dim == dim:
                held[dim] = _chunk_of_each(packed.segments, parts, index)
            else:
                held[dim] = _chunk_of(held[dim], parts, index)
        else:
            raise ValueError(f"placement {placement} holds no shard of the tensor: redistribute it first")
    # after the loop: FSDP shards what TP has left, although its mesh axis is further out; of several strided shards the
    # innermost axis comes first
    for dim, parts, index in reversed(strided):
        held[dim] = _chunk_of(held[dim], parts, index)
    return _regions(held)


def full_tensor(param: Tensor, packed: Packed | None = None) -> Tensor:
    """The unsharded tensor in its global order, on every rank of its mesh. Collective.

    Args:
        param: a parameter, its gradient, or a tensor of the optimizer's state; a plain tensor is returned as it is.
        packed: the segments of a packed parameter whose placement does not hold them.
    """
    if not isinstance(param, DTensor):
        return param
    for placement in param.placements:
        if isinstance(placement, PackedShard):
            packed = Packed(placement.dim, placement.segments)
    if packed is None:
        return param.full_tensor()
    local = param.to_local()
    total = torch.zeros(param.shape, dtype=param.dtype, device=local.device)
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    is_copy = any(isinstance(p, Replicate) and c for p, c in zip(param.placements, coordinate, strict=True))
    if not is_copy:  # of equal replicas one adds its shard, the others zeros
        for region, place in held_regions(param, packed).items():
            total[region.slices] = local[place.slices]
    # Ranks wrote different regions into zeros: the sum over every axis puts them together.
    for axis in range(param.device_mesh.ndim):
        torch.distributed.all_reduce(total, group=param.device_mesh.get_group(axis))
    return total


def chunk_sizes(extent: int, parts: int) -> list[int]:
    """How many of `extent` rows each of `parts` ranks holds under `Shard`: the first ranks ceil(extent / parts)."""
    bounds = (_bounds(extent, parts, index) for index in range(parts))
    return [end - first for first, end in bounds]


def _bounds(extent: int, parts: int, index: int) -> tuple[int, int]:
    """torch.chunk's: every chunk has the first one's size as long as elements last."""
    size = -(-extent // parts)
    return min(index * size, extent), min((index + 1) * size, extent)


def _chunk_of(held: list[range], parts: int, index: int) -> list[range]:
    """One of `parts` chunks of the held indices, taken as one sequence."""
    first, end = _bounds(sum(map(len, held)), parts, index)
    chunk, position = [], 0
    for indices in held:
        inside = indices[max(first - position, 0) : max(end - position, 0)]
        position += len(indices)
        if inside:
            chunk.append(inside)
    return chunk


def _chunk_of_each(segments: tuple[int, ...], parts: int, index: int) -> list[range]:
    """One of `parts` chunks of each segment."""
    chunks, start = [], 0
    for size in segments:
        chunks.append(range(start, start + size)[slice(*_bounds(size, parts, index))])
        start += size
    return chunks


def _regions(held: list[list[range]]) -> dict[Region, Region]:
    """The product of the dims' held ranges: each region of the global tensor, and its place in the local tensor."""
    placed = [list(zip(dim, accumulate(map(len, dim), initial=0), strict=False)) for dim in held]
    regions = {}
    for combination in product(*placed):
        size = tuple(len(indices) for indices, _ in combination)
        held_here = Region(tuple(indices.start for indices, _ in combination), size)
        regions[held_here] = Region(tuple(offset for _, offset in combination), size)
    return regions
