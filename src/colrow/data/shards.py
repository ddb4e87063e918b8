"""Token shards: the corpus as one memory-mapped array of ids for training and one for validation.

A folder holds `train.bin` and `validation.bin` (ids, little-endian, documents one after another, each closed by the
end-of-text id) and `meta.json`. It is written under a temporary name and renamed when complete: a folder of the right
name is complete. The bytes depend on the documents and the tokenizer alone, not on how many processes wrote them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from colrow.data.digests import digest_files, digest_of
from colrow.data.disk import atomic_write, writing_to
from colrow.data.documents import Corpus
from colrow.data.encode import Encoded, encode_in_order
from colrow.data.progress import PreparationProgress
from colrow.data.tokenizer import Tokenizer
from colrow.errors import DataError
from colrow.yaml_text import read_text

FORMAT = 1
SPLITS = ("train", "validation")
_CHUNK_CHARS = 1 << 19


class TokenArray:
    """A split's ids on disk, memory-mapped when first read. Cheap to pickle: a process that gets it maps it again."""

    def __init__(self, path: Path, dtype: str, length: int) -> None:
        self.path, self.dtype, self.length = path, dtype, length
        self._map: np.memmap | None = None

    def __len__(self) -> int:
        return self.length

    def __reduce__(self) -> tuple[type[TokenArray], tuple[Path, str, int]]:
        return TokenArray, (self.path, self.dtype, self.length)

    @property
    def ids(self) -> np.ndarray:
        """All ids, [length], uint16 or uint32."""
        if self._map is None:
            self._map = np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.length,))
        return self._map

    def windows(self, seq_len: int) -> int:
        """How many stretches of `seq_len` ids there are that have a next id for each."""
        return max(self.length - 1, 0) // seq_len

    def read(self, indices: np.ndarray, seq_len: int) -> np.ndarray:
        """The windows `indices` [n], each with the id after it: int64 [n, seq_len + 1]."""
        out = np.empty((len(indices), seq_len + 1), dtype=np.int64)
        for row, index in zip(out, indices, strict=True):
            start = int(index) * seq_len
            row[:] = self.ids[start : start + seq_len + 1]
        return out


@dataclass(frozen=True)
class ShardMeta:
    """What meta.json says. Counts are by split."""

    format: int
    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer: str
    """Tokenizer.digest."""
    corpus: str
    """Corpus.fingerprint."""
    source: str
    """Corpus.describe."""
    validation_fraction: float
    documents: dict[str, int]
    tokens: dict[str, int]
    text_bytes: dict[str, int]
    digests: dict[str, str]
    """The content digests of the .bin files."""
    special: int = 0
    """Documents that spell a special token; not counted by older versions."""

    def open(self, folder: Path, split: str) -> TokenArray:
        return TokenArray(folder / f"{split}.bin", self.dtype, self.tokens[split])


def read_meta(folder: Path) -> ShardMeta:
    """The meta.json of `folder`.

    Raises:
        DataError: it is missing or of another format, or a .bin file is not of the size that it states.
    """
    from pydantic import TypeAdapter, ValidationError  # worker processes do without

    try:
        text = read_text(folder / "meta.json", "file", DataError)
    except DataError as error:
        raise DataError(f"token shards {folder} cannot be read: {error}") from error
    try:
        tree = json.loads(text)
        if tree["format"] != FORMAT:
            raise DataError(f"token shards {folder} have format {tree['format']}, not {FORMAT}")
        digest = tree.pop("digest", None)  # older versions wrote none
        if digest is not None and digest != _digest(tree):
            raise DataError(f"token shards {folder} are damaged: meta.json is not what was written")
        tree.pop("first_held_out", None)  # written by older versions, which computed an advice from it
        meta = TypeAdapter(ShardMeta).validate_json(json.dumps(tree), strict=True)
        if meta.dtype != dtype_for(meta.vocab_size):
            raise DataError(f"token shards {folder} are damaged: ids of {meta.vocab_size} tokens are no {meta.dtype}")
        for split in SPLITS:
            size = (folder / f"{split}.bin").stat().st_size
            if any(split not in counts for counts in (meta.documents, meta.text_bytes, meta.digests)):
                raise DataError(f"token shards {folder} are damaged: meta.json has no counts of {split}")
            expected = meta.tokens[split] * np.dtype(meta.dtype).itemsize
            if size != expected:
                raise DataError(f"token shards {folder} are damaged: {split}.bin has {size:,} bytes, not {expected:,}")
    except OSError as error:
        raise DataError(f"token shards {folder} cannot be read: {error}") from error
    except DataError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"token shards {folder} are damaged: meta.json: {where}: {first['msg']}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"token shards {folder} are damaged: meta.json: {error}") from error
    return meta


def _digest(tree: dict[str, Any]) -> str:
    """The digest of what a meta.json says."""
    return digest_of(json.dumps(tree, sort_keys=True))


def verify_shards(folder: Path, meta: ShardMeta, cache: Path) -> None:
    """Compare the .bin files with the digests of meta.json, and their ids with the vocabulary.

    Args:
        cache: remembers the files that were verified, which are not read again while size, times and inode stay.

    Raises:
        DataError: a file holds other ids than were written, or one that is not below the vocabulary.
    """

    def require_ids(path: Path) -> None:
        tokens = meta.open(folder, path.stem)
        greatest = int(tokens.ids.max()) if len(tokens) else 0
        if greatest >= meta.vocab_size:
            place = int(np.argmax(tokens.ids))
            raise DataError(
                f"token shards {folder}: {path.name} holds the id {greatest:,} at {place:,}, and the vocabulary has "
                f"{meta.vocab_size:,} tokens"
            )

    paths = [folder / f"{split}.bin" for split in SPLITS]
    for path, digest in zip(paths, digest_files(paths, cache, require_ids), strict=True):
        if digest != meta.digests[path.stem]:
            raise DataError(f"token shards {folder} are damaged: {path.name} is not what was written")


def partial_folders(folder: Path) -> list[Path]:
    """Folders that builds of `folder` are writing now, or left when they were killed."""
    return sorted(folder.parent.glob(f"{folder.name}.partial-*"))


def build_shards(
    corpus: Corpus,
    tokenizer: Tokenizer,
    folder: Path,
    *,
    fingerprint: str,
    validation_fraction: float,
    workers: int,
    progress: PreparationProgress,
) -> ShardMeta:
    """Tokenize `corpus` into `folder`, which must not exist, with `workers` processes (1: in this one).

    A document is held out for validation by a hash of its text: equal documents fall into the same split, and the order
    of documents plays no role. The caller holds a lock: nobody else builds the same folder.

    Args:
        fingerprint: the corpus's, taken before the tokenizer was trained; it is compared again at the end.

    Raises:
        DataError: the corpus cannot be read or has changed meanwhile, or the folder cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    dtype = dtype_for(tokenizer.vocab_size)
    progress.stage("tokenizing", corpus.size())
    try:
        with writing_to(folder.parent):
            partial.mkdir(parents=True)
            splits = _SplitWriters(partial, dtype, validation_fraction)
        with closing(encode_in_order(_chunks(corpus), tokenizer, dtype, workers)) as stream:
            for encoded in stream:
                with writing_to(folder.parent):
                    splits.add(encoded)
                progress.advance(int(encoded.text_bytes.sum()), f"{splits.tokens / 1e6:,.1f}M tokens")
        # else the shards of what is there now would be found under the name of what was there
        if corpus.fingerprint() != fingerprint:
            raise DataError(f"corpus {corpus.describe()} has changed while it was read: start again when it is at rest")
        with writing_to(folder.parent):
            meta = splits.close(corpus, fingerprint, tokenizer)
            tokenizer.save(partial)
            tree = asdict(meta)
            atomic_write(partial / "meta.json", json.dumps(tree | {"digest": _digest(tree)}, indent=2))
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def dtype_for(vocab_size: int) -> str:
    """The narrowest type that holds every id below `vocab_size`."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class _SplitWriters:
    """The files of both splits while they grow."""

    def __init__(self, folder: Path, dtype: str, validation_fraction: float) -> None:
        self._writers = {split: _Writer(folder / f"{split}.bin", dtype) for split in SPLITS}
        self._dtype, self._validation_fraction, self._special = dtype, validation_fraction, 0

    @property
    def tokens(self) -> int:
        return sum(writer.tokens for writer in self._writers.values())

    def add(self, encoded: Encoded) -> None:
        held_out = encoded.fractions < self._validation_fraction
        self._writers["train"].add(encoded, ~held_out)
        self._writers["validation"].add(encoded, held_out)
        self._special += encoded.special

    def close(self, corpus: Corpus, fingerprint: str, tokenizer: Tokenizer) -> ShardMeta:
        writers = self._writers.items()
        return ShardMeta(
            format=FORMAT,
            dtype=self._dtype,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            tokenizer=tokenizer.digest,
            corpus=fingerprint,
            source=corpus.describe(),
            validation_fraction=self._validation_fraction,
            documents={split: writer.documents for split, writer in writers},
            tokens={split: writer.tokens for split, writer in writers},
            text_bytes={split: writer.text_bytes for split, writer in writers},
            digests={split: writer.close() for split, writer in writers},
            special=self._special,
        )


class _Writer:
    """One split's file while it grows."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.blake2b(digest_size=16)
        self._dtype = dtype
        self.documents = self.tokens = self.text_bytes = 0

    def add(self, encoded: Encoded, mask: np.ndarray) -> None:
        """Append the documents of `encoded` that `mask` [documents] (bool) selects."""
        ids = encoded.ids[np.repeat(mask, encoded.lengths)].astype(self._dtype, copy=False)
        data = ids.tobytes()
        self._file.write(data)
        self._file.flush()  # waiting processes show progress from the size of this file
        self._digest.update(data)
        self.documents += int(mask.sum())
        self.tokens += len(ids)
        self.text_bytes += int(encoded.text_bytes[mask].sum())

    def close(self) -> str:
        """Flush to disk; the digest of all that was written."""
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())
        return self._digest.hexdigest()


def _chunks(corpus: Corpus) -> Iterator[list[str]]:
    """Documents in groups of about half a million characters: what one process encodes at a time."""
    texts: list[str] = []
    chars = 0
    for text in corpus:
        texts.append(text)
        chars += len(text)
        if chars >= _CHUNK_CHARS:
            yield texts
            texts, chars = [], 0
    if texts:
        yield texts
