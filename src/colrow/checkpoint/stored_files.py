"""The files of a Hugging Face folder that hold weights: safetensors, in one file or several with an index."""

from __future__ import annotations

import json
import re
from pathlib import Path, PurePosixPath

from colrow.checkpoint.loading import first_few
from colrow.checkpoint.ranks import as_text
from colrow.checkpoint.tensor_file import headers_in
from colrow.errors import CheckpointError
from colrow.yaml_text import read_text

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MOST_INDEX_BYTES = 256 << 20

_SAVE = "save them with save_pretrained of transformers"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_OTHER_FORMATS = {
    "adapter_model.*": "it holds an adapter alone: merge it into its model (merge_and_unload of peft) and save that",
    **dict.fromkeys(("*.bin", "*.pt*"), f"its weights are pickled, which could run code: {_SAVE}"),
    "*.gguf": "its weights are GGUF: write them with transformers, "
    "AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE).save_pretrained(NEW)",
    "*.safetensors": f"its files have other names: rename a single one to {SINGLE}, if its tensors have the names of "
    "transformers",
}


def files_in(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor.

    Raises:
        CheckpointError: no safetensors, an index that is damaged or names files that are not there or elsewhere, or
            files beside those that it names, of which nobody can say which are meant; or a link out of the folder.
    """
    index, single = folder / INDEX, folder / SINGLE
    for path in (index, single):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(f"{path} is a link that leads nowhere: fetch the folder again")
        _require_inside(path, folder)
    if index.exists():
        files = {name: folder / file for name, file in _read_index(index).items()}
        named = {file.name for file in files.values()}
        lost = sorted(name for name in named if not (folder / name).exists())
        if lost:
            raise CheckpointError(f"{folder} lacks {first_few(lost)}, which its index names: fetch the folder again")
        for file in sorted(set(files.values())):
            _require_inside(file, folder)
        # Left over from another download or save: transformers would read the index, other tools the single file.
        extra = sorted(p.name for p in folder.iterdir() if p.name == SINGLE or _SHARD.fullmatch(p.name))
        if left := [name for name in extra if name not in named]:
            raise CheckpointError(
                f"{folder} holds {first_few(left)} beside the files that {INDEX} names: remove what is not meant, "
                "or fetch the folder again"
            )
        return files
    if not single.exists():
        fix = next((fix for kind, fix in _OTHER_FORMATS.items() if any(folder.glob(kind))), None)
        fix = fix or "give a Hugging Face folder, or another source of weights"
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: {fix}")
    return dict.fromkeys(headers_in(single), single)


def _read_index(index: Path) -> dict[str, str]:
    text = read_text(index, "index", CheckpointError, _MOST_INDEX_BYTES)
    try:
        names = {str(name): str(file) for name, file in json.loads(text)["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} cannot be read: {as_text(error)}: fetch the folder again") from error
    for file in sorted(set(names.values())):
        if not _names_inside(file):
            raise CheckpointError(f"{index} names the file {file[:80]!r} outside its folder: fetch the folder again")
    return names


def stays_inside(file: Path, folder: Path) -> bool:
    """Whether a link leads to a file of the folder, or of the cache in which Hugging Face keeps files by their hash."""
    target = file.resolve()
    return target.is_relative_to(folder.resolve()) or target.parent == (folder.resolve().parent.parent / "blobs")


def _require_inside(file: Path, folder: Path) -> None:
    if not stays_inside(file, folder):
        raise CheckpointError(
            f"{file} is a link out of its folder, to {file.resolve()}: copy the file, or give the folder that holds it"
        )


def _names_inside(name: str) -> bool:
    """Whether a file's name, as an index gives it, names a file inside the index's folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not 0 < len(name) < 256 or "\0" in name:
        return False
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]
