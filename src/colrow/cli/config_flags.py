"""Words of a command as values: flags of `colrow train`, which are the keys of its config, and of the other verbs."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from colrow.config import RunConfig, shortened
from colrow.errors import ConfigError
from colrow.yaml_text import read_yaml

Takes = Callable[[list[str], str], bool]
"""Whether the next word belongs to a flag too, by the words that it has."""


def group_words(argv: Sequence[str], start: Callable[[str], tuple[str, list[str], Takes]]) -> dict[str, list[str]]:
    """The words of a command, by what they belong to. Where a flag is given twice, the last one counts, so that a
    script's command can be extended. It counts at its own place: of `--mesh.tp 4` and `--mesh auto` the later one does.

    Args:
        start: of a word that belongs to nothing before it: its name, the words that it brings, and what it takes.
    """
    given: dict[str, list[str]] = {}
    rest = deque(argv)
    while rest:
        name, words, takes = start(rest.popleft())
        while rest and takes(words, rest[0]):
            words.append(rest.popleft())
        given.pop(name, None)  # a dict keeps the place of a key's first entry: that of the last one counts
        given[name] = words
    return given


def read_flags(argv: Sequence[str]) -> dict[str, Any]:
    """`--mesh.tp 4 --train.betas 0.9 0.95` as overrides for `load_config`: values are read as in the YAML file.

    Raises:
        ConfigError: a word belongs to no flag, a flag has no value, or has several where its key takes one.
    """
    given = group_words(argv, _key_of)
    return {key: _flag_value(key, words) for key, words in given.items()}


_TRUST = "model.trust_code"


def _key_of(word: str) -> tuple[str, list[str], Takes]:
    if not is_flag(word):
        raise ConfigError(f"{shortened(word)} belongs to no flag: write --KEY VALUE")
    name, has_value, value = word[2:].partition("=")
    key = name.replace("-", "_")
    key = _TRUST if key == "trust_code" else key  # as for the other verbs
    # all words up to the next flag: of surplus ones the error says what they follow
    return key, [value] if has_value else [], lambda words, word: not is_flag(word)


def _flag_value(key: str, words: list[str]) -> Any:
    if not words and key == _TRUST:
        return True
    if not words:
        raise ConfigError(f"--{key[:24]} has no value: write --KEY VALUE")
    kinds = _kinds_of(key)
    values = [flag_value(word, kinds, f"--{key}") for word in words]
    # one word of a key that takes several is a list of one, unless it is written as a list or as null
    if len(values) == 1 and (tuple not in kinds or isinstance(values[0], list) or values[0] is None):
        return values[0]
    if kinds and tuple not in kinds:
        raise ConfigError(f"--{key} takes one value (given: {' '.join(words)}): put text with spaces in quotes")
    return values


def is_flag(word: str) -> bool:
    """Whether a word of a command names a flag: `--prompt "-- a list"` and `--seed -1` have values."""
    return re.match(r"--[^\W\d][\w.-]*(=|$)", word) is not None


def flag_value(word: str, kinds: Set[Any], flag: str) -> Any:
    """The value of a flag that a word of a command stands for, read as in the YAML file.

    Args:
        kinds: as `kinds_of` gives them.

    Raises:
        ConfigError: it is not YAML, or a number that is not finite.
    """
    # surrogates: Python's form of bytes in the command that are not UTF-8
    if kinds & {str, Literal} and any("\ud800" <= char <= "\udfff" for char in word):
        raise ConfigError(f"{flag}: its text is not UTF-8")
    if word in ("None", "null") and (not kinds or type(None) in kinds):
        return None
    is_list = tuple in kinds and word.lstrip().startswith("[")
    if kinds & {str, Path, Literal} and not is_list:  # text stays text: a folder may be called 2026
        return word
    return read_yaml(word, f"{flag} {shortened(word)}", ConfigError)


def _kinds_of(key: str) -> set[Any]:
    """What the annotation of a dotted key allows: `{int, NoneType}`; empty for a key that there is none of."""
    annotation: Any = RunConfig
    for part in key.split("."):
        fields = getattr(annotation, "model_fields", {})
        if part not in fields:
            return set()
        annotation = fields[part].annotation
    return kinds_of(annotation)


def kinds_of(annotation: Any) -> set[Any]:
    """The types that an annotation allows, without their arguments: `{int, NoneType}`, `{tuple}`, `{Literal}`.

    Of a tuple of texts or of paths they have the elements' type too: `{tuple, str}`.
    """
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    options = tuple(get_args(option)[0] if get_origin(option) is Annotated else option for option in options)
    elements = {get_args(option)[0] for option in options if get_args(option)[:1] in ((str,), (Path,))}
    return {get_origin(option) or option for option in options} | elements
