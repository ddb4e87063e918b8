"""Checkpoints of a training run: saved on one mesh, loaded on any other.

torch.distributed.checkpoint (DCP) coordinates the ranks: it drops replicas, and intersects what is stored with what a
rank needs. What is read and written is ours: regions of tensors as safetensors and everything else as JSON, so that
nothing in a checkpoint is executed.

[Note: one error on all ranks]
Every step of a save or load that can fail on one rank alone runs in `Ranks.together`, or inside DCP, which gathers
failures as well: all ranks raise, and none waits in a collective that another never enters. Steps: storage.py.
A background save uses a group of its own: its collectives must not interleave with the training loop's.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

import colrow
from colrow.checkpoint.folder import CheckpointInfo, Folder, list_checkpoints, newest_complete, prune
from colrow.checkpoint.loading import (
    examine,
    read_texts,
    require_same_model,
    require_same_optimized,
    require_same_vocabulary,
    signature,
    targets_of,
)
from colrow.checkpoint.manifest import JSON, Manifest, as_json
from colrow.checkpoint.optimizer_state import optimized_names, optimizer_record, optimizer_tensors
from colrow.checkpoint.pieces import Staging
from colrow.checkpoint.planner import PieceLoadPlanner, PieceSavePlanner
from colrow.checkpoint.ranks import Ranks, as_text, is_user_error, raise_of_ranks
from colrow.checkpoint.state import Model, NamedTensor, Snapshot, buffer_digests, model_tensors, require_equal_buffers
from colrow.checkpoint.storage import CheckpointReader, CheckpointWriter
from colrow.errors import CheckpointError
from colrow.mesh import AXES, Mesh


class Checkpoints:
    """The checkpoints in one folder.

    Args:
        folder: holds `step-N/` for each checkpoint. All ranks see the same folder.
        keep: how many of the newest complete checkpoints stay.
        group: the ranks that save and load together, as a gloo group; all of them unless given.
        asynchronous: `save` returns when the state is copied to host memory; a thread writes it. Nothing else may use
            `group` meanwhile; unless given, one is made for the thread alone.
        mesh: recorded with each checkpoint; taken from the parameters' DTensors unless given.
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
            CheckpointError: on every rank, when any of them cannot write (a full disk), when a buffer is not the same
                on all ranks, or when `extra` is not JSON; the previous checkpoints stay. Where `asynchronous`, also
                when the previous save failed: then nothing is saved now. What a background save raises comes at the
                next `save` or `wait`: call `wait` before the process ends.
        """
        ranks = self._open()
        ranks.together(self.wait)
        # Not on the background thread: it may redistribute optimizer state, over the training's own groups.
        snapshot = ranks.together(lambda: self._capture(ranks, step, model, optimizer, extra))
        require_equal_buffers(ranks.gather(snapshot.buffers))
        if not self.asynchronous:
            self._write(ranks, snapshot)
            return
        # daemon: a process that ends by an error is not kept by a slow disk; what it writes has no name yet
        self._thread = threading.Thread(
            target=self._write_behind, args=(ranks, snapshot), name="checkpoint", daemon=True
        )
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
        """The newest complete checkpoint. Ranks that must agree call it on one rank and broadcast the step."""
        return newest_complete(self.list())

    def load(
        self,
        info_or_step: CheckpointInfo | int,
        model: Model,
        optimizer: Optimizer | None = None,
        *,
        keep_options: bool = False,
    ) -> dict[str, JSON]:
        """Load a checkpoint into a model, and into an optimizer if given, in place. Collective. Returns `extra`.

        Args:
            keep_options: the optimizer keeps its own hyperparameters and parameter groups, and gets the state alone;
                else it gets the hyperparameters (lr, betas, weight decay) of the one that was saved.

        All files are read and compared with their checksums before anything is changed; the ranks share this work.

        Raises:
            CheckpointError: on every rank; the text says what is missing, damaged, or of another model, and which
                checkpoint is the newest complete one.
        """
        ranks = self._open()
        ranks.together(self.wait)  # a background save may hold the group, and may be writing this very checkpoint
        path = ranks.together(lambda: self._path(info_or_step))
        manifest = self._require_intact(ranks, path)
        require_same_vocabulary(path, manifest, self.vocabulary)
        named = ranks.together(lambda: model_tensors(model, self.tied))
        require_same_model(path, manifest, ranks.gather(signature(named)))
        index, record, extra = ranks.together(lambda: read_texts(path, manifest, optimizer))
        if optimizer is not None and record is not None:
            names = ranks.together(lambda: optimized_names(optimizer, named))
            require_same_optimized(path, record, ranks.gather(names))
        pieces = ranks.together(lambda: targets_of(named, index, optimizer, record, keep_options))
        with _quiet():
            try:
                reader = CheckpointReader(path, index)
                load({}, storage_reader=reader, planner=PieceLoadPlanner(pieces), process_group=ranks.group)
            except CheckpointException as failure:
                _raise_of(failure, ranks.size)
        return extra

    def _open(self) -> Ranks:
        if self._ranks is None:
            self._ranks = Ranks.open(self._group, private=self.asynchronous)
        return self._ranks

    def _capture(
        self, ranks: Ranks, step: int, model: Model, optimizer: Optimizer | None, extra: dict[str, JSON]
    ) -> Snapshot:
        if step < 0:
            raise CheckpointError(f"step {step} is negative")
        text = as_json(extra)
        named = model_tensors(model, self.tied)
        # Metadata alone until `copy`: what fails in here fails before memory is taken, or a file is written.
        stored = named if optimizer is None else named + optimizer_tensors(optimizer, named)
        pieces = [piece for item in stored for piece in item.pieces()]
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
        return Snapshot(
            pieces=self._staging.copy(pieces) if self.asynchronous else pieces,
            optimizer=None if optimizer is None else optimizer_record(optimizer, named),
            manifest=manifest,
            extra=text,
            buffers=buffer_digests(named),
        )

    def _write(self, ranks: Ranks, snapshot: Snapshot) -> None:
        step = snapshot.manifest.step
        with _quiet():
            try:
                save(
                    {},
                    storage_writer=CheckpointWriter(self._folder, snapshot.manifest, snapshot.extra),
                    planner=PieceSavePlanner(snapshot.pieces, snapshot.optimizer),
                    process_group=ranks.group,
                )
            except CheckpointException as failure:
                if ranks.first:
                    self._folder.discard(step)
                _raise_of(failure, ranks.size)
        if ranks.first:
            prune(self._folder, self.keep, step)

    def _write_behind(self, ranks: Ranks, snapshot: Snapshot) -> None:
        try:
            self._write(ranks, snapshot)
        except BaseException as error:  # on a thread of its own nobody would see it: the next save or wait raises it
            self._failure = error

    def _path(self, info_or_step: CheckpointInfo | int) -> Path:
        if isinstance(info_or_step, CheckpointInfo):
            return info_or_step.path
        slots = {slot.step: slot.path for slot in self._folder.slots() if not slot.suffix}
        if info_or_step not in slots:
            there = f"there are {', '.join(map(str, slots))}" if slots else "there is none"
            raise CheckpointError(f"no checkpoint of step {info_or_step} in {self.folder}: {there}")
        return slots[info_or_step]

    def _require_intact(self, ranks: Ranks, path: Path) -> Manifest:
        # Each file is read and checked by one rank alone.
        manifest, mine = ranks.together(lambda: examine(path, slice(ranks.rank, None, ranks.size)))
        wrong = list(dict.fromkeys(line for lines in ranks.gather(mine) for line in lines))
        if wrong or manifest is None:
            other = newest_complete([info for info in self.list() if info.path != path])
            offer = (
                "there is no other complete one"
                if other is None
                else f"the newest complete one is {other.path}: move the damaged one away to continue from it"
            )
            raise CheckpointError(f"checkpoint {path} cannot be loaded: {'; '.join(wrong[:8])}; {offer}")
        return manifest


def _mesh_of(named: list[NamedTensor], ranks: int) -> Mesh | None:
    """The mesh of the parameters, if it has all of the ranks."""
    degrees: dict[str, int] = {}
    for item in named:
        if isinstance(item.tensor, DTensor):
            device_mesh = item.tensor.device_mesh
            degrees.update(zip(device_mesh.mesh_dim_names or (), device_mesh.shape, strict=False))
    mesh = Mesh.model_validate({axis: n for axis, n in degrees.items() if axis in AXES})
    return mesh if mesh.world_size == ranks else None


def _raise_of(failure: CheckpointException, size: int) -> NoReturn:
    """Raise what DCP found on some of the ranks, as a user's error or as a bug."""
    errors = {rank: error for rank, (error, _) in failure.failures.items()}
    for error in errors.values():
        if not isinstance(error, Exception):  # an interrupt, which DCP catches too
            raise error
    raise_of_ranks({rank: (as_text(error), is_user_error(error)) for rank, error in errors.items()}, size, failure)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence DCP's warning that torch.distributed is not initialized: one process may save alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
