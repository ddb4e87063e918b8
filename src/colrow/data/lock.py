"""A lock between processes that a killed process cannot leave behind: the kernel drops it with the file."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from colrow.errors import DataError

_POLL_SECONDS = 0.2
_NO_LOCKS_HERE = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock on `path` alone; `on_wait` is called several times a second while another process holds it.

    Raises:
        DataError: the file cannot be written, or its file system has no locks.
    """
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        while not _take(file.fileno(), path):
            on_wait()
            time.sleep(_POLL_SECONDS)
        yield


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to the cache, into a DataError with the mend."""
    try:
        yield
    except OSError as error:
        mend = "free some space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DataError(
            f"cannot write to the cache folder {folder}: {error.strerror or error}: "
            f"{mend}set data.cache to a folder that can be written"
        ) from error


def _take(fd: int, path: Path) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS_HERE:
            raise DataError(
                f"the file system of {path.parent} has no file locks ({error.strerror}): "
                f"set data.cache to a local disk, or to a shared one that has them"
            ) from error
        raise
    return True
