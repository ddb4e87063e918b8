"""Files that several processes use at once: atomic writes, and locks that a killed process cannot leave behind."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from colrow.errors import DataError
from colrow.yaml_text import read_text

T = TypeVar("T")
_POLL_SECONDS = 0.2
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class NoFileLocksError(OSError):
    """The file system has no locks, as some network file systems."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in errors of the operating system that name none, as those of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def atomic_write(path: Path, text: str) -> None:
    """Write `text` under a temporary name, flush, rename: a reader sees the previous file or the new one."""
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with writing(path), partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # before the rename: after a power cut the name must not point to an empty file
        partial.replace(path)  # atomic within a file system, hence the temporary name beside the target
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def remove(path: Path) -> None:
    """Remove whatever is there; of a folder, as much as can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:  # rmtree would wait for a pipe's writer
        path.unlink(missing_ok=True)


def read_kept(path: Path, kind: type[T]) -> T | None:
    """What was kept in a JSON file to save work; None where there is none, or the file holds something else."""
    from pydantic import TypeAdapter  # worker processes do without

    try:
        return TypeAdapter(kind).validate_json(read_text(path, "file", DataError))
    except ValueError:  # a DataError too
        return None


def write_result(path: Path, text: str) -> None:
    """Write what a command was asked to write: where it fails, as on a full disk, a previous file is still there."""
    target = path.resolve()  # through a link: its name stays one
    if target.exists() and not target.is_file():  # /dev/stdout
        with writing(path):
            path.write_text(text, encoding="utf-8")
    else:
        atomic_write(target, text)


def try_lock(file: IO[Any]) -> bool:
    """Take the lock on `file` for this process, unless another process holds it. Returns whether it was taken.

    The kernel releases it when the file is closed or the process ends, however it ends.

    Raises:
        NoFileLocksError: the file system has none.
    """
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise NoFileLocksError(error.errno, error.strerror) from error
        raise
    return True


@contextmanager
def locked(path: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold the lock on `path`, in the cache; `on_wait` is called several times a second while another process has it.

    Raises:
        DataError: the file cannot be written, or its file system has no locks.
    """
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        try:
            while not try_lock(file):
                on_wait()
                time.sleep(_POLL_SECONDS)
        except NoFileLocksError as error:
            raise DataError(
                f"the file system of {path.parent} has no file locks ({error.strerror}): "
                f"set data.cache to a local disk, or to a shared one that has them"
            ) from error
        yield


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes to the cache, into a DataError that says how to fix it."""
    try:
        yield
    except OSError as error:
        space = "free some space there, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise DataError(
            f"cannot write to the cache folder {folder}: {error.strerror or error}: "
            f"{space}set data.cache to a folder that can be written"
        ) from error
