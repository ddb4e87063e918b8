"""Space on the disk: what a run's checkpoints and export will take, and what to say when a disk is full."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from colrow.checkpoint.folder import Folder, format_bytes, list_checkpoints
from colrow.checkpoint.state import model_tensors
from colrow.errors import CheckpointError

T = TypeVar("T")

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_JSON_BYTES = 2048
"""Index, records and headers of a tensor and its moments take about 1 KiB; this is more than enough."""


def checkpoint_bytes(model: nn.Module) -> int:
    """What a checkpoint of the model takes with AdamW's state: two moments of each trained parameter, and a count."""
    total = 1 << 16
    for item in model_tensors(model):
        moments = 2 * item.tensor.nbytes + 4 if item.tensor.requires_grad else 0
        total += item.tensor.nbytes + moments + _JSON_BYTES
    return total


def export_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """What an export of the model in `dtype` takes."""
    sizes = [
        item.tensor.numel() * (dtype if item.tensor.is_floating_point() else item.tensor.dtype).itemsize
        for item in model_tensors(model)
    ]
    return sum(sizes) + (1 << 20)


@dataclass(frozen=True)
class RunSpace:
    """What a run will write into its folder, in bytes.

    Args:
        checkpoints: how many there are at most at a time, the one that is being written included.
        present: how many of them are there already.
        export: 0 where none is written.
    """

    checkpoint: int
    checkpoints: int
    present: int
    export: int

    @property
    def needed(self) -> int:
        return max(0, self.checkpoints - self.present) * self.checkpoint + self.export

    def __str__(self) -> str:
        several = "checkpoint" if self.checkpoints == 1 else "checkpoints"
        parts = [f"{self.checkpoints} {several} of {format_bytes(self.checkpoint)}"]
        if self.present:
            parts[0] += f" ({min(self.present, self.checkpoints)} there)"
        if self.export:
            parts.append(f"an export of {format_bytes(self.export)}")
        return " and ".join(parts)

    def require_free(self, folder: Path) -> str:
        """A line that says what is needed and what is free.

        Raises:
            CheckpointError: less is free than the run will write.
        """
        free = free_in(folder)
        if free < self.needed:
            raise CheckpointError(
                f"the disk of {folder} is too small for this run: {self} need {format_bytes(self.needed)}, and "
                f"{format_bytes(free)} are free: free {format_bytes(self.needed - free)}, or set "
                f"{''.join(f'{fix}, or ' for fix in self._that_fit(free))}run.dir to another disk"
            )
        return f"{self}: {format_bytes(self.needed)} of {format_bytes(free)} free"

    def _that_fit(self, free: int) -> Iterator[str]:
        """What a config can set so that no more than `free` is needed."""
        most = 1
        for export in dict.fromkeys((self.export, 0)):
            fits = (replace(self, checkpoints=n, export=export) for n in range(self.checkpoints, most, -1))
            found = next((space for space in fits if space.needed <= free), None)
            if found is not None:
                most = found.checkpoints
                keep = ["checkpoint.keep to " + str(most - 1)] * (most < self.checkpoints)
                yield " and ".join(keep + ["checkpoint.export to false"] * (export < self.export))


_UNKNOWN = 1 << 62


def free_in(folder: Path) -> int:
    """Free bytes of the disk on which the folder is or will be; without a bound where there is no disk or it says none,
    as below /proc: writing will say what is wrong."""
    folder = folder.absolute()
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return _UNKNOWN
    return usage.free if usage.free or usage.total else _UNKNOWN


RESUME = "start the same command again: the run continues from its newest checkpoint"


@dataclass(frozen=True)
class DiskUse:
    """What is about to be written.

    Args:
        what: `a checkpoint`, for messages.
        needed: bytes.
        checkpoints: the run's folder of them: those that a continued run does not need are named on a full disk.
        then: what to do when there is space again.
    """

    what: str
    root: Path
    needed: int
    checkpoints: Path
    then: str

    def require_free(self) -> None:
        """Raise `too_full` where less is free than is needed."""
        if free_in(self.root) < self.needed:
            raise self.too_full()

    def too_full(self, reason: str = "") -> CheckpointError:
        """The error for a full disk; `reason` is what the operating system says."""
        return CheckpointError(
            f"the disk is too full for {self.what} in {self.root}: it needs {format_bytes(self.needed)} ({self.needed} "
            f"bytes), {format_bytes(free_in(self.root))} are free{f' ({reason})' if reason else ''}; "
            f"{_what_to_free(self.checkpoints)}, then {self.then}"
        )

    def naming_a_full_one(self, work: Callable[[], T]) -> T:
        """`work()`; an OSError that says that the disk is full becomes `too_full`."""
        with _full_disk_as(lambda error: self.too_full(error.strerror or "")):
            return work()


@contextmanager
def naming_a_full_disk(run: Path) -> Iterator[None]:
    """Within, a file of a run's that finds the disk full is a CheckpointError that says what could go."""

    def too_full(error: OSError) -> CheckpointError:
        free, file = _what_to_free(run / "checkpoints"), error.filename or f"a file of {run}"
        return CheckpointError(f"{file}: {error.strerror}; {free}, then {RESUME}")

    with _full_disk_as(too_full):
        yield


@contextmanager
def _full_disk_as(refusal: Callable[[OSError], CheckpointError]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise refusal(error) from error


def _what_to_free(checkpoints: Path) -> str:
    """Which checkpoint is kept, and which of the others a continued run does not need."""
    complete = [info for info in list_checkpoints(Folder(checkpoints)) if info.state == "complete"]
    if not complete:
        return "free some space"
    *older, newest = complete
    kept = f"step-{newest.step} is complete and kept: free some space"
    named = ", ".join(f"{info.path.name} ({format_bytes(info.bytes)})" for info in older[:4])
    # a lower `keep` alone frees nothing: a save removes older ones when it is complete
    again = "(with checkpoint.keep lower, else the disk fills again)"
    return f"{kept}, such as the older {named} {again}" if older else kept
