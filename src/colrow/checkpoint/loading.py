"""What is read and checked before a checkpoint's tensors are: its files, its JSON, whether it is of the model at hand
(names, global shapes, dtypes, on all ranks together), and where the tensors will go."""

from __future__ import annotations

from collections.abc import Sequence
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
    TensorRecord,
    damage,
    read_json,
    read_manifest,
    read_record,
    unlisted,
)
from colrow.checkpoint.optimizer_state import (
    make_optimizer_state,
    optimizer_tensors,
    restore_options,
    restore_values,
)
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.state import NamedTensor
from colrow.errors import CheckpointError

_SHOWN = 4  # items of a list in a message
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # tensors with one row a token


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
    """The index, the optimizer's record where `optimizer` is given, and the training loop's own JSON.

    Raises:
        CheckpointError: one of them is not what it should be, or holds no state for this class of optimizer.
    """
    index = read_record(path / INDEX, Index)
    # The checksums were right: what is wrong now was written so, or put together from two checkpoints.
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
    if record.kind != type(optimizer).__name__:
        raise CheckpointError(
            f"the checkpoint holds the state of {record.kind}, this run's optimizer is {type(optimizer).__name__}: "
            f"use {record.kind}, or load the model alone"
        )
    return index, record, extra


@torch.no_grad()
def targets_of(
    named: list[NamedTensor],
    index: Index,
    optimizer: Optimizer | None,
    record: OptimizerRecord | None,
    keep_options: bool = False,
) -> list[Piece]:
    """The pieces to fill, in place. The optimizer gets tensors to be filled, and the record's hyperparameters unless it
    keeps its own."""
    stored = list(named)
    if optimizer is not None and record is not None:
        make_optimizer_state(optimizer, named, index)
        if not keep_options:
            restore_options(optimizer, named, record)
        restore_values(optimizer, named, record)
        stored += optimizer_tensors(optimizer, named)
    return [piece for item in stored for piece in item.pieces()]


def signature(named: list[NamedTensor]) -> dict[str, TensorRecord]:
    """Global shapes and dtypes by name, as a manifest states them."""
    return {
        item.name: TensorRecord(shape=list(item.tensor.shape), dtype=str(item.tensor.dtype).removeprefix("torch."))
        for item in named
    }


def require_same_model(path: Path, manifest: Manifest, signatures: Sequence[dict[str, TensorRecord]]) -> None:
    """Compare the tensors of all ranks with the checkpoint's.

    Raises:
        CheckpointError: it is of another model; the first names and shapes that differ are in the text.
    """
    there = manifest.model
    here = [item for of_rank in signatures for item in of_rank.items()]  # ranks may differ from each other too
    names = {name for name, _ in here}
    differing = {name: record for name, record in here if name in there and record != there[name]}
    only_here = {name: record for name, record in here if name not in there}
    differences = _listed(
        {
            "differing": [f"{name} {there[name]} there, {record} here" for name, record in differing.items()],
            "only in the checkpoint": [f"{name} {there[name]}" for name in there if name not in names],
            "only in the model": [f"{name} {record}" for name, record in only_here.items()],
        }
    )
    if differences:
        raise CheckpointError(
            f"{path} is of another model: {_hint(manifest, differing)}{differences}: use the model that it was saved "
            "from, or a new folder"
        )


def require_same_vocabulary(path: Path, manifest: Manifest, vocabulary: str | None, fix: str | None = None) -> None:
    """Raise a CheckpointError when the checkpoint names another vocabulary than the one at hand."""
    if manifest.vocabulary is not None and vocabulary is not None and manifest.vocabulary != vocabulary:
        raise CheckpointError(
            f"{path} is of a model with another vocabulary: {manifest.vocabulary} there, {vocabulary} here: "
            f"{fix or 'use the tokenizer that the checkpoint was trained with'}"
        )


def require_same_optimized(path: Path, record: OptimizerRecord, gathered: Sequence[Sequence[str]]) -> None:
    """Raise a CheckpointError unless the ranks' optimizers change the same parameters as the one that was saved."""
    here = {name for names in gathered for name in names}
    there = {name for group in record.groups for name in group.names}
    if differences := _listed({"only there": sorted(there - here), "only here": sorted(here - there)}):
        raise CheckpointError(
            f"{path} holds the state of an optimizer of other parameters: {differences}: give the optimizer the "
            "parameters that it had, or load the model alone"
        )


def _hint(manifest: Manifest, differing: dict[str, TensorRecord]) -> str:
    """The likely cause, where all differences have one."""
    if not differing:
        return ""
    if all(record.shape == manifest.model[name].shape for name, record in differing.items()):
        return "its dtypes differ; "
    vocabulary = [name for name in differing if name.endswith(_VOCABULARY)]
    if len(vocabulary) == len(differing):
        name = vocabulary[0]
        return f"its vocabulary has {manifest.model[name].shape[0]} tokens, this one {differing[name].shape[0]}; "
    return ""


def first_few(items: Sequence[str]) -> str:
    """The first items, and how many more there are."""
    return ", ".join(items[:_SHOWN]) + (f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _listed(lists: dict[str, list[str]]) -> str:
    return "; ".join(f"{what}: {first_few(items)}" for what, items in lists.items() if items)
