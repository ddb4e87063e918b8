"""Planners for torch.distributed.checkpoint (DCP) that work on pieces, so that packed and strided shards are saved too.

[Note: plans]
DCP's own planners read a state dict and take one contiguous region per DTensor. Ours get pieces, any number per tensor;
the state dict is empty.
Save: each rank plans one WriteItem per piece that it writes, and adds its optimizer record. The first rank gathers all
plans, drops WriteItems of the same tensor and offset (plain tensors, which every rank holds), merges the optimizer
records, and returns to each rank its own plan. The result of the merge is the metadata that storage.py writes as JSON.
Load: each rank intersects its pieces with what the index says is stored, and reads just the intersections, each into a
view of the parameter itself. No rank depends on another's plan.
"""

from __future__ import annotations

import io
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
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
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from colrow.checkpoint.manifest import OptimizerRecord
from colrow.checkpoint.optimizer_state import merge_records
from colrow.checkpoint.pieces import Piece
from colrow.errors import CheckpointError
from colrow.sharding.layout import Region


class PieceSavePlanner(DefaultSavePlanner):
    """Plans the writing of `pieces` and of `optimizer`, this rank's record of everything that is not a tensor."""

    def __init__(self, pieces: list[Piece], optimizer: OptimizerRecord | None):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces, self._optimizer = pieces, optimizer
        self._data: dict[MetadataIndex, Tensor] = {}

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        items = []
        for piece in self._pieces:
            index = MetadataIndex(piece.name, piece.region.offset)
            if piece.is_writer and index not in self._data:  # a rank's tied copies are stored once
                self._data[index] = piece.data
                data = TensorWriteData(
                    _chunk(piece.region), TensorProperties(dtype=piece.data.dtype), torch.Size(piece.shape)
                )
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        return SavePlan(items, planner_data=self._optimizer)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)  # drops what several ranks plan to write
        records = [plan.planner_data for plan in all_plans if plan.planner_data is not None]
        metadata.planner_data = merge_records(records) if records else None
        return plans, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        return self._data[write_item.index]


class PieceLoadPlanner(DefaultLoadPlanner):
    """Plans the reading of what fills `pieces`, in place."""

    def __init__(self, pieces: list[Piece]):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = pieces

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self._metadata = metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for position, piece in enumerate(self._pieces):
            stored = self._metadata.state_dict_metadata[piece.name]
            assert isinstance(stored, TensorStorageMetadata)
            reads = create_read_items_for_chunk_list(piece.name, stored, [_chunk(piece.region)])
            if sum(prod(read.lengths) for read in reads) != piece.region.numel:
                raise CheckpointError(f"the index holds only a part of {piece.name}: the checkpoint is damaged")
            target = MetadataIndex(str(position))  # not the name: a rank may hold two copies of a tensor
            items += [replace(read, dest_index=target) for read in reads]
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise AssertionError("a checkpoint of colrow holds tensors alone")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """A view of the parameter itself: once it is filled, nothing is left to commit."""
        data = self._pieces[int(read_item.dest_index.fqn)].data
        return data[Region(tuple(read_item.dest_offsets), tuple(read_item.lengths)).slices]


def _chunk(region: Region) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(region.offset), torch.Size(region.size))
