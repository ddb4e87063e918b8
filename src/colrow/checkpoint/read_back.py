"""An export read back: the model that its config.json describes, on the meta device, against the stored tensors.

[Note: who reads]
Where transformers is imported already, or may be, its own class is built from the folder's config.json, and its own
rules say which stored tensor is which parameter. Else colrow's Llama stands for the classes of transformers that it
computes (`models.huggingface.FAMILIES`), under their names: the import would cost a small run more than its steps.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from colrow.checkpoint.conversions import parts_in
from colrow.checkpoint.huggingface import named_tensors, names_that_differ, parts_of, shapes_of
from colrow.checkpoint.loading import first_few
from colrow.errors import ConfigError, ExportError, first_line
from colrow.models.build import parameters_on_meta
from colrow.models.huggingface import read_config
from colrow.models.llama import Llama


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor, in a file or as it should be there."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class ReadBack:
    """What reading an export back has found.

    Args:
        reader: the class that config.json names; None where nothing could be built from it here.
        library: transformers with its release, where it built the class itself.
    """

    reader: str | None
    library: str | None
    tensors: int
    missing: list[str]
    unexpected: list[str]
    different: list[str]
    """Tensors of another shape or dtype, each with both."""

    @property
    def is_for_transformers(self) -> bool:
        """Whether transformers is known to load the export."""
        return self.reader is not None and (self.library is not None or is_installed())

    def __str__(self) -> str:
        if self.reader is None:
            return "not read back: transformers is not installed"
        by = f"loaded by {self.library}" if self.library else "read back"
        absent = "" if self.is_for_transformers else "; not by transformers, which is not installed"
        missing, unexpected = len(self.missing), len(self.unexpected)
        return f"{by} as {self.reader}: {self.tensors:,} tensors, {missing} missing, {unexpected} unexpected{absent}"

    def require_equal(self, model: nn.Module) -> None:
        """Raise an ExportError that counts what of `model` is not as the class of config.json has it."""
        wrong = [
            f"{len(names):,} {what} ({first_few(names)})"
            for what, names in (
                ("missing", self.missing),
                ("unexpected", self.unexpected),
                ("of another shape or dtype", self.different),
            )
            if names
        ]
        if not wrong:
            return
        fix = "read its checkpoint with colrow.checkpoint.distributed.Checkpoints"
        if hasattr(model, "peft_config"):
            merge = "model.merge_and_unload().requires_grad_(True) with peft"
            fix = f"merge the adapters before training ({merge}), or {fix} and use its save_pretrained"
        raise ExportError(
            f"the Hugging Face format cannot hold this {type(model).__name__.removeprefix('FSDP')}: its config.json "
            f"names {self.reader}, and of the {self.tensors:,} tensors are {'; '.join(wrong)}: {fix}"
        )


@dataclass(frozen=True)
class Reader:
    """The model that a config.json describes, without values: see [Note: who reads]."""

    model: nn.Module | None
    name: str | None = None
    library: str | None = None

    def compare(self, stored: Mapping[str, TensorSpec], dtype: torch.dtype) -> ReadBack:
        """What of the tensors is not the model's; `dtype` is what floating-point weights are to be stored in.

        Raises:
            CheckpointError: transformers makes a parameter of stored tensors of which some are missing.
        """
        if self.model is None:
            return ReadBack(None, None, len(stored), [], [], [])
        named = named_tensors(self.model)
        parts = parts_of(named, parts_in(self.model, shapes_of(named, but=stored), stored))
        needed, different = {}, []
        for item in named:
            want_dtype = dtype if item.tensor.dtype.is_floating_point else item.tensor.dtype
            for part in parts[item.name]:
                needed[part.name] = want = TensorSpec(part.shape, want_dtype)
                there = stored.get(part.name, want)
                if there != want:
                    different.append(f"{part.name} is {there}, not {want}")
        missing, unexpected = names_that_differ(self.model, stored, needed)
        return ReadBack(self.name, self.library, len(stored), missing, unexpected, different)


def reader_of(folder: Path, *, imports: bool = False, trust_code: bool = False) -> Reader:
    """Who reads the folder back.

    Args:
        imports: import transformers for it, which takes two seconds.
        trust_code: run the Python code in the folder that config.json names.

    Raises:
        ExportError: transformers cannot build what config.json describes.
    """
    if is_installed() and (imports or "transformers" in sys.modules):
        return _of_transformers(folder, trust_code)
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        with torch.device("meta"):
            return Reader(Llama(read_config(folder)), tree["architectures"][0])
    except (ConfigError, KeyError):
        return _of_transformers(folder, trust_code) if is_installed() else Reader(None)


def is_installed() -> bool:
    """Whether transformers can be imported here, without doing so."""
    try:
        return importlib.util.find_spec("transformers") is not None
    except (ImportError, ValueError):
        return False


def _of_transformers(folder: Path, trust_code: bool) -> Reader:
    try:
        import transformers
    except Exception as error:  # an installation that is broken
        raise ExportError(f"transformers cannot be imported to read the export back: {error}") from error
    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_code)
        cls = getattr(transformers, (config.architectures or [""])[0], None)
        with parameters_on_meta(), torch.random.fork_rng(devices=[]):
            if cls is not None:
                model = cls._from_config(config)
            else:
                model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_code)
    except Exception as error:  # it raises many kinds for a config that it does not know
        text = f"transformers cannot build what the export's config.json describes: {first_line(error)}"
        raise ExportError(text) from error
    model.tie_weights()
    return Reader(model, type(model).__name__, f"transformers {transformers.__version__}")
