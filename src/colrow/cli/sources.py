"""What a command line calls a model, as a module."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import nn

from colrow.errors import ConfigError


def load_model(text: str) -> nn.Module:
    """The model that MODEL names, on the meta device where it is built here.

    Args:
        text: a named shape, a Hugging Face folder or config.json, or `package.module:callable`.
    """
    from colrow.models.shapes import SHAPES

    path = Path(text)
    if text in SHAPES:
        from colrow.models.llama import Llama

        with torch.device("meta"):
            return Llama(SHAPES[text])
    if path.exists():
        return _from_folder(path)
    if ":" in text:
        return _call(text)
    raise ConfigError(
        f"no model is called {text!r}: give a named shape ({', '.join(SHAPES)}), a Hugging Face folder or config.json, "
        "or package.module:callable"
    )


def default_seq_len(model: nn.Module, tp: int, most: int) -> int:
    """The model's context, at most `most`, in tokens: the next smaller number that tp divides."""
    context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return max(min(context if isinstance(context, int) else 512, most) // tp, 1) * tp


def _from_folder(path: Path) -> nn.Module:
    """colrow's own Llama where it computes what the config.json says, else the class of the `transformers` library."""
    from colrow.models.huggingface import read_config
    from colrow.models.llama import Llama

    try:
        config = read_config(path)
    except ConfigError as ours:
        file = path / "config.json" if path.is_dir() else path
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError:
            raise ours from None
        try:
            with torch.device("meta"):
                return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(file))
        except (OSError, ValueError, KeyError) as theirs:
            raise ConfigError(f"{ours}; transformers cannot build it either: {theirs}") from theirs
    with torch.device("meta"):
        return Llama(config)


def _call(text: str) -> nn.Module:
    name, _, attribute = text.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import {name} for {text}: {error}") from error
    build = getattr(module, attribute, None)
    if build is None:
        raise ConfigError(f"{name} has no {attribute!r}")
    model = build()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{text} returns {type(model).__name__}, not an nn.Module")
    return model
