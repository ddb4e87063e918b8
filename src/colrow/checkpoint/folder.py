"""The folder of a run's checkpoints: the names in it that make every change atomic, and what is there in what state.

[Note: names]
`step-N`             complete: it got this name by a rename, after every file in it was flushed to the disk
`step-N.unfinished`  being written, or left by a save that was killed
`step-N.former`      replaced by a newer save of the same step; where no `step-N` is beside it, the complete one
`step-N.removed`     being removed, or left by a removal that was killed
A kill between any two steps leaves each checkpoint under one name that tells the truth about it.
"""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from colrow.checkpoint.manifest import damage, read_manifest, unlisted
from colrow.data.disk import remove
from colrow.errors import CheckpointError
from colrow.mesh import Mesh

State = Literal["complete", "unfinished", "damaged"]

_LEFT_BY = {
    "unfinished": "its save was killed, or is still running",
    "former": "replaced by a newer save of the same step",
    "removed": "its removal was killed, or is still running",
}
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
                remove(slot.path)
            elif slot.path != self.final(slot.step):
                os.rename(slot.path, self.final(slot.step))  # a kill between commit's two renames left only this one
        path = self.unfinished(step)
        path.mkdir()
        return path

    def commit(self, step: int) -> None:
        """Give the written checkpoint its name. Its files are on the disk already."""
        replace_folder(self.unfinished(step), self.final(step), self.root / f"step-{step}.former")

    def discard(self, step: int) -> None:
        """Remove what a failed save wrote, to give its space back."""
        remove(self.unfinished(step))

    def remove(self, slot: Slot) -> None:
        """Remove a checkpoint. It loses its name first, so that one that is half removed never looks complete."""
        removed = self.root / f"step-{slot.step}.removed"
        remove(removed)
        os.rename(slot.path, removed)
        remove(removed)

    def _named(self) -> Iterator[Slot]:
        names = os.listdir(self.root) if self.root.is_dir() else []
        for name in names:
            if match := _NAME.fullmatch(name):
                yield Slot(int(match[1]), self.root / name, match[2] or "")


@dataclass(frozen=True)
class CheckpointInfo:
    """One checkpoint of a run, or what is left of one."""

    step: int
    path: Path
    mesh: Mesh | None
    """The mesh that saved it, where it is known."""
    bytes: int
    """Size on disk."""
    state: State
    reason: str = ""
    """Why it is not complete."""
    saved: str = ""
    """When: UTC, ISO 8601."""


def list_checkpoints(folder: Folder, checksums: bool = False) -> list[CheckpointInfo]:
    """Everything in the folder that is or was a checkpoint, oldest step first. Not collective.

    Complete means that all files are there in the right size; `checksums` reads them too, which takes as long as
    reading the checkpoints does.
    """
    found = (inspect(slot, checksums) for slot in folder.slots())
    return [info for info in found if info is not None]


def newest_complete(infos: list[CheckpointInfo]) -> CheckpointInfo | None:
    """The complete checkpoint of the highest step."""
    return max((info for info in infos if info.state == "complete"), key=lambda info: info.step, default=None)


def inspect(slot: Slot, checksums: bool = False) -> CheckpointInfo | None:
    """What one name in the folder is; None when it went away meanwhile."""
    try:
        size = sum(file.lstat().st_size for file in slot.path.iterdir())
    except NotADirectoryError:
        return CheckpointInfo(slot.step, slot.path, None, 0, "damaged", "it is not a folder")
    except FileNotFoundError:
        return None
    if slot.suffix:
        return CheckpointInfo(slot.step, slot.path, None, size, "unfinished", _LEFT_BY[slot.suffix])
    try:
        manifest = read_manifest(slot.path)
    except CheckpointError as error:
        return CheckpointInfo(slot.step, slot.path, None, size, "damaged", str(error))
    wrong = damage(slot.path, manifest, slice(None), checksums) + unlisted(slot.path, manifest)
    if manifest.step != slot.step:
        wrong.insert(0, f"its manifest is of step {manifest.step}")
    state: State = "damaged" if wrong else "complete"
    return CheckpointInfo(slot.step, slot.path, manifest.mesh, size, state, "; ".join(wrong), manifest.saved)


def prune(folder: Folder, keep: int, current: int) -> None:
    """Remove complete checkpoints but the `keep` newest up to the `current` step, and damaged ones older than those.

    Later steps, which a run that went back to an older checkpoint has beside it, are left alone. A checkpoint that
    cannot be removed is a warning: the save itself has succeeded.
    """
    slots = {slot.path: slot for slot in folder.slots()}
    infos = list_checkpoints(folder)
    complete = sorted(info.step for info in infos if info.state == "complete" and info.step <= current)
    oldest = min([current, *complete[-keep:]])  # `current` is kept even when it looks damaged: it was just written
    for info in infos:
        if info.state != "unfinished" and info.step < oldest:
            try:
                folder.remove(slots[info.path])
            except OSError as error:
                warnings.warn(f"cannot remove the old checkpoint {info.path}: {error}", stacklevel=2)


def replace_folder(written: Path, final: Path, previous: Path) -> None:
    """Give a complete folder its name, in place of a folder that has it. Its files are on the disk already.

    No single rename replaces a folder: the one that is there moves to `previous` first, and is complete under that name
    for whoever is killed between the two renames.
    """
    flush(written)  # the names of its files, before the folder gets its own
    if final.exists():
        remove(previous)
        os.rename(final, previous)
    try:
        os.rename(written, final)
    except OSError:
        if previous.exists():
            os.rename(previous, final)
        raise
    flush(final.parent)  # the new name is on the disk before the previous folder goes
    remove(previous)


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


def format_bytes(count: int) -> str:
    """A number of bytes for people: `1.5 GiB`."""
    size, units = float(count), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{size:.1f} {units[0]}"
