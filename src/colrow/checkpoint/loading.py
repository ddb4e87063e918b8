"""What is read and checked before a checkpoint's tensors are: its files, its JSON, and where the tensors will go."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.optim import Optimizer

from colrow.checkpoint.manifest import (
    EXTRA,
    INDEX,
    JSON,
    OPTIMIZER,
    Index,
    Manifest,
    OptimizerRecord,
    damage,
    read_json,
    read_manifest,
    read_record,
    unlisted,
)
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.state import Named, make_optimizer_state, optimizer_tensors, require_same_kind, restore_record
from colrow.errors import CheckpointError


def examine(path: Path, share: slice) -> tuple[Manifest | None, list[str]]:
    """The manifest of a checkpoint, and what is wrong with it and with this rank's `share` of its files."""
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return None, [str(error)]
    return manifest, damage(path, manifest, share, checksums=True) + unlisted(path, manifest)


def read_texts(
    path: Path, manifest: Manifest, optimizer: Optimizer | None
) -> tuple[Index, OptimizerRecord | None, dict[str, JSON]]:
    """The index, what `optimizer` had beside tensors, and the training loop's own.

    Raises:
        CheckpointError: one of them is not what it should be, or holds no state for this kind of optimizer.
    """
    index = read_record(path / INDEX, Index)
    index.require_sound(path, {file.name for file in manifest.files})
    for name, tensor in manifest.model.items():
        stored = index.tensors.get(name)
        if stored is None or stored.shape != tensor.shape or stored.dtype != tensor.dtype:
            raise CheckpointError(f"{path / INDEX} and the manifest differ on {name}: the checkpoint is damaged")
    extra = read_json(path / EXTRA)
    if not isinstance(extra, dict):
        raise CheckpointError(f"{path / EXTRA} holds no mapping: the checkpoint is damaged")
    if optimizer is None:
        return index, None, extra
    if manifest.optimizer is None:
        raise CheckpointError(f"{path} holds no optimizer state: load the model alone")
    record = read_record(path / OPTIMIZER, OptimizerRecord)
    require_same_kind(optimizer, record)
    return index, record, extra


@torch.no_grad()
def targets_of(
    named: list[Named], index: Index, optimizer: Optimizer | None, record: OptimizerRecord | None
) -> list[Piece]:
    """What is to be filled, in place. The optimizer gets its hyperparameters, and tensors to be filled."""
    stored = list(named)
    if optimizer is not None and record is not None:
        make_optimizer_state(optimizer, named, index)
        restore_record(optimizer, named, record)
        stored += optimizer_tensors(optimizer, named)
    return [piece for one in stored for piece in one.pieces()]
