"""Errors that a user can cause. Each says what was asked, what is wrong with it, and how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ColrowError(ValueError):
    """Base of every error that a user's input can cause; the command line prints it without a traceback."""


class ConfigError(ColrowError):
    """A config file, a flag, or a combination of both cannot be run."""


class PlanError(ColrowError):
    """A plan does not fit its model or its degree of tensor parallelism."""


class DataError(ColrowError):
    """A corpus, a tokenizer, or token shards cannot be used."""


class CheckpointError(ColrowError):
    """A checkpoint is missing, damaged, or of another model."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'steps'?` for the nearest known name, or the list of names when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known names: {', '.join(names)}" if names else ""
