"""Weights out of a Hugging Face folder: safetensors, in one file or several with an index.

Each rank reads its shard of a tensor from the file and nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from colrow.checkpoint.conversions import Part, Shapes, as_is, in_parts, parts_in
from colrow.checkpoint.loading import first_few
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.state import Model, NamedTensor, model_tensors, stages_of
from colrow.checkpoint.stored_files import files_in
from colrow.checkpoint.tensor_file import DTYPES, TensorHeader, TensorReader, headers_in
from colrow.errors import CheckpointError
from colrow.models.huggingface import name_to_huggingface
from colrow.models.llama import Llama, LlamaConfig

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_QUANTIZED = (".qweight", ".qzeros", ".scales", ".absmax", ".SCB", "_scale", "_scale_inv", "_packed", "_blocks")
"""What the names of quantized weights' companions end with."""
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def load_weights(model: Model, folder: Path | str) -> None:
    """Fill a model's parameters, plain or DTensors, from a folder's safetensors, cast to the parameters' dtype.

    Nothing is changed unless the folder's names and shapes are the model's. A tied head may be there or not.

    Raises:
        CheckpointError: as `require_weights`; weights that are not finite, or a tied head that is not the embedding.
    """
    stored = require_weights(model, folder)
    by_file: dict[Path, list[Piece]] = {}
    for item in stored.named:
        for piece in in_parts(item.pieces(), stored.parts[item.name]):
            by_file.setdefault(stored.files[piece.name], []).append(piece)
    with torch.no_grad():  # all checks are done: from here on parameters change
        for file, pieces in by_file.items():
            with TensorReader(file) as reader:
                for piece in pieces:
                    read = reader.read(piece.name, piece.region)
                    # a tied tensor that is stored twice: two values would mean that one of them is lost
                    for double in stored.doubles.get(piece.name, []):
                        _require_same(read, piece, stored.files[double], double)
                    value = read.to(piece.data.dtype)
                    if value.is_floating_point() and not (finite := value.isfinite()).all():
                        raise CheckpointError(
                            f"{file} holds {int((~finite).sum()):,} values in {piece.name} that are NaN or infinite in "
                            f"{value.dtype}: fetch the folder again, or repair the weights"
                        )
                    piece.data.copy_(value)


@dataclass(frozen=True)
class StoredWeights:
    """A folder's tensors for the tensors of a model."""

    files: dict[str, Path]
    named: list[NamedTensor]
    parts: dict[str, list[Part]]
    doubles: dict[str, list[str]]
    """Further names under which a folder stores a tied tensor."""


def require_weights(model: Model, folder: Path | str) -> StoredWeights:
    """What a folder stores for a model, which may be on the meta device: only headers are read.

    Raises:
        CheckpointError: no safetensors, or tensors that are missing, unexpected, in two files, of another shape or
            type, or damaged.
    """
    folder = Path(folder)
    files = files_in(folder)
    named = named_tensors(model)
    known = parts_in(model, shapes_of(named, but=files), files) if isinstance(model, nn.Module) else {}
    parts = parts_of(named, known)
    needed = {part.name: part.shape for item in named for part in parts[item.name]}
    _require_same_names(folder, *names_that_differ(model, files, needed))
    # A tied head that the folder stores as well: it must have the same values, which `load_weights` compares.
    doubles: dict[str, list[str]] = {}
    for double, name in (_ties(model) or ({_HEAD: _EMBEDDING} if _is_tied(model) else {})).items():
        if double in files and name in needed and double != name:
            doubles.setdefault(name, []).append(double)
    shapes = needed | {double: needed[name] for name, found in doubles.items() for double in found}
    # only files that hold something of the model: others may be of another kind
    headers = {file: headers_in(file) for file in {files[name] for name in shapes}}
    _require_same_shapes(folder, files, headers, shapes)
    stored = {name: headers[files[name]][name].dtype for name in needed}
    _require_floats(folder, stored, {part.name: item.tensor.dtype for item in named for part in parts[item.name]})
    return StoredWeights(files, named, parts, doubles)


def _require_same(value: Tensor, piece: Piece, file: Path, double: str) -> None:
    with TensorReader(file) as reader:
        other = reader.read(double, piece.region)
    if not torch.equal(other.to(value.dtype), value):
        raise CheckpointError(
            f"{file} holds {double} with other values than {piece.name}, and config.json ties them: set "
            "tie_word_embeddings to false there, or remove the one that is not meant"
        )


def named_tensors(model: Model) -> list[NamedTensor]:
    """The tensors that this rank holds, under the names of a Hugging Face folder."""
    named = [replace(item, name=name_to_huggingface(item.name)) for item in model_tensors(model)]
    if (ties := _ties(model)) is not None:
        return [replace(item, name=ties.get(item.name, item.name)) for item in named]
    if not _is_tied(model):
        return named
    return [replace(item, name=_EMBEDDING) if item.name == _HEAD else item for item in named]


def shapes_of(named: Sequence[NamedTensor], but: Container[str] = ()) -> Shapes:
    return {item.name: tuple(item.tensor.shape) for item in named if item.name not in but}


def parts_of(named: Sequence[NamedTensor], known: dict[str, list[Part]]) -> dict[str, list[Part]]:
    """What each tensor is stored as: what is known, else the tensor itself."""
    return {name: known.get(name) or [as_is(name, shape)] for name, shape in shapes_of(named).items()}


def _is_tied(model: Model) -> bool:
    return any(getattr(getattr(part, "config", None), "tie_word_embeddings", False) for part in stages_of(model))


def _ties(model: Model) -> dict[str, str] | None:
    """What a model of transformers says that it ties, each name to the one that is stored; None for other models."""
    ties = getattr(model, "all_tied_weights_keys", None)
    return ties if isinstance(ties, dict) else None


def names_that_differ(model: Model, stored: Iterable[str], needed: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names that the model needs and a folder has not, and names in the folder that belong to no model's tensor."""
    there, expected = set(stored), _expected(model, needed)
    missing = [name for name in needed if name not in there]
    return missing, sorted(name for name in there - expected if not _is_derived(name, expected))


def stored_dtype(folder: Path | str) -> torch.dtype | None:
    """The floating-point dtype that most elements of a folder's weights are stored in; None where there are none.

    Raises:
        CheckpointError: the folder's files cannot be read.
    """
    elements: Counter[str] = Counter()
    for file in sorted(set(files_in(Path(folder)).values())):
        for shape, dtype in headers_in(file).values():
            elements[dtype] += prod(shape)
    floats = [name for name, _ in elements.most_common() if name in _FLOATS]
    return next((dtype for dtype, name in DTYPES.items() if floats and name == floats[0]), None)


def _expected(model: Model, needed: Iterable[str]) -> set[str]:
    """The names of the complete model: a pipeline stage holds some, and the others are not unexpected in the folder."""
    names = {*needed, *(_ties(model) or ())}
    for part in stages_of(model):
        config = getattr(part, "config", None)
        if isinstance(config, LlamaConfig):
            with torch.device("meta"):
                names |= {name_to_huggingface(name) for name in Llama(config).state_dict()}
    return names


def _require_same_names(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    if not missing and not unexpected:
        return
    wrong = [
        f"{what} {first_few(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
    ]
    fix = "is its config.json the model's?"
    if any(name.endswith(_QUANTIZED) for name in unexpected):
        fix = "its weights are quantized: with transformers, model.dequantize() and save_pretrained"
    if any(name.startswith("base_model.") for name in unexpected):
        fix = "its names are those of peft: merge_and_unload of peft, then save_pretrained"
    if missing == [_HEAD]:
        fix = "set tie_word_embeddings, for the folder has no head of its own"
    raise CheckpointError(f"{folder} does not hold this model: {'; '.join(wrong)}: {fix}")


def _is_derived(name: str, expected: set[str]) -> bool:
    """What some folders store although the model computes it."""
    return name.endswith("rotary_emb.inv_freq") or (name == _HEAD and _EMBEDDING in expected)


def _require_floats(folder: Path, stored: dict[str, str], wanted: dict[str, torch.dtype]) -> None:
    """Raise where a float parameter is stored as another type: an integer of quantized weights is no weight, and fp8
    means nothing without its scales. Buffers of integers must be stored so."""
    wrong = [
        f"{name} is {stored[name]}"
        for name, dtype in wanted.items()
        if stored[name] not in (_FLOATS if dtype.is_floating_point else {DTYPES[dtype]})
    ]
    if wrong:
        raise CheckpointError(
            f"{folder} holds weights of types that are not read as they are: {first_few(wrong)}: give a folder with "
            f"weights in {', '.join(sorted(_FLOATS))}; with transformers, model.dequantize() and save_pretrained"
        )


def _require_same_shapes(
    folder: Path, files: dict[str, Path], headers: dict[Path, dict[str, TensorHeader]], needed: Shapes
) -> None:
    wrong = []
    for name, shape in needed.items():
        there = headers[files[name]].get(name)
        twice = [file.name for file, header in headers.items() if name in header and file != files[name]]
        if there is not None and twice:
            raise CheckpointError(
                f"{files[name].name} and {twice[0]} in {folder} both hold {name}: fetch the folder again"
            )
        if there is None:
            raise CheckpointError(f"{files[name]} lacks {name}, which the index says it holds: fetch the folder again")
        if there.shape != shape:
            wrong.append(f"{name} is {list(there.shape)}, the model's {list(shape)}")
    if wrong:
        raise CheckpointError(
            f"{folder} holds a model of other sizes: {first_few(wrong)}: is its config.json the model's?"
        )
