"""A plan's keys and a model's names: which names a key matches, and what is nearest to one that matches none."""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn


def with_stars(name: str) -> str:
    """`layers.3.mlp` as `layers.*.mlp`: the name with `*` for each component that is a number."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def is_within(name: str, module: str) -> bool:
    """Whether a module or parameter is the module of this name or lies inside it. Not of the model, `""`."""
    return name == module or name.startswith(f"{module}.")


def matches(key: str, name: str) -> bool:
    """Whether a plan's key names this module. `""` names the model itself.

    Each component is matched as torch's `parallelize_module` does, by the shell's rules: `*` any component, `net*`,
    `net?`, `[1-2]`.
    """
    if not key or not name:
        return key == name
    pattern, parts = key.split("."), name.split(".")
    return len(pattern) == len(parts) and all(map(_component_matches, pattern, parts))


def _component_matches(pattern: str, part: str) -> bool:
    return pattern in ("*", part) or fnmatchcase(part, pattern)


def module_names(model: nn.Module) -> list[str]:
    """Every name of every module, `""` for the model itself: a shared module has several."""
    return [name for name, _ in model.named_modules(remove_duplicate=False)]


def names_of_one(model: nn.Module) -> list[list[str]]:
    """The names of each module that the model registers under several names (tied layers)."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def matching(key: str, names: Iterable[str]) -> list[str]:
    """The names that a key matches, in their order."""
    return [name for name in names if matches(key, name)]


def nearest(key: str, names: Iterable[str]) -> str | None:
    """The name that is most like a key which matches none; with `*` for numbers where the key has one."""
    known = {with_stars(name) for name in names if name} if "*" in key else set(filter(None, names))
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.65)
    return near[0] if near else None


def by_pattern(styles: dict[str, dict[str, Any]], names: list[str]) -> dict[str, Any]:
    """Keys with `*` for a number where every module of the model that the pattern matches has the same style."""
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_key[with_stars(name)].append(name)
    out: dict[str, Any] = {}
    for name in names:
        if name not in styles:
            continue
        key = with_stars(name)
        peers = by_key[key]
        # all peers, those without a style too: the key would give it to them
        same = len(peers) > 1 and all(styles.get(peer) == styles[name] for peer in peers)
        style = styles[name]
        out[key if same else name] = style["style"] if len(style) == 1 else style
    return out
