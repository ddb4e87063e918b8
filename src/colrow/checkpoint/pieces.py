"""Pieces: the regions of stored tensors that one rank holds, as views of its memory."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from colrow.checkpoint.tensor_file import DTYPES
from colrow.errors import CheckpointError
from colrow.sharding.layout import Packed, Region, held_regions, local_tensor


@dataclass(frozen=True)
class Piece:
    """A region of the tensor that is stored as `name`, and the view of this rank's memory that holds it."""

    name: str
    shape: tuple[int, ...]
    """The global tensor's."""
    region: Region
    data: Tensor
    """It has the region's size."""
    is_writer: bool
    """Whether this rank writes it, of all that hold the same region on the tensor's mesh."""


def pieces_of(name: str, tensor: Tensor, packed: Packed | None = None, *, planned: bool = False) -> list[Piece]:
    """What this rank holds of a plain tensor, or of a DTensor on any mesh; nothing where it is not on the mesh.

    Args:
        planned: their names, shapes and dtypes alone are of interest, so the tensor may be on the meta device.
    """
    tensor = tensor.detach()
    local = local_tensor(tensor)
    if local.is_meta and not planned:
        raise CheckpointError(f"{name} is on the meta device: give the model memory before it is saved or loaded")
    if local.dtype not in DTYPES:
        raise CheckpointError(f"{name} has the dtype {local.dtype}, which a checkpoint cannot hold")
    held = held_regions(tensor, packed)
    assert sum(region.numel for region in held) == local.numel(), f"{name}: local shape {tuple(local.shape)} of {held}"
    writer = _is_writer(name, tensor)
    shape = tuple(tensor.shape)
    return [Piece(name, shape, region, local[place.slices], writer) for region, place in held.items()]


def _is_writer(name: str, tensor: Tensor) -> bool:
    """Whether this rank writes the tensor. One of the ranks that hold the same shard does; a hash of the name chooses
    it, so that the work is shared."""
    if not isinstance(tensor, DTensor):
        return True  # replicated over unknown ranks: DCP drops the duplicates when it gathers all plans
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    replica, replicas = 0, 1  # this rank's number among the replicas, counted over all replicated mesh axes
    for placement, index, extent in zip(tensor.placements, coordinate, tensor.device_mesh.shape, strict=True):
        if isinstance(placement, Replicate):
            replica, replicas = replica * extent + index, replicas * extent
    return zlib.crc32(name.encode()) % replicas == replica


class Staging:
    """Host memory for a copy of pieces, pinned where they lie on a GPU, kept from one save to the next."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Region], Tensor] = {}

    def copy(self, pieces: list[Piece]) -> list[Piece]:
        """Copies of the pieces that this rank writes. When it returns, the originals may change."""
        staged, devices = [], set()
        for piece in pieces:
            if not piece.is_writer:
                continue
            key = (piece.name, piece.region)
            buffer = self._buffers.get(key)
            if buffer is None or buffer.dtype != piece.data.dtype:
                pinned = piece.data.is_cuda
                buffer = torch.empty(piece.data.shape, dtype=piece.data.dtype, device="cpu", pin_memory=pinned)
                self._buffers[key] = buffer
            buffer.copy_(piece.data, non_blocking=True)  # into pinned memory: copies of all pieces are enqueued at once
            if piece.data.is_cuda:
                devices.add(piece.data.device)
            staged.append(replace(piece, data=buffer))
        for device in devices:  # one wait for all of a device's copies
            torch.cuda.current_stream(device).synchronize()
        return staged
