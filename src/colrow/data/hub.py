"""A dataset of the `datasets` library as a corpus, streamed: from a local folder, or from the Hugging Face Hub.

`hf:NAME`, `hf:NAME:CONFIG`, or `hf:NAME:CONFIG:SPLIT`; NAME is a folder where one of that name exists.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from colrow.data.digests import digest_files, digest_of
from colrow.data.disk import atomic_write, read_kept
from colrow.data.documents import Corpus
from colrow.data.files import missing_key, require_text
from colrow.errors import DataError

_READER = "1"
_log = logging.getLogger(__name__)


class DatasetCorpus(Corpus):
    """One split of a dataset.

    Args:
        folder: where the dataset lies; None for one on the Hub.
    """

    def __init__(
        self,
        name: str,
        config: str | None,
        split: str,
        text_key: str,
        folder: Path | None,
        digest_cache: Path | None = None,
    ) -> None:
        super().__init__(digest_cache)
        self.name, self.config, self.split, self.text_key = name, config, split, text_key
        self.folder = folder
        self._commit: str | None = None

    def describe(self) -> str:
        config = f", config {self.config}" if self.config else ""
        return f"hf:{self.name} (split {self.split}{config})"

    def fingerprint(self) -> str:
        """A hash of a folder's files, by content and by name within it; of a dataset on the Hub, of its commit."""
        source: list[str] = []
        if self.folder is None:
            source = [self.name, self._find_commit()]
        else:
            paths = sorted(path for path in self.folder.rglob("*") if path.is_file() and not _hidden(path, self.folder))
            source = [path.relative_to(self.folder).as_posix() for path in paths] + digest_files(
                paths, self.digest_cache
            )
        return digest_of("dataset", _READER, self.config or "", self.split, self.text_key, *source)

    def _find_commit(self) -> str:
        """The commit at the head of the dataset; where the Hub is out of reach, the one that was last seen."""
        cache = self.digest_cache
        if self._commit is None:
            try:
                self._commit = _head_commit(self.name)
            except Exception as error:
                seen = None if cache is None else read_kept(cache, dict[str, str])
                if seen is None or "commit" not in seen:
                    raise DataError(
                        f"cannot reach dataset {self.name!r} on the Hugging Face Hub ({_text_of(error)}): check the "
                        f"name and the network, or download it and give the folder: hf:FOLDER"
                    ) from error
                self._commit = seen["commit"]
                _log.warning("the Hugging Face Hub is out of reach: %s is read at commit %s", self.name, self._commit)
            else:
                if cache is not None:
                    with contextlib.suppress(OSError):  # a cache that cannot be written only forgets the commit
                        atomic_write(cache, json.dumps({"commit": self._commit}))
        return self._commit

    def _read(self) -> Iterator[str]:
        number = 0
        try:
            for row in self._open():
                number += 1
                if self.text_key not in row:
                    raise missing_key(self.text_key, f"dataset {self.describe()}", list(row))
                yield require_text(
                    row[self.text_key], f"dataset {self.describe()} row {number}, key {self.text_key!r},"
                )
        except (DataError, GeneratorExit):
            raise
        except Exception as error:
            raise DataError(
                f"dataset {self.describe()}: reading fails after {number} rows: {_text_of(error)}"
            ) from error

    def _open(self) -> Any:
        """An iterable of rows (dict)."""
        datasets = _import_datasets()
        if self.folder is not None and (self.folder / "dataset_dict.json").exists():
            splits = datasets.load_from_disk(str(self.folder))
            if self.split not in splits:
                raise self._no_split(list(splits))
            return splits[self.split]  # memory-mapped, so iterating streams
        if self.folder is not None and (self.folder / "state.json").exists():
            return datasets.load_from_disk(str(self.folder))
        path = self.name if self.folder is None else str(self.folder)
        try:
            splits = datasets.load_dataset(path, name=self.config, revision=self._commit, streaming=True)
        except ValueError as error:
            if "Config name is missing" in str(error) or "BuilderConfig" in str(error):
                raise DataError(
                    f"dataset {self.name} needs one of its configs: {_text_of(error)}; "
                    f"write corpus: hf:{self.name}:CONFIG"
                ) from error
            raise
        if self.split not in splits:
            raise self._no_split(list(splits))
        return splits[self.split]

    def _no_split(self, splits: list[str]) -> DataError:
        config = self.config or ""
        return DataError(
            f"dataset {self.name} has no split {self.split!r}, but {', '.join(sorted(splits))}: "
            f"write corpus: hf:{self.name}:{config}:{min(splits, default='SPLIT')}"
        )


def open_dataset(corpus: str, text_key: str, digest_cache: Path | None = None) -> DatasetCorpus:
    """The corpus of `hf:NAME[:CONFIG[:SPLIT]]`; the split is `train` unless given.

    Raises:
        DataError: the `datasets` extra is missing, or a folder is meant that does not exist.
    """
    _import_datasets()
    requested = corpus.removeprefix("hf:")
    # a folder's name may have colons too
    readings = ([*requested.rsplit(":", colons), "", ""] for colons in range(3))
    local = next((parts for parts in readings if os.path.isdir(os.path.expanduser(parts[0]))), None)
    name, config, split = (local or [*requested.split(":"), "", ""])[:3]
    if not name or (local is None and requested.count(":") > 2):
        raise DataError(f"corpus {corpus!r} names no dataset: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
    path = Path(os.path.expanduser(name))
    folder_or_hub = path if path.is_dir() else None
    if folder_or_hub is None and (path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise DataError(f"corpus {corpus!r}: there is no folder {name} (searched from {Path.cwd()})")
    return DatasetCorpus(name, config or None, split or "train", text_key, folder_or_hub, digest_cache)


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"a corpus hf:... needs the datasets library ({error}): pip install 'colrow[datasets]'"
        ) from error
    return datasets


def _head_commit(name: str) -> str:
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(name, timeout=20.0).sha)


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _text_of(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip() or 'no message'}"
