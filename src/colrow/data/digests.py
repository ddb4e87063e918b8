"""Content digests of files, cached for as long as nothing about a file changes.

A corpus is known by what its files hold, so every start of every rank would have to read all of it. As a version
control system does, a digest is kept with the file's size, times and inode: when one differs, the file is read again.
A file that changed within the last seconds is not cached: a second change could fall on the same clock tick.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from colrow.data.disk import atomic_write, read_kept
from colrow.errors import DataError

_SETTLED_SECONDS = 2.0
_READERS = 4
_BLOCK_BYTES = 1 << 18


def digest_of(*parts: str | bytes) -> str:
    """32 hex digits over `parts`, each with its length, so that no two lists of parts run into one another."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def digest_files(
    paths: Sequence[Path], cache: Path | None = None, inspect: Callable[[Path], None] = lambda path: None
) -> list[str]:
    """The content digest of each of `paths`, in their order.

    Args:
        cache: a JSON file that keeps digests between calls; None reads every file.
        inspect: called with each file that is read because `cache` lacks it; what it raises keeps all out of `cache`.

    Raises:
        DataError: a file cannot be read.
    """
    known = _load(cache)
    states = [_state(path) for path in paths]
    names = [os.path.abspath(path) for path in paths]
    stale = [  # `known` has the state and, last, the digest
        i for i, (name, state) in enumerate(zip(names, states, strict=True)) if known.get(name, [None])[:-1] != state
    ]
    stopped = threading.Event()
    with ThreadPoolExecutor(_READERS) as pool:
        try:
            for i, digest in zip(stale, pool.map(lambda i: _read(paths[i], stopped), stale), strict=True):
                inspect(paths[i])
                known[names[i]] = [*states[i], digest]
        finally:  # after Ctrl-C the pool waits for its threads, and a file may be of hours
            stopped.set()
    digests = [str(known[name][-1]) for name in names]
    if cache is not None and stale:
        settled = time.time_ns() - int(_SETTLED_SECONDS * 1e9)
        kept = {
            name: known[name]
            for name, (_, mtime, ctime, _) in zip(names, states, strict=True)
            if max(mtime, ctime) < settled
        }
        _store(cache, kept)
    return digests


def _state(path: Path) -> list[int]:
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(path: Path, stopped: threading.Event) -> str:
    """The digest of a file; of what was read so far once `stopped`."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb", buffering=0) as file:
            while not stopped.is_set() and (block := file.read(_BLOCK_BYTES)):
                digest.update(block)
        return digest.hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _load(cache: Path | None) -> dict[str, list]:
    tree = {} if cache is None else read_kept(cache, dict[str, Any]) or {}
    # what is damaged is left out, and the file itself is read: a wrong digest would be that of another corpus
    return {k: v for k, v in tree.items() if isinstance(v, list) and v and re.fullmatch("[0-9a-f]{32}", str(v[-1]))}


def _store(cache: Path, digests: dict[str, list]) -> None:
    with contextlib.suppress(OSError):  # only time is lost: in a cache that cannot be written files are read again
        atomic_write(cache, json.dumps(digests))
