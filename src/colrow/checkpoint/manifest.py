"""What a checkpoint says about itself, all of it JSON: the manifest, the index of tensors, the optimizer's options.

`manifest.json`   step, mesh, versions, the model's signature, and every other file with its size and CRC-32
`index.json`      for each tensor its dtype, its global shape, and the regions it is stored in, with their files
`optimizer.json`  parameter groups: names and hyperparameters
`extra.json`      whatever the training loop adds

torch.distributed.checkpoint would pickle the index; here its metadata is built from JSON that pydantic has checked.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from colrow.checkpoint.tensor_file import DTYPES, checksum_of, in_threads
from colrow.errors import CheckpointError
from colrow.mesh import Mesh
from colrow.yaml_text import read_text

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"

_MOST_BYTES = 1 << 30
MANIFEST, INDEX, OPTIMIZER, EXTRA = "manifest.json", "index.json", "optimizer.json", "extra.json"
DTYPE_OF_NAME = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

M = TypeVar("M", bound=BaseModel)


class _Model(BaseModel):
    # strict, forbid: a damaged or foreign file is an error, never coerced. Hyperparameters may be inf or nan.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, ser_json_inf_nan="constants")


class FileRecord(_Model):
    """A file as it was when it was written."""

    name: str
    bytes: NonNegativeInt
    crc32: NonNegativeInt


class TensorRecord(_Model):
    """A global tensor, however it is sharded."""

    shape: list[NonNegativeInt]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{self.shape}"


class Manifest(_Model):
    """What a checkpoint is of, and the files that belong to it."""

    format: Literal["colrow-checkpoint-1"] = "colrow-checkpoint-1"
    step: NonNegativeInt
    saved: str
    """Time in UTC, ISO 8601."""
    mesh: Mesh | None
    """The mesh that saved it, where it is known."""
    ranks: int
    colrow: str
    torch: str
    vocabulary: str | None
    """Names the tokenizer's vocabulary, where the training loop gave a name."""
    optimizer: str | None
    """Class of the optimizer whose state is stored."""
    model: dict[str, TensorRecord]
    files: list[FileRecord]


class RegionRecord(_Model):
    """`size` elements from `offset` of a tensor, stored in `file`."""

    offset: list[NonNegativeInt]
    size: list[NonNegativeInt]
    file: str


class StoredTensor(_Model):
    shape: list[NonNegativeInt]
    dtype: str
    blocks: list[RegionRecord]


class Index(_Model):
    """Every tensor of a checkpoint by name."""

    tensors: dict[str, StoredTensor]

    @classmethod
    def from_metadata(cls, metadata: Metadata, file_of: dict[MetadataIndex, str]) -> Index:
        """The index of what torch.distributed.checkpoint planned, with the file that each region went to."""
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata), f"{name} is not a tensor"
            tensors[name] = StoredTensor(
                shape=list(stored.size),
                dtype=str(stored.properties.dtype).removeprefix("torch."),
                blocks=[
                    RegionRecord(
                        offset=list(c.offsets), size=list(c.sizes), file=file_of[MetadataIndex(name, c.offsets)]
                    )
                    for c in stored.chunks
                ],
            )
        return cls(tensors=tensors)

    def metadata(self) -> Metadata:
        """The index as torch.distributed.checkpoint's metadata; `storage_data` maps each region to its file's name."""
        stored, files = {}, {}
        for name, tensor in self.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(b.offset), torch.Size(b.size)) for b in tensor.blocks]
            properties = TensorProperties(dtype=DTYPE_OF_NAME[tensor.dtype])
            stored[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
            files.update({MetadataIndex(name, b.offset): b.file for b in tensor.blocks})
        return Metadata(state_dict_metadata=dict(stored), storage_data=files)

    def require_sound(self, path: Path, files: set[str]) -> None:
        """Raise a CheckpointError when a region lies outside its tensor, or in a file that the manifest lacks."""
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPE_OF_NAME:
                raise CheckpointError(f"{path / INDEX}: {name} has the unknown dtype {tensor.dtype!r}")
            for block in tensor.blocks:
                if block.file not in files:
                    raise CheckpointError(f"{path / INDEX}: {name} lies in {block.file!r}, which the manifest lacks")
                if not len(block.offset) == len(block.size) == len(tensor.shape) or any(
                    o + n > extent for o, n, extent in zip(block.offset, block.size, tensor.shape, strict=True)
                ):
                    raise CheckpointError(f"{path / INDEX}: a block of {name} lies outside its shape {tensor.shape}")


class GroupRecord(_Model):
    """A parameter group: names, and hyperparameters such as lr."""

    names: list[str]
    options: dict[str, Any]


class OptimizerRecord(_Model):
    """All of an optimizer's state that is not a tensor."""

    kind: str
    """Class of the optimizer."""
    groups: list[GroupRecord]
    values: dict[str, dict[str, Any]]
    """State that is a plain number: by parameter, by key."""


def write_text(path: Path, text: str) -> FileRecord:
    """Write a file and flush it to the disk."""
    data = text.encode()
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(name=path.name, bytes=len(data), crc32=zlib.crc32(data))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, which contains a checksum of itself."""
    body = manifest.model_dump(mode="json", exclude={"mesh": {"data_engine"}})  # files are the same under each engine
    write_text(folder / MANIFEST, json.dumps({"crc32": _checksum(body), "manifest": body}, indent=1) + "\n")


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: there is none, it is damaged, or it is not one of colrow's.
    """
    path = folder / MANIFEST
    if not path.is_file():
        foreign = (folder / ".metadata").exists()
        hint = "; its .metadata is a pickle, which colrow never reads: convert it with torch's tools" if foreign else ""
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a colrow checkpoint{hint}")
    tree = read_json(path)
    if not isinstance(tree, dict) or not isinstance(body := tree.get("manifest"), dict):
        raise CheckpointError(f"{path} is not a manifest of colrow")
    if not str(body.get("format", "")).startswith("colrow-checkpoint-"):
        raise CheckpointError(f"{path} is not a manifest of colrow")
    if body["format"] != Manifest.model_fields["format"].default:
        raise CheckpointError(f"{path} has the format {body['format']}: it needs another version of colrow")
    if tree.get("crc32") != _checksum(body):
        raise CheckpointError(f"{path} is damaged: its checksum differs")
    return _validated(Manifest, body, path)


def read_record(path: Path, record_cls: type[M]) -> M:
    """A JSON file as one of the models above. Raises CheckpointError when it is not one."""
    return _validated(record_cls, read_json(path), path)


def read_json(path: Path) -> JSON:
    """A JSON file's value. Raises CheckpointError when it cannot be read or is not JSON."""
    try:
        return json.loads(read_text(path, "file", CheckpointError, _MOST_BYTES))
    except CheckpointError as error:
        if isinstance(error.__cause__, UnicodeDecodeError):
            raise CheckpointError(f"{path} is not JSON: {error.__cause__}") from error
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error


def as_json(extra: dict[str, JSON]) -> str:
    """The text of what a training loop adds. Raises CheckpointError when reading it back would not give the same."""
    for key, value in extra.items():
        try:
            same = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"extra[{key!r}] is not JSON: {error}") from error
        if not same:
            raise CheckpointError(f"extra[{key!r}] changes when it is written as JSON: use lists and text keys")
    return json.dumps(extra)


def damage(folder: Path, manifest: Manifest, share: slice, checksums: bool) -> list[str]:
    """What is wrong with the files of a checkpoint: one line for each that is missing, of another size, or altered.

    `share` picks the files that this rank looks at. `checksums` reads them; else only sizes are compared.
    """

    def look(record: FileRecord) -> str | None:
        path = folder / record.name
        # A manifest may come from elsewhere: its names must not lead out of the folder.
        if os.path.basename(record.name) != record.name or record.name in ("", ".", ".."):
            return f"{record.name!r} is not the name of a file in it"
        try:
            seen = path.lstat()  # not stat: a link may lead to a file outside of the checkpoint
            if not stat.S_ISREG(seen.st_mode):
                return f"{record.name} is not a regular file"
            if seen.st_size != record.bytes:
                return f"{record.name} has {seen.st_size} bytes, not {record.bytes}"
            if checksums and checksum_of(path) != record.crc32:
                return f"{record.name} is altered: its checksum differs"
        except FileNotFoundError:
            return f"{record.name} is missing"
        except OSError as error:
            return f"{record.name} cannot be read: {error.strerror}"
        return None

    return [line for line in in_threads(look, manifest.files[share]) if line is not None]


def unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """Files in the folder that the manifest does not list, hidden ones (a network disk's own) left out."""
    known = {MANIFEST} | {record.name for record in manifest.files}
    found = sorted(p.name for p in folder.iterdir() if p.name not in known)
    return [
        f"{name} is there, which the manifest does not list (colrow would never read it: move it away)"
        for name in found
        if not name.startswith(".") or name == ".metadata"
    ]


def _checksum(body: JSON) -> int:
    # of one canonical text, so that white space in the file plays no role
    return zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())


def _validated(record_cls: type[M], tree: Any, path: Path) -> M:
    try:
        return record_cls.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path} is damaged: {where}: {first['msg']}") from error
