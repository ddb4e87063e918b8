"""What an export takes over from the folders that its weights and its tokenizer came from, as they are: files that
this project reads, or not at all, and does not write."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from colrow.checkpoint.huggingface import stored_dtype
from colrow.checkpoint.stored_files import stays_inside
from colrow.data.tokenizer import Tokenizer, load_tokenizer
from colrow.errors import DataError
from colrow.models.huggingface import json_mapping

GENERATION, _SETTINGS = "generation_config.json", "tokenizer_config.json"
_TOKENIZER = (
    "tokenizer.json",
    _SETTINGS,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
_MODEL = ("README.md", "LICENSE*", "NOTICE*", "USE_POLICY*")
_CODE = ("*.py",)


@dataclass(frozen=True)
class Carried:
    """Files of the folders that a model's weights and its tokenizer came from; None where there is no such folder.

    Args:
        code: take the model's Python files too, which its config.json names.
    """

    model: Path | None = None
    tokenizer: Path | None = None
    code: bool = False

    @classmethod
    def of(cls, model: Path | None, path: Path | None, tokenizer: Tokenizer, code: bool = False) -> Carried:
        """What of a model's folder, and of the one that a run's config names for its tokenizer, there still is.

        Args:
            path: `data.tokenizer.path`, a folder or its tokenizer.json. Another vocabulary may lie there by now: its
                files are taken only where it is `tokenizer`.
        """
        if path is not None and path.name == "tokenizer.json":
            path = path.parent
        try:
            is_same = path is not None and path.is_dir() and load_tokenizer(path).digest == tokenizer.digest
        except DataError:
            is_same = False
        return cls(model, path if is_same else None, code)

    @property
    def owns_token_ids(self) -> bool:
        """Whether the token ids of the model's config files are those of the tokenizer."""
        return (
            self.model is not None and self.tokenizer is not None and self.model.resolve() == self.tokenizer.resolve()
        )

    def dtype(self, requested: str | None) -> torch.dtype:
        """What an export's weights are stored in: `requested`, else the dtype of the model's folder, else float32.

        Training keeps float32, so float64 would hold nothing more.
        """
        if requested is not None:
            return getattr(torch, requested)
        stored = None if self.model is None else stored_dtype(self.model)
        return torch.float32 if stored in (None, torch.float64) else stored

    def files(self) -> dict[str, Path]:
        """Each file by its name in the export."""
        of_model = _MODEL + (GENERATION,) * self.owns_token_ids + _CODE * self.code
        return {
            str(file.relative_to(folder)): file
            for folder, patterns in ((self.tokenizer, _TOKENIZER), (self.model, of_model))
            if folder is not None
            for pattern in patterns
            for file in sorted(folder.glob(pattern))
            if file.is_file() and stays_inside(file, folder)
        }

    def copy_to(self, folder: Path) -> None:
        """Copy the files, byte for byte, over those that a tokenizer has written of itself."""
        for name, file in self.files().items():
            data = file.read_bytes()
            if name == _SETTINGS and not json_mapping(file).get("eos_token"):
                continue  # what is there says which token ends a text: the folder says it in another file
            (folder / name).parent.mkdir(exist_ok=True)
            with (folder / name).open("wb") as copy:
                copy.write(data)
                copy.flush()
                os.fsync(copy.fileno())

    def config(self, name: str) -> dict[str, Any]:
        """The mapping in one of the model's JSON files; an empty one where there is none."""
        return {} if self.model is None else json_mapping(self.model / name)


def special_token_ids(tree: dict[str, Any]) -> dict[str, Any]:
    """The special tokens' ids in a config.json or generation_config.json."""
    return {key: value for key, value in tree.items() if key.endswith("_token_id") and value is not None}
