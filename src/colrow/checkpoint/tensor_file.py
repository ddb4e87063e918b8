"""Files of tensors in the safetensors format, which holds a JSON header and raw numbers: nothing that can run.

The header is known before the first tensor is at hand, so that tensors stream from the device to the disk one at a
time, and the checksum is computed on the way. Reading goes through `safetensors`, which validates the header.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from colrow.errors import CheckpointError
from colrow.sharding.layout import Region
from colrow.yaml_text import refuse_endless

T = TypeVar("T")
R = TypeVar("R")

THREADS = 4
BLOCK = 16 << 20  # bytes that are checksummed while they are warm in the cache

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Entry:
    """One tensor to write: `fetch` is called once, when its turn comes."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fetch: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(path: Path, entries: Sequence[Entry], metadata: dict[str, str] | None = None) -> tuple[int, int]:
    """Write a new file and flush it to the disk. Returns its size in bytes and its CRC-32.

    `metadata` goes into the header under the format's own key for it.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # wide ones first keeps all of them aligned
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for entry in entries:
        start, end = end, end + entry.bytes
        header[entry.key] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data to begin at a multiple of 8
    head = len(text).to_bytes(8, "little") + text
    checksum = zlib.crc32(head)
    with path.open("xb") as file:  # x: two ranks that take the same name must fail, not overwrite
        file.write(head)
        for entry in entries:
            data = _as_bytes(entry.fetch())
            assert len(data) == entry.bytes, f"{entry.key}: {len(data)} bytes where {entry.bytes} were planned"
            for first in range(0, len(data), BLOCK):
                block = data[first : first + BLOCK]
                checksum = zlib.crc32(block, checksum)
                file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return len(head) + end, checksum


def checksum_of(path: Path) -> int:
    """CRC-32 of a file."""
    checksum, buffer = 0, bytearray(BLOCK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(view[:count], checksum)
    return checksum


def in_threads(work: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """`work` of each value, in their order. The first failure is raised once no thread works any more."""
    values = list(values)
    if len(values) < 2:
        return [work(value) for value in values]
    # In a forked process torch makes its thread pool again at its next use. Threads that race for that fail ("Invalid
    # thread pool"), so this thread uses it first.
    torch.set_num_threads(torch.get_num_threads())
    with ThreadPoolExecutor(min(THREADS, len(values))) as pool:
        futures = [pool.submit(work, value) for value in values]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class TensorReader:
    """Reads regions of tensors out of one file. A context manager."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> TensorReader:
        refuse_endless(self.path, CheckpointError)
        try:
            self.file = safe_open(self.path, framework="pt", device="cpu")
            self.file.__enter__()
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is not a safetensors file: {_what_instead(self.path, error)}"
            ) from error
        return self

    def __exit__(self, *args: object) -> None:
        self.file.__exit__(*args)

    def read(self, key: str, region: Region) -> Tensor:
        """A region of the tensor `key`, in host memory; nothing else of it is read."""
        try:
            if not region.size:  # safetensors cannot slice a scalar
                return self.file.get_tensor(key)
            return self.file.get_slice(key)[region.slices]
        except (SafetensorError, IndexError, ValueError) as error:
            raise CheckpointError(f"{self.path} does not hold {key} as the index says: {error}") from error


def _what_instead(path: Path, error: Exception) -> str:
    """What is wrong with a file that cannot be opened as tensors, and what to do."""
    if path.is_dir():
        return "it is a folder: fetch it again"
    with contextlib.suppress(OSError), path.open("rb") as file:
        start = file.read(64)
        if start.startswith((b"PK", b"\x80")):
            return "it is pickled, which could run code: save the model with save_pretrained of transformers"
        if start.startswith(b"version https://git-lfs"):
            return "it is a pointer of Git LFS: run `git lfs pull` in its folder"
    reason = str(error).removeprefix("Error while deserializing header: ")
    return f"{reason}: fetch it again"


class TensorHeader(NamedTuple):
    """What a file's header says of a tensor; the dtype by its name in the format (`BF16`)."""

    shape: tuple[int, ...]
    dtype: str


def headers_in(path: Path) -> dict[str, TensorHeader]:
    """Each tensor in a file, from its header alone."""
    with TensorReader(path) as reader:
        slices = {key: reader.file.get_slice(key) for key in reader.file.keys()}  # noqa: SIM118
        return {key: TensorHeader(tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}


def into_files(items: Iterable[T], bytes_of: Callable[[T], int], max_bytes: int) -> list[list[T]]:
    """Consecutive items in groups of at most `max_bytes`; a larger item has a group of its own."""
    groups: list[list[T]] = []
    room = 0
    for item in items:
        if not groups or bytes_of(item) > room:
            groups.append([])
            room = max_bytes
        groups[-1].append(item)
        room -= bytes_of(item)
    return groups


def _as_bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)  # viewed as bytes, since numpy has no bfloat16 and no fp8
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
