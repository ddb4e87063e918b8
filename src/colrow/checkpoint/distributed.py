"""Checkpoints of a training run: saved on one mesh, loaded on any other.

torch.distributed.checkpoint coordinates the ranks, drops what several of them hold, and cuts what is stored into what
a rank needs. What it reads and writes is ours: blocks of tensors as safetensors and everything else as JSON, so that
nothing in a checkpoint is executed.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import colrow
from colrow.checkpoint.folder import CheckpointInfo, Folder, list_checkpoints, newest_whole, prune
from colrow.checkpoint.loading import (
    compare,
    examine,
    read_texts,
    require_same_model,
    require_same_optimized,
    require_same_vocabulary,
    targets_of,
)
from colrow.checkpoint.manifest import JSON, Manifest, as_json
from colrow.checkpoint.pieces import Piece, Staging
from colrow.checkpoint.planner import PieceLoadPlanner, PieceSavePlanner, RankNotes, as_state
from colrow.checkpoint.ranks import Ranks, as_text, is_users, raise_told
from colrow.checkpoint.state import Named, model_tensors, optimized_names, optimizer_record, optimizer_tensors
from colrow.checkpoint.storage import CheckpointReader, CheckpointWriter, Told
from colrow.errors import CheckpointError
from colrow.mesh import AXES, Mesh

Model = nn.Module | Sequence[nn.Module]


@dataclass(frozen=True)
class _Job:
    """One save, with everything that training may change already copied or written first."""

    pieces: list[Piece]
    notes: RankNotes
    told: Told


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: holds `step-N/` for each checkpoint. All ranks see the same folder.
        keep: how many newest whole checkpoints stay.
        group: the ranks that save and load together, as a gloo group; all of them unless given.
        asynchronous: `save` returns when the state is copied to host memory; a thread writes it. Nothing else may use
            `group` meanwhile; unless given, one is made for the thread alone.
        mesh: recorded with each checkpoint; taken from the parameters unless given, where they tell it.
        vocabulary: names the tokenizer's vocabulary (a hash, say). A checkpoint of another one is refused.
        tied: parameters that are copies of another, by the name under which both are stored: an output embedding on
            the last pipeline stage is `{"lm_head.weight": "embed_tokens.weight"}`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        group: dist.ProcessGroup | None = None,
        asynchronous: bool = False,
        mesh: Mesh | None = None,
        vocabulary: str | None = None,
        tied: Mapping[str, str] | None = None,
    ):
        if keep < 1:
            raise CheckpointError(f"keep={keep} would keep no checkpoint: use 1 or more")
        self.folder = Path(folder)
        self.keep = keep
        self.asynchronous = asynchronous
        self.mesh = mesh
        self.vocabulary = vocabulary
        self.tied = dict(tied or {})
        self._folder = Folder(self.folder)
        self._group = group
        self._ranks: Ranks | None = None
        self._staging = Staging()
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, step: int, model: Model, optimizer: Optimizer | None, extra: dict[str, JSON]) -> None:
        """Write the checkpoint of `step`, and remove those that are older than the `keep` newest. Collective.

        `model` is a module, or the pipeline stages of this rank. `extra` is JSON; the first rank's is stored.

        Raises:
            CheckpointError: on every rank, when any of them cannot write (a full disk), or when `extra` is not JSON;
                the former checkpoints stay. Where `asynchronous`, also when the former save failed: then nothing
                is saved now. What a background save raises comes at the next `save` or `wait`: call `wait` before
                the process ends.
        """
        ranks = self._open()
        ranks.together(self.wait)
        job = ranks.together(lambda: self._capture(ranks, step, model, optimizer, extra))
        if not self.asynchronous:
            self._write(ranks, job)
            return
        self._thread = threading.Thread(target=self._write_behind, args=(ranks, job), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is running. Raises what a background save raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def list(self, checksums: bool = False) -> list[CheckpointInfo]:
        """Every checkpoint and leftover in the folder, oldest step first; not collective.

        Damage shows as missing files and wrong sizes; `checksums` reads the files as well.
        """
        return list_checkpoints(self._folder, checksums)

    def latest(self) -> CheckpointInfo | None:
        """The newest whole checkpoint. Ranks that must agree ask on one rank and pass the step on."""
        return newest_whole(self.list())

    def load(
        self, info_or_step: CheckpointInfo | int, model: Model, optimizer: Optimizer | None = None
    ) -> dict[str, JSON]:
        """Load a checkpoint into a model, and into an optimizer if given, in place. Collective. Returns `extra`.

        All files are read and compared with their checksums before anything is changed; the ranks share this work.

        Raises:
            CheckpointError: on every rank; the text says what is missing, damaged, or of another model, and which
                checkpoint is the newest whole one.
        """
        ranks = self._open()
        ranks.together(self.wait)
        path = ranks.together(lambda: self._path(info_or_step))
        manifest = self._undamaged(ranks, path)
        require_same_vocabulary(path, manifest, self.vocabulary)
        named = ranks.together(lambda: model_tensors(model, self.tied))
        require_same_model(path, manifest, ranks.gather(compare(manifest, named)))
        index, record, extra = ranks.together(lambda: read_texts(path, manifest, optimizer))
        if optimizer is not None and record is not None:
            names = ranks.together(lambda: optimized_names(optimizer, named))
            require_same_optimized(path, record, ranks.gather(names))
        pieces = ranks.together(lambda: targets_of(named, index, optimizer, record))
        with _quiet():
            try:
                reader = CheckpointReader(path, index)
                load(as_state(pieces), storage_reader=reader, planner=PieceLoadPlanner(), process_group=ranks.group)
            except CheckpointException as failure:
                _raise_of(failure, ranks.size)
        return extra

    def _open(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks.open(self._group, private=self.asynchronous)
        return self._ranks

    def _capture(
        self, ranks: Ranks, step: int, model: Model, optimizer: Optimizer | None, extra: dict[str, JSON]
    ) -> _Job:
        if step < 0:
            raise CheckpointError(f"step {step} is negative")
        text = as_json(extra)
        named = model_tensors(model, self.tied)
        stored = named if optimizer is None else named + optimizer_tensors(optimizer, named)
        pieces = [piece for one in stored for piece in one.pieces()]
        manifest = Manifest(
            step=step,
            saved=datetime.now(UTC).isoformat(timespec="seconds"),
            mesh=self.mesh or _mesh_of(named, ranks.size),
            ranks=ranks.size,
            colrow=colrow.__version__,
            torch=str(torch.__version__),
            vocabulary=self.vocabulary,
            optimizer=None,
            model={},
            files=[],
        )
        return _Job(
            pieces=self._staging.copy(pieces) if self.asynchronous else pieces,
            notes=RankNotes(None if optimizer is None else optimizer_record(optimizer, named)),
            told=Told(manifest, text),
        )

    def _write(self, ranks: Ranks, job: _Job) -> None:
        step = job.told.manifest.step
        with _quiet():
            try:
                save(
                    as_state(job.pieces),
                    storage_writer=CheckpointWriter(self._folder, job.told),
                    planner=PieceSavePlanner(job.notes),
                    process_group=ranks.group,
                )
            except CheckpointException as failure:
                if ranks.first:
                    self._folder.discard(step)
                _raise_of(failure, ranks.size)
        if ranks.first:
            prune(self._folder, self.keep, step)

    def _write_behind(self, ranks: Ranks, job: _Job) -> None:
        try:
            self._write(ranks, job)
        except BaseException as error:
            self._failure = error

    def _path(self, info_or_step: CheckpointInfo | int) -> Path:
        if isinstance(info_or_step, CheckpointInfo):
            return info_or_step.path
        slots = {slot.step: slot.path for slot in self._folder.slots() if not slot.suffix}
        if info_or_step not in slots:
            there = f"there are {', '.join(map(str, slots))}" if slots else "there is none"
            raise CheckpointError(f"no checkpoint of step {info_or_step} in {self.folder}: {there}")
        return slots[info_or_step]

    def _undamaged(self, ranks: Ranks, path: Path) -> Manifest:
        manifest, mine = ranks.together(lambda: examine(path, slice(ranks.rank, None, ranks.size)))
        wrong = list(dict.fromkeys(line for lines in ranks.gather(mine) for line in lines))
        if wrong or manifest is None:
            other = newest_whole([info for info in self.list() if info.path != path])
            offer = (
                "there is no other whole one"
                if other is None
                else f"the newest whole one is {other.path}: move the damaged one away to continue from it"
            )
            raise CheckpointError(f"checkpoint {path} cannot be loaded: {'; '.join(wrong[:8])}; {offer}")
        return manifest


def _mesh_of(named: list[Named], ranks: int) -> Mesh | None:
    """The mesh that the parameters tell of, if it is all of the ranks."""
    degrees: dict[str, int] = {}
    for one in named:
        if isinstance(one.tensor, DTensor):
            mesh = one.tensor.device_mesh
            degrees.update(zip(mesh.mesh_dim_names or (), mesh.shape, strict=False))
    told = Mesh(**{axis: n for axis, n in degrees.items() if axis in AXES})
    return told if told.world_size == ranks else None


def _raise_of(failure: CheckpointException, size: int) -> NoReturn:
    """Say as a user's error, or as a bug, what torch.distributed.checkpoint found on some of the ranks."""
    errors = {rank: error for rank, (error, _) in failure.failures.items()}
    for error in errors.values():
        if not isinstance(error, Exception):  # an interrupt, which DCP catches too
            raise error
    raise_told({rank: (as_text(error), is_users(error)) for rank, error in errors.items()}, size, failure)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that one process is alone: that is as it should be."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
