"""A model as a Hugging Face folder that transformers loads: safetensors files, each written by one rank, and JSON."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from colrow.checkpoint.carried import GENERATION, Carried, special_token_ids
from colrow.checkpoint.conversions import in_parts, parts_for
from colrow.checkpoint.folder import replace_folder
from colrow.checkpoint.gather import catalogue
from colrow.checkpoint.huggingface import named_tensors, parts_of, shapes_of
from colrow.checkpoint.loading import first_few
from colrow.checkpoint.manifest import write_text
from colrow.checkpoint.pieces import Piece
from colrow.checkpoint.ranks import Ranks
from colrow.checkpoint.read_back import ReadBack, Reader, TensorSpec, reader_of
from colrow.checkpoint.space import DiskUse
from colrow.checkpoint.state import Model, stages_of
from colrow.checkpoint.stored_files import INDEX
from colrow.checkpoint.tensor_file import DTYPES, headers_in
from colrow.checkpoint.weight_files import MAX_SHARD_BYTES, ShardFile, share_files, split_files, write_share
from colrow.data.disk import NoFileLocksError, remove, try_lock
from colrow.errors import CheckpointError, ExportError
from colrow.models.huggingface import config_to_huggingface
from colrow.models.llama import LlamaConfig

T = TypeVar("T")

_AGAIN = "write the export with `colrow export RUN -o DIR`, here or on another disk"
_TEXT_ENDS = ("bos_token_id", "eos_token_id")
_EXPORT_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    "*token*.json",
    "*chat_template*",
    "vocab.json",
    "merges.txt",
)
"""What may be there of a previous export; carried files too, where they are still the same."""


class SavableTokenizer(Protocol):
    """What an export needs of a tokenizer: the ids that end and begin a text, and `save` into a folder."""

    @property
    def eos_id(self) -> int: ...

    @property
    def prefix(self) -> list[int]: ...

    def save(self, path: Path) -> None: ...


def export(
    model: Model,
    folder: Path | str,
    config: LlamaConfig | dict[str, Any],
    tokenizer: SavableTokenizer | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    group: dist.ProcessGroup | None = None,
    carried: Carried | None = None,
    imports: bool = False,
) -> ReadBack | None:
    """Write a Hugging Face folder that `transformers` loads. Collective over `group`, all ranks unless given.

    Names are those that transformers itself writes: a matrix for each expert, say, of which the model holds a stack.
    Each rank writes a share of the files into one folder that all ranks see, and holds at most one gathered tensor at
    a time. The folder is read back, and gets its name when it is complete; a previous export of that name is replaced.

    Args:
        config: or the mapping of a config.json, for a model of the transformers library.
        dtype: of the written weights.
        max_shard_bytes: a file holds at most this much, unless a single tensor is larger.
        carried: the folders that weights and tokenizer came from, whose other files go into the export as they are.
        imports: import transformers to read the export back; else it does where transformers is imported already, and
            where colrow's own Llama is not the model ([Note: who reads]).

    Returns:
        What reading back found, on the first rank; None on the others.

    Raises:
        ExportError: on every rank, before weights are written: config.json does not describe this model.
        CheckpointError: on every rank, when the folder holds something else, or any rank cannot write.
        ConfigError: no class of transformers has the model's combination of options.
    """
    carried = carried or Carried()
    tree = config_to_huggingface(config, dtype) if isinstance(config, LlamaConfig) else dict(config)
    own = special_token_ids(carried.config("config.json")) if carried.owns_token_ids else {}
    # the ids of the tokenizer, unless model and tokenizer came from one folder: then that folder's own stay
    tree |= {"dtype": str(dtype).removeprefix("torch."), **_text_ends(tokenizer), **own}
    ranks = Ranks.open(group, private=False)
    pieces = ranks.together(lambda: _pieces(model))
    tensors = catalogue(ranks, pieces, dtype)
    files = split_files(tensors, max_shard_bytes)
    made = _Export(Path(folder).absolute(), stages_of(model)[0], files, dtype, carried)

    def together(work: Callable[[], T]) -> T:
        return ranks.together(lambda: made.disk.naming_a_full_one(work))

    with ExitStack() as stack:
        together(lambda: stack.enter_context(made.alone()) if ranks.first else None)
        reader = together(lambda: made.begin(tree, tokenizer, imports=imports) if ranks.first else None)
        # what the user's config gets wrong is raised by every rank, before any has written weights
        if refusal := ranks.gather(reader if isinstance(reader, str) else None)[0]:
            raise ExportError(refusal)
        # before the weights: on disks of several hosts each would hold a share
        together(lambda: _require_seen(made.unfinished))
        together(lambda: write_share(made.unfinished, ranks, pieces, tensors, share_files(files, ranks.size)))
        return together(lambda: made.finish(reader) if isinstance(reader, Reader) else None)


@dataclass(frozen=True)
class _Export:
    """The folder of one export, which the first rank makes."""

    folder: Path
    model: nn.Module
    files: Sequence[ShardFile]
    dtype: torch.dtype
    carried: Carried

    @property
    def unfinished(self) -> Path:
        """Hidden until it is complete, and beside the target: a rename does not cross file systems."""
        return self.folder.parent / f".{self.folder.name}.unfinished"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other exports of this name away, which would write into the same folder; it is removed at the end."""
        lock = self.folder.parent / f".{self.folder.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("a") as file:
            with suppress(NoFileLocksError):
                if not try_lock(file):
                    raise CheckpointError(f"another export writes {self.folder}: wait for it, or give another folder")
            try:
                yield
            finally:
                shutil.rmtree(self.unfinished, ignore_errors=True)
                lock.unlink(missing_ok=True)

    @property
    def disk(self) -> DiskUse:
        needed = sum(file.bytes for file in self.files)
        return DiskUse("an export", self.folder.parent, needed, self.folder.parent / "checkpoints", _AGAIN)

    def begin(self, tree: dict[str, Any], tokenizer: SavableTokenizer | None, *, imports: bool) -> Reader | str:
        """Write all but the weights. Who will read them back, or why config.json does not describe them."""
        _start(self.folder, self.unfinished, self.carried)
        self.disk.require_free()
        _write_texts(self.unfinished, tree, tokenizer, self.carried)
        planned = {name: TensorSpec(t.shape, t.dtype) for file in self.files for name, t in file.tensors.items()}
        try:
            reader = reader_of(self.unfinished, imports=imports, trust_code=self.carried.code)
            reader.compare(planned, self.dtype).require_equal(self.model)
        except ExportError as error:
            return str(error)
        return reader

    def finish(self, reader: Reader) -> ReadBack:
        """Read the weights' files back, and give the folder its name."""
        _write_index(self.unfinished, self.files)
        read_back = reader.compare(_stored(self.unfinished), self.dtype)
        read_back.require_equal(self.model)
        replace_folder(self.unfinished, self.folder, _previous(self.folder))
        return read_back


def require_exportable(model: nn.Module, config: LlamaConfig | dict[str, Any], code: Path | None = None) -> None:
    """Raise what `export` would raise of the complete model and its config, before a run pays for it. Writes nothing.

    Args:
        code: the folder of the Python files that the config names, which run.

    Raises:
        ExportError: config.json does not describe this model.
        ConfigError: no class of transformers has the model's combination of options.
    """
    if isinstance(config, LlamaConfig):
        config = config_to_huggingface(config, torch.float32)
    carried = Carried(model=code, code=code is not None)
    with TemporaryDirectory() as name:
        _write_texts(Path(name), config, None, carried)
        reader = reader_of(Path(name), trust_code=carried.code)
        stored = {p.name: TensorSpec(p.shape, _written(p.data.dtype)) for p in _pieces(model, planned=True)}
        reader.compare(stored, torch.float32).require_equal(model)


def _written(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point else dtype


def _pieces(model: Model, *, planned: bool = False) -> list[Piece]:
    named = named_tensors(model)
    parts = parts_of(named, parts_for(model, shapes_of(named)) if isinstance(model, nn.Module) else {})
    return [piece for item in named for piece in in_parts(item.pieces(planned=planned), parts[item.name])]


def _text_ends(tokenizer: SavableTokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {}
    first = tokenizer.prefix[0] if tokenizer.prefix else None
    return dict(zip(_TEXT_ENDS, (first, tokenizer.eos_id), strict=True))


def _start(folder: Path, unfinished: Path, carried: Carried) -> None:
    """Make the folder to write into, when what is there may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file: give a folder to export to")
    previous = _previous(folder)
    if previous.exists() and not folder.exists():
        os.rename(previous, folder)  # `replace_folder` was killed between its two renames
    if folder.exists() and folder.resolve() in (path.resolve() for path in (carried.model, carried.tokenizer) if path):
        raise CheckpointError(f"{folder} is the folder that the model or its tokenizer came from: give another one")
    known = {name.partition("/")[0] for name, file in carried.files().items() if _is_copy(folder / name, file)}
    others = [
        path.name
        for path in folder.glob("*")
        if path.name not in known and not any(path.match(pattern) for pattern in _EXPORT_FILES)
    ]
    if others:
        raise CheckpointError(
            f"{folder} holds something else ({first_few(sorted(others))}): give a new or an empty folder"
        )
    remove(unfinished)
    unfinished.mkdir(parents=True)


def _is_copy(path: Path, of: Path) -> bool:
    return path.is_file() and filecmp.cmp(path, of, shallow=False)


def _require_seen(unfinished: Path) -> None:
    if not unfinished.is_dir():
        raise CheckpointError(f"this rank's host does not see {unfinished}: export to a folder that all hosts share")


def _write_texts(unfinished: Path, tree: dict[str, Any], tokenizer: SavableTokenizer | None, carried: Carried) -> None:
    """Write configs and tokenizer; what is carried over goes in as it is, but for token ids of another tokenizer."""
    if tokenizer is not None:
        tokenizer.save(unfinished)
    carried.copy_to(unfinished)
    _write_json(unfinished / "config.json", tree)
    if not (unfinished / GENERATION).exists():
        generation = carried.config(GENERATION)
        others = {key: value for key, value in generation.items() if not key.endswith("_token_id")}
        _write_json(unfinished / GENERATION, {**others, **{k: tree[k] for k in tree if k in _TEXT_ENDS}})


def _write_index(unfinished: Path, files: Sequence[ShardFile]) -> None:
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.tensors}
        total = {"metadata": {"total_size": sum(file.bytes for file in files)}, "weight_map": weight_map}
        _write_json(unfinished / INDEX, total)


def _stored(folder: Path) -> dict[str, TensorSpec]:
    """The tensors in a folder's files, by the files' own headers."""
    found = {}
    by_name = {name: dtype for dtype, name in DTYPES.items()}
    for file in sorted(folder.glob("*.safetensors")):
        found.update({name: TensorSpec(shape, by_name[dtype]) for name, (shape, dtype) in headers_in(file).items()})
    return found


def _previous(folder: Path) -> Path:
    """Where an export is while its successor gets the name."""
    return folder.parent / f".{folder.name}.former"


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
