"""The models of the table by group: a group's packages are installed together, and its file builds their models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

GROUPS = ("vision", "audio", "diffusion", "language", "recommenders", "science")


@dataclass(frozen=True)
class Foreign:
    """A model of a package, of two layers and a width of about 64, with random weights.

    Attributes:
        build: gives the model and its example inputs.
    """

    package: str
    name: str
    field: str
    build: Callable[[], tuple[nn.Module, Any]]

    @property
    def key(self) -> str:
        return f"{self.package}/{self.name}"


_MODELS: dict[str, list[Foreign]] = {group: [] for group in GROUPS}


def model(package: str, name: str, field: str | None = None) -> Callable[[Any], Any]:
    """Register a builder. A field is a group's name, unless given."""

    def register(build: Any) -> Any:
        group = build.__module__.rpartition(".")[2]
        _MODELS[group].append(Foreign(package, name, field or group, build))
        return build

    return register


def models_of(group: str) -> list[Foreign]:
    """The models of a group. Builders import their packages when they are called."""
    importlib.import_module(f"benchmarks.models.foreign.{group}")
    return _MODELS[group]
