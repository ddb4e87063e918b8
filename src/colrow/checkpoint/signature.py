"""Whether a checkpoint is of the model at hand: names, global shapes, dtypes, on all ranks together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colrow.checkpoint.manifest import Manifest, OptimizerRecord, TensorRecord
from colrow.checkpoint.state import Named
from colrow.errors import CheckpointError

_SHOWN = 4  # names of each kind in a message
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight", "lm_head.bias")  # tensors with one row a token


@dataclass(frozen=True)
class Comparison:
    """One rank's tensors against the manifest's."""

    absent: dict[str, TensorRecord]
    """In the model, not in the checkpoint."""
    differing: dict[str, TensorRecord]
    """In both, with another shape or dtype: the model's."""
    covered: list[int]
    """Which of the manifest's tensors, by place, this rank has."""


def compare(manifest: Manifest, named: list[Named]) -> Comparison:
    """What this rank's part of the model has in common with the checkpoint."""
    places = {name: place for place, name in enumerate(manifest.model)}
    here = {one.name: record_of(one) for one in named}
    return Comparison(
        absent={name: record for name, record in here.items() if name not in places},
        differing={name: r for name, r in here.items() if name in places and r != manifest.model[name]},
        covered=[places[name] for name in here if name in places],
    )


def record_of(named: Named) -> TensorRecord:
    """A tensor's global shape and dtype as a manifest states them."""
    return TensorRecord(shape=list(named.tensor.shape), dtype=str(named.tensor.dtype).removeprefix("torch."))


def require_same_model(path: Path, manifest: Manifest, comparisons: Sequence[Comparison]) -> None:
    """Compare all ranks' parts with the checkpoint.

    Raises:
        CheckpointError: it is of another model; the first names and shapes that differ are in the text.
    """
    covered = {place for comparison in comparisons for place in comparison.covered}
    only_stored = [name for place, name in enumerate(manifest.model) if place not in covered]
    only_here = _joined([comparison.absent for comparison in comparisons])
    differing = _joined([comparison.differing for comparison in comparisons])
    if not (only_stored or only_here or differing):
        return
    said = []
    if differing:
        pairs = [f"{name} {manifest.model[name]} there, {record} here" for name, record in differing.items()]
        said.append(_first("differing", pairs))
    if only_stored:
        said.append(_first("only in the checkpoint", [f"{name} {manifest.model[name]}" for name in only_stored]))
    if only_here:
        said.append(_first("only in the model", [f"{name} {record}" for name, record in only_here.items()]))
    raise CheckpointError(f"{path} is of another model: {_hint(manifest, differing)}{'; '.join(said)}")


def require_same_vocabulary(path: Path, manifest: Manifest, vocabulary: str | None) -> None:
    """Raise a CheckpointError when the checkpoint names another vocabulary than the one at hand."""
    if manifest.vocabulary is not None and vocabulary is not None and manifest.vocabulary != vocabulary:
        raise CheckpointError(
            f"{path} is of a model with another vocabulary: {manifest.vocabulary} there, {vocabulary} here: "
            "use the tokenizer that the checkpoint was trained with"
        )


def require_same_optimized(path: Path, record: OptimizerRecord, gathered: Sequence[Sequence[str]]) -> None:
    """Raise a CheckpointError unless the ranks' optimizers change the same parameters as the one that was saved."""
    here = {name for names in gathered for name in names}
    there = {name for group in record.groups for name in group.names}
    if here == there:
        return
    said = [
        _first(what, sorted(names))
        for what, names in (("only there", there - here), ("only here", here - there))
        if names
    ]
    raise CheckpointError(f"{path} holds the state of an optimizer of other parameters: {'; '.join(said)}")


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


def _joined(parts: Sequence[dict[str, TensorRecord]]) -> dict[str, TensorRecord]:
    return {name: record for part in parts for name, record in part.items()}


def _first(what: str, items: list[str]) -> str:
    rest = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return f"{what}: {', '.join(items[:_SHOWN])}{rest}"
