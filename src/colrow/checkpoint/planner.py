"""Planners for torch.distributed.checkpoint that work on pieces, so that packed and strided shards move as any other.

DCP gathers every rank's pieces, drops the repeated ones, and on loading intersects what is stored with what a rank
holds. Its own planners take one contiguous block per DTensor; these take any number.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from colrow.checkpoint.manifest import OptimizerRecord
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.state import merge_records
from colrow.errors import CheckpointError

PIECES = "pieces"


def as_state(pieces: list[Piece]) -> dict[str, Any]:
    """The state dict in which DCP carries pieces to the planners below."""
    return {PIECES: pieces}


@dataclass(frozen=True)
class RankNotes:
    """What a rank tells the coordinator beside its tensors."""

    optimizer: OptimizerRecord | None


class PieceSavePlanner(DefaultSavePlanner):
    """Plans the writing of pieces; each block of a tensor is written by one of the ranks that hold it."""

    def __init__(self, notes: RankNotes):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._notes = notes
        self._data: dict[MetadataIndex, Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = []
        for piece in self.state_dict[PIECES]:
            index = MetadataIndex(piece.name, piece.offset)
            if piece.chosen and index not in self._data:
                self._data[index] = piece.data
                items.append(_write_item(index, piece))
        return SavePlan(items, planner_data=self._notes)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        records = [plan.planner_data.optimizer for plan in all_plans]
        present = [record for record in records if record is not None]
        metadata.planner_data = RankNotes(merge_records(present) if present else None)
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._data[write_item.index]


class PieceLoadPlanner(LoadPlanner):
    """Plans the reading of what fills this rank's pieces, in place."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._metadata = metadata
        self._pieces: list[Piece] = state_dict[PIECES]

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for place, piece in enumerate(self._pieces):
            stored = self._metadata.state_dict_metadata[piece.name]
            assert isinstance(stored, TensorStorageMetadata)
            wanted = ChunkStorageMetadata(torch.Size(piece.offset), piece.data.shape)
            reads = create_read_items_for_chunk_list(piece.name, stored, [wanted])
            if sum(prod(read.lengths) for read in reads) != piece.data.numel():
                raise CheckpointError(f"the index holds only a part of {piece.name}: the checkpoint is damaged")
            target = MetadataIndex(str(place))  # names alone would not tell copies of one tensor apart
            items += [replace(read, dest_index=target) for read in reads]
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("a checkpoint of colrow holds tensors alone")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        data = self._pieces[int(read_item.dest_index.fqn)].data
        block = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return data[tuple(slice(first, first + count) for first, count in block)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass  # resolve_tensor gave a view of the parameter itself


def _write_item(index: MetadataIndex, piece: Piece) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(piece.offset), piece.data.shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=piece.data.dtype), torch.Size(piece.shape))
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)
