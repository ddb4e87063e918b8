"""The folder of a run's checkpoints, and the names in it that make every change atomic.

[Note: names]
`step-N`             whole: it got this name by a rename, after every file in it was flushed to the disk
`step-N.unfinished`  being written, or left by a save that was killed
`step-N.former`      replaced by a newer save of the same step; where no `step-N` stands beside it, the whole one
`step-N.removed`     being removed, or left by a removal that was killed
A kill between any two steps leaves each checkpoint under one name that tells the truth about it.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"step-(0|[1-9]\d*)(?:\.(unfinished|former|removed))?")


@dataclass(frozen=True)
class Slot:
    """One name in the folder that belongs to a checkpoint."""

    step: int
    path: Path
    suffix: str
    """`""`, `unfinished`, `former` or `removed`."""


class Folder:
    """A run's checkpoints on disk. One process changes it at a time."""

    def __init__(self, root: Path):
        self.root = root

    def final(self, step: int) -> Path:
        return self.root / f"step-{step}"

    def unfinished(self, step: int) -> Path:
        """Where a checkpoint is written before it gets its name."""
        return self.root / f"step-{step}.unfinished"

    def slots(self) -> list[Slot]:
        """All checkpoints and leftovers, by step. A replaced one counts as itself where its successor is missing."""
        found = list(self._named())
        finished = {slot.step for slot in found if not slot.suffix}
        orphans = [slot for slot in found if slot.suffix == "former" and slot.step not in finished]
        return sorted(
            (Slot(slot.step, slot.path, "") if slot in orphans else slot for slot in found),
            key=lambda slot: (slot.step, slot.suffix),
        )

    def begin(self, step: int) -> Path:
        """Remove what killed saves left, and make the folder that step `step` is written to."""
        self.root.mkdir(parents=True, exist_ok=True)
        for slot in self.slots():
            if slot.suffix:
                _remove(slot.path)
            elif slot.path != self.final(slot.step):
                os.rename(slot.path, self.final(slot.step))  # replaced, but its successor never got the name
        path = self.unfinished(step)
        path.mkdir()
        return path

    def commit(self, step: int) -> None:
        """Give the written checkpoint its name. Its files are on the disk already."""
        written, final, former = self.unfinished(step), self.final(step), self.root / f"step-{step}.former"
        flush(written)
        if final.exists():
            os.rename(final, former)
        os.rename(written, final)
        flush(self.root)
        _remove(former)

    def discard(self, step: int) -> None:
        """Remove what a failed save wrote, to give its space back."""
        _remove(self.unfinished(step))

    def remove(self, slot: Slot) -> None:
        """Remove a whole checkpoint: it first loses its name, so that a part of it never looks like one."""
        removed = self.root / f"step-{slot.step}.removed"
        _remove(removed)
        os.rename(slot.path, removed)
        _remove(removed)

    def _named(self) -> Iterator[Slot]:
        names = os.listdir(self.root) if self.root.is_dir() else []
        for name in names:
            if match := _NAME.fullmatch(name):
                yield Slot(int(match[1]), self.root / name, match[2] or "")


def flush(folder: Path) -> None:
    """Flush a folder's list of names to the disk, where the file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def in_words(count: int) -> str:
    """A number of bytes for people: `1.5 GiB`."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"


def _remove(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
