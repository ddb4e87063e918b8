"""YAML that people write: one reader for configs and plans, which refuses what YAML itself lets pass."""

from __future__ import annotations

import math
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from colrow.errors import ColrowError

_MOST_BYTES = 16 << 20
_MOST_BRACKETS = 100
_MERGE = "tag:yaml.org,2002:merge"
_MOST_NODES = 1_000_000
"""The most nodes of a tree after aliases are expanded: the plan of a model with 100,000 modules has 600,000."""


def read_text(path: Path, kind: str, error: type[ColrowError], most_bytes: int = _MOST_BYTES) -> str:
    """The text of a file.

    Raises:
        error: the file cannot be read, is larger than `most_bytes`, or is not UTF-8.
    """
    refuse_endless(path, error)
    try:
        with path.open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as reason:
        raise error(f"cannot read {kind} {path}: {reason.strerror}") from reason
    except ValueError as reason:  # a NUL in its name
        raise error(f"cannot read {kind} {str(path)!r}: {reason}") from reason
    if len(data) > most_bytes:
        raise error(f"{kind} {path} is larger than {most_bytes >> 10:,} KiB, and no {kind} is: give another file")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise error(f"{kind} {path} is not UTF-8 text (byte {reason.start}): save it as UTF-8") from reason


def endless(path: Path) -> str:
    """What a path is whose text may never end or come, such as `a pipe`; empty for a file or a folder on a disk."""
    if path.is_fifo():
        return "a pipe"
    if path.is_char_device() or path.is_block_device():
        return "a device"
    if path.is_socket():
        return "a socket"
    # As it is written too: /proc/self/fd/3 may lead to a file on a disk, and is none in the ranks.
    if path.exists() and any(f"{name}/".startswith(_KERNELS) for name in (os.path.abspath(path), _real_path(path))):
        return "a file of the kernel"
    return ""


def refuse_endless(path: Path, error: type[ColrowError]) -> None:
    """Raise `error` for a pipe, a device such as /dev/zero, or a file of the kernel such as /proc/kmsg."""
    if what := endless(path):
        raise error(f"{path} is {what}: give a file on a disk")


_KERNELS = ("/proc/", "/sys/")


def _real_path(path: Path) -> str:
    """os.path.realpath; of 100,000 files of a corpus it would take many seconds to look at each one's folders."""
    if path.is_symlink():
        return os.path.realpath(path)
    return os.path.join(_real_folder(path.parent), path.name)


@lru_cache
def _real_folder(folder: Path) -> str:
    return os.path.realpath(folder)


def read_yaml(text: str, source: str, error: type[ColrowError]) -> Any:
    """The plain values in a YAML text; `source` names it in errors.

    Raises:
        error: it is not YAML, a key stands twice, a number is not finite, or it is nested or repeated without bounds.
    """
    if _bracket_depth(text) > _MOST_BRACKETS:  # PyYAML needs more than a second to run out of stack
        raise error(f"{source} is nested too deeply: write it flat")
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_bounded(node)
            _require_single_keys(node, loader)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError as reason:
        raise error(f"{source} is nested too deeply: write it flat") from reason
    except _Refused as reason:
        raise error(f"{source}: {reason}") from reason
    except (yaml.YAMLError, ValueError, TypeError) as reason:  # ValueError: a date such as 2026-02-31
        raise error(f"{source} is not YAML: {_one_line(reason)}") from reason
    except (LookupError, AttributeError) as reason:  # PyYAML's own, of `!!bool maybe`, `!!int ""`, `!!timestamp x`
        raise error(
            f"{source} is not YAML: a value is none of its tag (!!int and the like): leave tags out"
        ) from reason


def _bracket_depth(text: str) -> int:
    """The most brackets open at once; those in quotes count too, so the limit is far above what people write."""
    depth = deepest = 0
    for found in re.finditer(r"[\[\]{}]", text):
        depth = depth + 1 if found[0] in "[{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest


class _Refused(Exception):
    """Valid YAML that is a mistake here, or an attack."""


class _Loader(yaml.SafeLoader):
    """YAML reads `.inf`, and takes `010` for 8 and `1:30` for 90."""

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value = float(super().construct_yaml_float(node))
        if ":" in node.value:
            raise _misread(node, value)
        if not math.isfinite(value):
            raise _Refused(f"line {node.start_mark.line + 1} holds {node.value}: give a finite number")
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if (digits := len(node.value)) > _MOST_DIGITS:
            raise _Refused(f"line {node.start_mark.line + 1} holds a number of {digits:,} digits: give a smaller one")
        value = int(super().construct_yaml_int(node))
        if ":" in node.value or re.match(r"[+-]?0[\d_]*[1-9]", node.value):
            raise _misread(node, value)
        return value


def _misread(node: yaml.ScalarNode, value: float) -> _Refused:
    """The error for `010`, which YAML 1.1 reads in base 8, and `1:30`, which it reads in base 60."""
    return _Refused(
        f"line {node.start_mark.line + 1} holds {node.value}, which YAML reads as {value}: write {value}, or put it in "
        "quotes"
    )


_MOST_DIGITS = 4000
"""Python itself refuses more than 4,300, for reading them takes long."""

_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _require_bounded(root: yaml.Node) -> None:
    """Refuse aliases that contain themselves, or that repeat a few lines a billion times."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise _Refused(f"the alias in line {node.start_mark.line + 1} contains itself: write the values")
        if (known := sizes.get(id(node))) is not None:
            return known
        open_nodes.add(id(node))
        total = 1
        if isinstance(node, yaml.MappingNode):
            total += sum(size(key) + size(value) for key, value in node.value)
        elif isinstance(node, yaml.SequenceNode):
            total += sum(size(value) for value in node.value)
        open_nodes.discard(id(node))
        sizes[id(node)] = total
        return total

    if size(root) > _MOST_NODES:
        raise _Refused(f"aliases repeat its values more than {_MOST_NODES:,} times: write the values")


def _require_single_keys(root: yaml.Node, loader: _Loader) -> None:
    """Refuse keys that stand twice, of which YAML lets the later one replace the earlier in silence.

    Before any mapping is constructed: that puts the keys of a merge (`<<: *base`) beside those which override them.
    """
    nodes, visited = [root], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key_node, value in node.value:
                key = "<<" if key_node.tag == _MERGE else loader.construct_object(key_node, deep=True)
                if isinstance(key, (list, dict, set)):
                    raise _Refused(f"a key is a {type(key).__name__}: write a name")
                if key in seen:
                    fix = "merge a list, <<: [*first, *second]" if key == "<<" else "keep one"
                    raise _Refused(f"the key {key!r} stands twice: {fix}")
                seen.add(key)
                nodes.append(value)
        elif isinstance(node, yaml.SequenceNode):
            nodes.extend(node.value)


def _one_line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if problem is None:
        return " ".join(str(error).split())
    return f"{problem}{'' if mark is None else f' (line {mark.line + 1}, column {mark.column + 1})'}"
