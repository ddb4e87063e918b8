"""Weights in and out of a Hugging Face folder: safetensors, in one file or several with an index.

Reading takes each rank's part of a tensor from the file and nothing else; writing is shared by all ranks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import nn

from colrow.checkpoint.conversions import Part, Shapes, in_parts, parts_for, parts_in, whole
from colrow.checkpoint.folder import flush
from colrow.checkpoint.gather import catalogue
from colrow.checkpoint.manifest import write_text
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.ranks import Ranks, as_text
from colrow.checkpoint.shard_files import INDEX, SINGLE, ShardFile, share_files, split_files, write_share
from colrow.checkpoint.state import Named, model_tensors
from colrow.checkpoint.tensor_file import TensorReader
from colrow.errors import CheckpointError
from colrow.models.huggingface import config_to_huggingface, name_to_huggingface
from colrow.models.llama import Llama, LlamaConfig

Model = nn.Module | Sequence[nn.Module]
"""A model, or the pipeline stages of this rank."""

MAX_SHARD_BYTES = 5 * 10**9

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TEXT_ENDS = ("bos_token_id", "eos_token_id")
_OF_AN_EXPORT = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    "*token*.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
)


class SavesItself(Protocol):
    """What an export asks of a tokenizer."""

    @property
    def eos_id(self) -> int:
        """The token that ends a text."""

    @property
    def prefix(self) -> list[int]:
        """The tokens that begin every text; often none."""

    def save(self, path: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder."""


def load_weights(model: Model, folder: Path | str) -> None:
    """Fill a model's parameters, plain or DTensors, from a folder's safetensors, cast to the parameters' dtype.

    Nothing is changed unless the folder's names and shapes are the model's. A tied head may be there or not.

    Raises:
        CheckpointError: no safetensors, or tensors that are missing, unexpected, of another shape, or damaged.
    """
    folder = Path(folder)
    files = _files(folder)
    named = _named(model)
    known = parts_in(model, _shapes_of(named, but=files), files) if isinstance(model, nn.Module) else {}
    parts = _parts_of(named, known)
    needed = {part.name: part.shape for one in named for part in parts[one.name]}
    _require_same_names(folder, files, needed, _expected(model, needed))
    _require_same_shapes(folder, files, needed)
    by_file: dict[Path, list[Piece]] = {}
    for one in named:
        for piece in in_parts(one.pieces(), parts[one.name]):
            by_file.setdefault(files[piece.name], []).append(piece)
    with torch.no_grad():
        for file, pieces in by_file.items():
            with TensorReader(file) as reader:
                for piece in pieces:
                    ends = zip(piece.offset, piece.data.shape, strict=True)
                    piece.data.copy_(reader.read(piece.name, tuple(slice(o, o + n) for o, n in ends)))


def export(
    model: Model,
    folder: Path | str,
    config: LlamaConfig | dict[str, Any],
    tokenizer: SavesItself | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write a Hugging Face folder that `transformers` loads. Collective over `group`, all ranks unless given.

    Names are those that transformers itself writes: a matrix for each expert, say, of which the model holds a stack.
    Each rank writes a share of the files into one folder that all ranks see, and holds at most one whole tensor at
    a time. The folder gets its name when it is complete; a former export of that name is replaced.

    Args:
        config: or the mapping of a config.json, for a model of the transformers library.
        dtype: of the written weights.
        max_shard_bytes: a file holds at most this much, unless a single tensor is larger.

    Raises:
        CheckpointError: on every rank, when the folder holds something else, or any rank cannot write.
        ConfigError: no class of transformers has the model's combination of options.
    """
    folder = Path(folder).absolute()
    tree = config_to_huggingface(config, dtype) if isinstance(config, LlamaConfig) else dict(config)
    tree |= {"dtype": str(dtype).removeprefix("torch."), **_text_ends(tokenizer)}
    ranks = Ranks.open(group, private=False)
    pieces = ranks.together(lambda: _exported(model))
    tensors = catalogue(ranks, pieces, dtype)
    files = split_files(tensors, max_shard_bytes)
    shares = share_files(files, ranks.size)
    unfinished = folder.parent / f".{folder.name}.unfinished"
    ranks.together(lambda: _start(folder, unfinished) if ranks.first else None)
    try:
        ranks.together(lambda: _require_seen(unfinished))
        ranks.together(lambda: write_share(unfinished, ranks, pieces, tensors, shares))
        ranks.together(lambda: _finish(unfinished, folder, tree, tokenizer, files) if ranks.first else None)
    finally:
        if ranks.first:
            shutil.rmtree(unfinished, ignore_errors=True)


def _named(model: Model) -> list[Named]:
    """The tensors that this rank holds, under the names of a Hugging Face folder."""
    named = [replace(one, name=name_to_huggingface(one.name)) for one in model_tensors(model)]
    if (ties := _ties(model)) is not None:
        return [replace(one, name=ties.get(one.name, one.name)) for one in named]
    if not _is_tied(model):
        return named
    return [replace(one, name=_EMBEDDING) if one.name == _HEAD else one for one in named]


def _stages(model: Model) -> list[nn.Module]:
    return [model] if isinstance(model, nn.Module) else list(model)


def _shapes_of(named: Sequence[Named], but: Container[str] = ()) -> Shapes:
    return {one.name: tuple(one.tensor.shape) for one in named if one.name not in but}


def _parts_of(named: Sequence[Named], known: dict[str, list[Part]]) -> dict[str, list[Part]]:
    """What each tensor is stored as: what is known, else the tensor itself."""
    return {name: known.get(name) or [whole(name, shape)] for name, shape in _shapes_of(named).items()}


def _exported(model: Model) -> list[Piece]:
    named = _named(model)
    parts = _parts_of(named, parts_for(model, _shapes_of(named)) if isinstance(model, nn.Module) else {})
    return [piece for one in named for piece in in_parts(one.pieces(), parts[one.name])]


def _is_tied(model: Model) -> bool:
    return any(getattr(getattr(part, "config", None), "tie_word_embeddings", False) for part in _stages(model))


def _ties(model: Model) -> dict[str, str] | None:
    """What a model of transformers says that it ties, each name to the one that is stored; None for other models."""
    ties = getattr(model, "all_tied_weights_keys", None)
    return ties if isinstance(ties, dict) else None


def _expected(model: Model, needed: Iterable[str]) -> set[str]:
    """The names of the whole model, of which a pipeline stage holds some."""
    names = {*needed, *(_ties(model) or ())}
    for part in _stages(model):
        config = getattr(part, "config", None)
        if isinstance(config, LlamaConfig):
            with torch.device("meta"):
                names |= {name_to_huggingface(name) for name in Llama(config).state_dict()}
    return names


def _files(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        try:
            tree = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): folder / str(file) for name, file in tree.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read: {as_text(error)}") from error
        lost = sorted({file.name for file in files.values() if not file.exists()})
        if lost:
            raise CheckpointError(f"{folder} lacks {_first(lost)}, which its index names: fetch the folder again")
        return files
    if not single.exists():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        mend = (
            "its weights are pickled, which could run code: save them with save_pretrained of transformers"
            if pickled
            else "give a Hugging Face folder, or another source of weights"
        )
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: {mend}")
    return dict.fromkeys(_shapes(single), single)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a safetensors file: {error}") from error


def _require_same_names(folder: Path, files: Iterable[str], needed: Iterable[str], expected: set[str]) -> None:
    there = set(files)
    missing = [name for name in needed if name not in there]
    unexpected = sorted(name for name in there - expected if not _is_derived(name, expected))
    if not missing and not unexpected:
        return
    wrong = [f"{what} {_first(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
    mend = "is its config.json the model's?"
    if missing == [_HEAD]:
        mend = "set tie_word_embeddings, for the folder has no head of its own"
    raise CheckpointError(f"{folder} does not hold this model: {'; '.join(wrong)}: {mend}")


def _is_derived(name: str, expected: set[str]) -> bool:
    """What some folders store although the model computes it."""
    return name.endswith("rotary_emb.inv_freq") or (name == _HEAD and _EMBEDDING in expected)


def _require_same_shapes(folder: Path, files: dict[str, Path], needed: dict[str, tuple[int, ...]]) -> None:
    wrong = []
    shapes = {file: _shapes(file) for file in {files[name] for name in needed}}
    for name, shape in needed.items():
        there = shapes[files[name]]
        if name not in there:
            raise CheckpointError(f"{files[name]} lacks {name}, which the index says it holds: fetch the folder again")
        if there[name] != shape:
            wrong.append(f"{name} is {list(there[name])}, the model's {list(shape)}")
    if wrong:
        raise CheckpointError(f"{folder} holds a model of other sizes: {_first(wrong)}")


def _text_ends(tokenizer: SavesItself | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    first = tokenizer.prefix[0] if tokenizer.prefix else None
    return dict(zip(_TEXT_ENDS, (first, tokenizer.eos_id), strict=True))


def _start(folder: Path, unfinished: Path) -> None:
    """Make the folder to write into, when what is there may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder to export to")
    others = [path.name for path in folder.glob("*") if not any(path.match(known) for known in _OF_AN_EXPORT)]
    if others:
        raise CheckpointError(
            f"{folder} holds something else ({_first(sorted(others))}): give a new or an empty folder"
        )
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _require_seen(unfinished: Path) -> None:
    if not unfinished.is_dir():
        raise CheckpointError(f"this rank's host does not see {unfinished}: export to a folder that all hosts share")


def _finish(
    unfinished: Path, folder: Path, tree: dict[str, Any], tokenizer: SavesItself | None, files: Sequence[ShardFile]
) -> None:
    """Write what is small, and give the folder its name."""
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.tensors}
        total = {"metadata": {"total_size": sum(file.bytes for file in files)}, "weight_map": weight_map}
        _write_json(unfinished / INDEX, total)
    _write_json(unfinished / "config.json", tree)
    _write_json(unfinished / "generation_config.json", {k: tree[k] for k in tree if k in _TEXT_ENDS})
    if tokenizer is not None:
        tokenizer.save(unfinished)
    flush(unfinished)
    former = folder.parent / f".{folder.name}.former"
    shutil.rmtree(former, ignore_errors=True)
    if folder.exists():
        os.rename(folder, former)
    try:
        os.rename(unfinished, folder)
    except OSError:
        if former.exists():
            os.rename(former, folder)
        raise
    flush(folder.parent)
    shutil.rmtree(former, ignore_errors=True)


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")


def _first(items: Sequence[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")
