"""Errors that a user can cause. Each says what was requested, what is wrong with it, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, overload


class ColrowError(ValueError):
    """Base of every error that a user's input can cause; the command line prints it without a traceback."""


class ConfigError(ColrowError):
    """A config file, a flag, or a combination of both cannot be run.

    `ConfigError("what is wrong", {"mesh.tp": 2}, {"mesh.tp": 4})` names changes, each of which ends this fault.
    `run.requirements.with_tried_advice` keeps those of them with which all else can run too.

    Attributes:
        message: what is wrong; without changes, also what to do.
        changes: new values by key of the config.
    """

    def __init__(self, message: str, *changes: dict[str, Any]) -> None:
        super().__init__(message, *changes)  # all of them: an error that crosses processes is made again from its args
        self.message, self.changes = message, changes

    def __str__(self) -> str:
        return f"{self.message}: {advice(self.changes)}" if self.changes else self.message


class PlanError(ColrowError):
    """A plan does not fit its model or its degree of tensor parallelism.

    `PlanError(code, where, message, fix)` names the finding that the check makes of it. `PlanError("text")` is for
    errors that no check reports, and for styles of the user's own: there the check reports CR211 at the module.

    Attributes:
        code: of the finding, such as CR203 (`checking.finding.CODES`); empty when only a text was given.
        where: a module, a parameter, a key of the plan, or `plan NAME`; may be empty.
        message: what is wrong.
        fix: what to change; may be empty.
    """

    @overload
    def __init__(self, message: str, /) -> None: ...
    @overload
    def __init__(self, code: str, where: str, message: str, fix: str, /) -> None: ...
    def __init__(self, *args: str) -> None:
        super().__init__(*args)  # all of them: an error that crosses processes is made again from its args
        self.code, self.where, self.message, self.fix = args if len(args) == 4 else ("", "", *args, "")

    def at(self, where: str) -> PlanError:
        """The same error at a place that whoever raised it did not know."""
        return PlanError(self.code, where, self.message, self.fix)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.message, self.fix) if part)


class PlacementError(ColrowError):
    """A tensor's placement does not allow what was requested of it."""


class DataError(ColrowError):
    """A corpus, a tokenizer, or token shards cannot be used."""


class CheckpointError(ColrowError):
    """A checkpoint is missing, damaged, or of another model."""


class ExportError(CheckpointError):
    """The Hugging Face format cannot hold a model: what would be written is not what its config.json describes."""


class AtMost(int):
    """A value of a change that may be smaller too."""

    def __str__(self) -> str:
        return f"{int(self)} or less" if self > 0 else "0"


def advice(changes: Sequence[dict[str, Any]]) -> str:
    """`set mesh.tp to 2 or 4, or plan to derive`; a value of None is the null of YAML."""
    texts = []
    for keys, group in groupby(changes, key=tuple):
        alternatives = list(group)
        if len(keys) == 1:
            *others, last = [_yaml(change[keys[0]]) for change in alternatives]
            texts.append(f"{keys[0]} to {', '.join(others)}{' or ' if others else ''}{last}")
        else:
            texts += [" and ".join(f"{key} to {_yaml(value)}" for key, value in each.items()) for each in alternatives]
    return f"set {', or '.join(texts)}"


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return str(list(value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def first_line(error: Exception) -> str:
    """The first line of an error's text; where it has none, the error's class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str], before: str = "") -> str:
    """`; did you mean 'steps'?` for the nearest known name, or the list of names when none is near.

    Args:
        before: what stands before the name where it is written, such as `train.`.
    """
    names = sorted(known)
    near = [known for known in names if sorted(known) == sorted(name)]  # `pt` for `tp`: too short for a ratio
    near = near or [known for known in difflib.get_close_matches(name, names, cutoff=0.65) if _is_close(name, known)]
    if near:
        return f"; did you mean {before + near[0]!r}?"
    return f"; known names: {', '.join(names)}" if names else ""


def _is_close(name: str, known: str) -> bool:
    """Whether few characters differ: a ratio alone takes `bogus` for `gpus`."""
    longest = max(len(name), len(known))
    same = sum(block.size for block in difflib.SequenceMatcher(None, name, known).get_matching_blocks())
    return longest - same <= max(1, longest // 3)
