"""Storage for torch.distributed.checkpoint (DCP): safetensors files and JSON.

[Note: who writes what]
1. The first rank removes what killed saves left, checks that the disk has room, and creates `step-N.unfinished`.
2. Every rank writes its pieces there, into `rank-RRRRR-NNNN.safetensors`, and flushes each file.
3. DCP gathers the ranks' results. Where one failed, all raise, and the first rank removes `step-N.unfinished`.
4. The first rank writes index, optimizer record, `extra.json` and, last, the manifest with the checksum of every file;
   it flushes the folder and renames it to `step-N` (folder.py). Only then is the checkpoint complete.
A crash before the rename leaves `step-N.unfinished`, which is never loaded and which the next save removes. The
previous checkpoint is untouched until then.
"""

from __future__ import annotations

import os
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from colrow.checkpoint.folder import Folder
from colrow.checkpoint.manifest import (
    EXTRA,
    INDEX,
    OPTIMIZER,
    FileRecord,
    Index,
    Manifest,
    TensorRecord,
    write_manifest,
    write_text,
)
from colrow.checkpoint.space import DISK_FULL, RESUME, DiskUse
from colrow.checkpoint.state import OPTIMIZER_PREFIX
from colrow.checkpoint.tensor_file import Entry, TensorReader, in_threads, into_files, write_tensors
from colrow.errors import CheckpointError
from colrow.sharding.layout import Region

T = TypeVar("T")

FILE_BYTES = 1 << 30  # a rank's tensors go to files of about this size, each written and checked by one thread
_ROOM = 1 << 20  # for the JSON files, which are written last


class _OneCheckpoint:
    """What DCP asks of a storage beside reading and writing: ours is made for one checkpoint and never used again."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        assert checkpoint_id is None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def prepare_local_plan(self, plan: Any) -> Any:
        return plan


class CheckpointWriter(_OneCheckpoint, StorageWriter):
    """Writes one checkpoint: see [Note: who writes what].

    Args:
        manifest: all of it but the model's signature and the files, which are known once the files are written.
        extra: the text of extra.json.
    """

    def __init__(self, folder: Folder, manifest: Manifest, extra: str):
        super().__init__()
        self.folder = folder
        self.manifest = manifest
        self.extra = extra
        self.step = manifest.step

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        needed = _ROOM + sum(_bytes_of(item) for plan in plans for item in plan.items)
        try:
            self.folder.begin(self.step)
            _use(self.folder.root, needed).require_free()
        except OSError as error:
            raise _disk_error(self.folder.root, needed, error) from error
        # the only way from the first rank to the others: `storage_data` comes to `write_data` of each
        return [replace(plan, storage_data=(f"rank-{rank:05d}", needed)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        prefix, needed = plan.storage_data
        path = self.folder.unfinished(self.step)
        if not path.is_dir():
            raise CheckpointError(
                f"{path} was made by the first rank and is not here: checkpoints need a folder that all hosts share"
            )

        def write(numbered: tuple[int, list[WriteItem]]) -> list[WriteResult]:
            number, items = numbered
            name = f"{prefix}-{number:04d}.safetensors"
            size, checksum = write_tensors(path / name, [_entry(item, planner) for item in items])
            record = FileRecord(name=name, bytes=size, crc32=checksum)
            return [WriteResult(item.index, _bytes_of(item), record) for item in items]

        try:
            results = in_threads(write, enumerate(into_files(plan.items, _bytes_of, FILE_BYTES)))
        except OSError as error:
            raise _disk_error(self.folder.root, needed, error) from error
        return _done([result for written in results for result in written])

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        written = [result for of_rank in results for result in of_rank]
        index = Index.from_metadata(metadata, {result.index: result.storage_data.name for result in written})
        files = {result.storage_data.name: result.storage_data for result in written}
        path = self.folder.unfinished(self.step)
        optimizer = metadata.planner_data
        try:
            texts = {INDEX: index.model_dump_json(), EXTRA: self.extra}
            if optimizer is not None:
                texts[OPTIMIZER] = optimizer.model_dump_json()
            for name, text in texts.items():
                files[name] = write_text(path / name, text)
            manifest = self.manifest.model_copy(
                update={
                    "model": _signature(index),
                    "files": list(files.values()),
                    "optimizer": None if optimizer is None else optimizer.kind,
                }
            )
            write_manifest(path, manifest)  # last, for it has the checksums of all others
            self.folder.commit(self.step)
        except OSError as error:
            raise _disk_error(self.folder.root, sum(file.bytes for file in files.values()), error) from error


class CheckpointReader(_OneCheckpoint, StorageReader):
    """Reads regions of a checkpoint whose files have been checked. Its metadata is made from JSON, never unpickled."""

    def __init__(self, path: Path, index: Index):
        super().__init__()
        self.path = path
        self._metadata = index.metadata()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._file_of: dict[MetadataIndex, str] = metadata.storage_data

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[ReadItem]] = {}
        for item in plan.items:
            by_file.setdefault(self._file_of[item.storage_index], []).append(item)

        def read(file_items: tuple[str, list[ReadItem]]) -> None:
            file, items = file_items
            with TensorReader(self.path / file) as reader:
                for item in items:
                    self._fill(reader, item, planner.resolve_tensor(item))

        in_threads(read, by_file.items())
        return _done(None)

    def _fill(self, reader: TensorReader, item: ReadItem, target: Tensor) -> None:
        key = _key(item.storage_index)
        data = reader.read(key, Region(tuple(item.storage_offsets), tuple(item.lengths)))
        if data.shape != target.shape or data.dtype != target.dtype:
            raise CheckpointError(
                f"{reader.path}: {key} gave {data.dtype}{list(data.shape)} for {target.dtype}{list(target.shape)}"
            )
        target.copy_(data)


def _key(index: MetadataIndex) -> str:
    """A region's name in its file: the tensor's, and the region's offset in it."""
    assert index.offset is not None
    return f"{index.fqn}@{','.join(str(first) for first in index.offset)}"


def _entry(item: WriteItem, planner: SavePlanner) -> Entry:
    assert item.tensor_data is not None

    def fetch() -> Tensor:
        data = planner.resolve_data(item)
        assert isinstance(data, Tensor)
        return data

    shape, dtype = tuple(item.tensor_data.chunk.sizes), item.tensor_data.properties.dtype
    return Entry(_key(item.index), shape, dtype, fetch)


def _bytes_of(item: WriteItem) -> int:
    """The size of the piece that is written; `item.tensor_storage_size()` counts the complete tensor."""
    assert item.tensor_data is not None
    return prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future


def _signature(index: Index) -> dict[str, TensorRecord]:
    return {
        name: TensorRecord(shape=tensor.shape, dtype=tensor.dtype)
        for name, tensor in index.tensors.items()
        if not name.startswith(OPTIMIZER_PREFIX)
    }


def _disk_error(root: Path, needed: int, error: OSError) -> CheckpointError:
    if error.errno not in DISK_FULL:
        return CheckpointError(f"cannot write the checkpoint to {root}: {error.strerror} ({error.filename or root})")
    return _use(root, needed).too_full(error.strerror or "")


def _use(root: Path, needed: int) -> DiskUse:
    return DiskUse("a checkpoint", root, needed, root, RESUME)
