"""Styles by module name to styles by pattern."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch import nn

from colrow.plans.patterns import with_stars


def compress(styles: dict[str, dict[str, Any]], model: nn.Module) -> dict[str, Any]:
    """Keys with `*` for a number where every module that the pattern matches has the same style."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    by_key: dict[str, list[str]] = defaultdict(list)
    for name in names:
        by_key[with_stars(name)].append(name)
    out: dict[str, Any] = {}
    for name in names:
        if name not in styles:
            continue
        key = with_stars(name)
        peers = by_key[key]
        same = len(peers) > 1 and all(styles.get(peer) == styles[name] for peer in peers)
        style = styles[name]
        out[key if same else name] = style["style"] if len(style) == 1 else style
    return out
