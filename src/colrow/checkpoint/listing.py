"""What checkpoints a folder holds and in what state, and which of them stay."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from colrow.checkpoint.folder import Folder, Slot
from colrow.checkpoint.manifest import damage, read_manifest, unlisted
from colrow.errors import CheckpointError
from colrow.mesh import Mesh

State = Literal["whole", "unfinished", "damaged"]

_LEFT_BY = {
    "unfinished": "its save was killed, or is still running",
    "former": "replaced by a newer save of the same step",
    "removed": "its removal was killed, or is still running",
}


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
    """Why it is not whole."""
    saved: str = ""
    """When: UTC, ISO 8601."""


def list_checkpoints(folder: Folder, checksums: bool = False) -> list[CheckpointInfo]:
    """Everything in the folder that is or was a checkpoint, oldest step first. Not collective.

    Whole means that all files are there in the right size; `checksums` reads them too, which takes as long as
    reading the checkpoints does.
    """
    found = (inspect(slot, checksums) for slot in folder.slots())
    return [info for info in found if info is not None]


def newest_whole(infos: list[CheckpointInfo]) -> CheckpointInfo | None:
    """The whole checkpoint of the highest step."""
    return max((info for info in infos if info.state == "whole"), key=lambda info: info.step, default=None)


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
    state: State = "damaged" if wrong else "whole"
    return CheckpointInfo(slot.step, slot.path, manifest.mesh, size, state, "; ".join(wrong), manifest.saved)


def prune(folder: Folder, keep: int, current: int) -> None:
    """Remove whole checkpoints but the `keep` newest ones up to the `current` step, and damaged ones older than those.

    Later steps, which a run that went back to an older checkpoint has beside it, are left alone. A checkpoint that
    cannot be removed is a warning: the save itself has succeeded.
    """
    slots = {slot.path: slot for slot in folder.slots()}
    infos = list_checkpoints(folder)
    whole = sorted(info.step for info in infos if info.state == "whole" and info.step <= current)
    oldest = min([current, *whole[-keep:]])
    for info in infos:
        if info.state != "unfinished" and info.step < oldest:
            try:
                folder.remove(slots[info.path])
            except OSError as error:
                warnings.warn(f"cannot remove the old checkpoint {info.path}: {error}", stacklevel=2)
