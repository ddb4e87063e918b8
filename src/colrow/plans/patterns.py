"""A plan's keys and a model's names: which names a key matches, and what is nearest to one that matches none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn


def with_stars(name: str) -> str:
    """`layers.3.mlp` as `layers.*.mlp`: the name with `*` for each component that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def matches(key: str, name: str) -> bool:
    """Whether a plan's key names this module; `*` stands for one component."""
    pattern, parts = key.split("."), name.split(".")
    return len(pattern) == len(parts) and all(p in ("*", part) for p, part in zip(pattern, parts, strict=True))


def module_names(model: nn.Module) -> list[str]:
    """Every name of every module but the model itself: a shared module has several."""
    return [name for name, _ in model.named_modules(remove_duplicate=False) if name]


def matching(key: str, names: Iterable[str]) -> list[str]:
    """The names that a key matches, in their order."""
    return [name for name in names if matches(key, name)]


def nearest(key: str, names: Iterable[str]) -> str | None:
    """The name that is most like a key which matches none; with `*` for numbers where the key has one."""
    known = {with_stars(name) for name in names} if "*" in key else set(names)
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    return near[0] if near else None
