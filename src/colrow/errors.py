"""Errors that a user can cause. Each says what was requested, what is wrong with it, and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import overload


class ColrowError(ValueError):
    """Base of every error that a user's input can cause; the command line prints it without a traceback."""


class ConfigError(ColrowError):
    """A config file, a flag, or a combination of both cannot be run."""


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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'steps'?` for the nearest known name, or the list of names when none is near."""
    names = sorted(known)
    near = [known for known in names if sorted(known) == sorted(name)]  # `pt` for `tp`: too short for a ratio
    near = near or [known for known in difflib.get_close_matches(name, names, cutoff=0.65) if _is_close(name, known)]
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known names: {', '.join(names)}" if names else ""


def _is_close(name: str, known: str) -> bool:
    """Whether few characters differ: a ratio alone takes `bogus` for `gpus`."""
    longest = max(len(name), len(known))
    same = sum(block.size for block in difflib.SequenceMatcher(None, name, known).get_matching_blocks())
    return longest - same <= max(1, longest // 3)
