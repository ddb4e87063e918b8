"""The styles with their options as Markdown, from their classes; `docs/guide/styles.md` has it."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Any

from colrow.styles.base import STYLES, Style
from colrow.styles.fast.linear import FastLinear
from colrow.styles.local_block import BlockShards
from colrow.styles.packed import ColumnSegments

_SHARED = {
    "ColumnSegments": (ColumnSegments, "segments of output features"),
    "FastLinear": (FastLinear, "how matmuls run"),
    "BlockShards": (BlockShards, "parameters and slices of a block"),
}
"""Classes of options that several styles have, and what their section is called."""


def reference() -> str:
    """Sections for the options that styles share, then one for each style."""
    shared = [_section(title[0].upper() + title[1:], cls) for cls, title in _SHARED.values()]
    return "\n\n".join([*shared, *(_section(f"`{name}`", STYLES[name]) for name in sorted(STYLES))])


def _section(title: str, cls: type[Any]) -> str:
    parts = [f"### {title}", _linked(inspect.cleandoc(cls.__doc__ or ""))]
    if torch_class := getattr(cls, "torch_class", None):
        parts.append(f"torch's `{torch_class.__name__}`.")
    if options := _options(cls):
        parts.append(f"Options: {', '.join(options)}.")
    return "\n\n".join(parts)


def _options(cls: type[Any]) -> list[str]:
    """`name` or `name: default` as a plan's file has them, without those of every style."""
    common = {field.name for field in dataclasses.fields(Style)}
    texts = []
    for field in dataclasses.fields(cls):
        default = field.default
        if field.name in common:
            continue
        unset = default in (None, "", ()) or default is dataclasses.MISSING  # nothing to print behind the name
        value = str(default).lower() if isinstance(default, bool) else default
        texts.append(f"`{field.name}`" if unset else f"`{field.name}: {list(value) if value == (0,) else value}`")
    return texts


def _linked(text: str) -> str:
    """With links in the place of class names, and without references to notes in the code."""
    text = re.sub(r" ?\(?\[Note: [^]]*\]\)?", "", text)
    for name, (_, title) in _SHARED.items():
        text = re.sub(rf"`(packed\.)?{name}`", f"[{title}](#{title.replace(' ', '-')})", text)
    return text.replace("`FastGather`", "[`fast_gather`](#fast_gather)")


if __name__ == "__main__":
    print(reference())
