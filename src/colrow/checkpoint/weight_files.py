"""The safetensors files of an export: which tensors go into which, and which rank writes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colrow.checkpoint.gather import Gather, GlobalTensor
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.ranks import Ranks
from colrow.checkpoint.stored_files import SINGLE
from colrow.checkpoint.tensor_file import Entry, into_files, write_tensors
from colrow.errors import CheckpointError

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file: its name and its tensors, in order."""

    name: str
    tensors: dict[str, GlobalTensor]

    @property
    def bytes(self) -> int:
        return sum(tensor.bytes for tensor in self.tensors.values())


def split_files(tensors: dict[str, GlobalTensor], max_bytes: int) -> list[ShardFile]:
    """Consecutive tensors in files of at most `max_bytes`; a tensor that is larger has a file of its own."""
    if max_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_bytes} holds no tensor: use some gigabytes")
    groups = [dict(group) for group in into_files(tensors.items(), lambda item: item[1].bytes, max_bytes)]
    if len(groups) <= 1:
        return [ShardFile(SINGLE, group) for group in groups]
    count = len(groups)
    return [ShardFile(f"model-{i + 1:05}-of-{count:05}.safetensors", group) for i, group in enumerate(groups)]


def share_files(files: Sequence[ShardFile], ranks: int) -> list[list[ShardFile]]:
    """The files that each rank writes: the largest first, each to the rank with the least so far."""
    shares: list[list[ShardFile]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for file in sorted(files, key=lambda file: -file.bytes):
        least = load.index(min(load))
        shares[least].append(file)
        load[least] += file.bytes
    return shares


def write_share(
    folder: Path,
    ranks: Ranks,
    pieces: Sequence[Piece],
    tensors: dict[str, GlobalTensor],
    shares: Sequence[Sequence[ShardFile]],
) -> None:
    """Write this rank's share of the files. Collective.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    queues = [[name for file in share for name in _file_order(file)] for share in shares]
    gather = Gather(ranks, pieces, tensors, queues)
    try:
        for file in shares[ranks.rank]:
            entries = [_entry(name, file.tensors[name], gather) for name in _file_order(file)]
            write_tensors(folder / file.name, entries, {"format": "pt"})  # as save_pretrained writes it
    finally:
        gather.finish()  # a full disk here must not leave the others waiting for this rank's pieces


def _file_order(file: ShardFile) -> list[str]:
    """The order of `write_tensors`, wide elements first: tensors are gathered when they are written."""
    return sorted(file.tensors, key=lambda name: -file.tensors[name].dtype.itemsize)


def _entry(name: str, tensor: GlobalTensor, gather: Gather) -> Entry:
    return Entry(name, tensor.shape, tensor.dtype, lambda: gather.next(name))
