"""The files of a Hugging Face folder that hold weights: safetensors, in one file or several with an index."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from colrow.checkpoint.loading import first_few
from colrow.checkpoint.ranks import as_text
from colrow.checkpoint.tensor_file import headers_in
from colrow.errors import CheckpointError
from colrow.yaml_text import refuse_pipe

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def files_in(folder: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index, single = folder / INDEX, folder / SINGLE
    if index.exists():
        refuse_pipe(index, CheckpointError)
        try:
            tree = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = {str(name): str(file) for name, file in tree.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{index} cannot be read: {as_text(error)}") from error
        for file in sorted(set(names.values())):
            if not _stays_inside(file):
                raise CheckpointError(
                    f"{index} names the file {file[:80]!r} outside its folder: fetch the folder again"
                )
        files = {name: folder / file for name, file in names.items()}
        lost = sorted({file.name for file in files.values() if not file.exists()})
        if lost:
            raise CheckpointError(f"{folder} lacks {first_few(lost)}, which its index names: fetch the folder again")
        return files
    if not single.exists():
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        fix = (
            "its weights are pickled, which could run code: save them with save_pretrained of transformers"
            if pickled
            else "give a Hugging Face folder, or another source of weights"
        )
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}: {fix}")
    return dict.fromkeys(headers_in(single), single)


def _stays_inside(name: str) -> bool:
    """Whether a file's name, as an index gives it, names a file inside the index's folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if not 0 < len(name) < 256 or "\0" in name:
        return False
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]
