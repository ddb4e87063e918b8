"""A model's tensors as several safetensors files, each written by one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colrow.checkpoint.gather import Gather, Whole
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.ranks import Ranks
from colrow.checkpoint.tensor_file import Entry, write_tensors
from colrow.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class ShardFile:
    """One safetensors file: its name and its tensors, in order."""

    name: str
    tensors: dict[str, Whole]

    @property
    def bytes(self) -> int:
        return sum(whole.bytes for whole in self.tensors.values())


def split_files(tensors: dict[str, Whole], max_bytes: int) -> list[ShardFile]:
    """Consecutive tensors in files of at most `max_bytes`; a tensor that is larger has a file of its own."""
    if max_bytes < 1:
        raise CheckpointError(f"max_shard_bytes={max_bytes} holds no tensor: use some gigabytes")
    parts: list[dict[str, Whole]] = []
    room = 0
    for name, whole in tensors.items():
        if not parts or whole.bytes > room:
            parts.append({})
            room = max_bytes
        parts[-1][name] = whole
        room -= whole.bytes
    if len(parts) <= 1:
        return [ShardFile(SINGLE, part) for part in parts]
    count = len(parts)
    return [ShardFile(f"model-{i + 1:05}-of-{count:05}.safetensors", part) for i, part in enumerate(parts)]


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
    tensors: dict[str, Whole],
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
            write_tensors(folder / file.name, entries, {"format": "pt"})
    finally:
        gather.finish()  # a full disk here must not leave the others waiting for this rank's pieces


def _file_order(file: ShardFile) -> list[str]:
    """`write_tensors` takes wide elements first."""
    return sorted(file.tensors, key=lambda name: -file.tensors[name].dtype.itemsize)


def _entry(name: str, whole: Whole, gather: Gather) -> Entry:
    return Entry(name, whole.shape, whole.dtype, lambda: gather.next(name))
