"""Private names of torch: how each is looked up, and the error when this torch has moved one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

TESTED = ("2.11", "2.13")
"""The releases of torch that the test suite runs on; `pyproject.toml` allows those between."""


class TorchMovedError(ImportError):
    """This torch has no such private name: install a release that colrow was tested with."""


@cache
def private(path: str, purpose: str) -> Any:
    """The object at `path`, `package.module:attribute.attribute`.

    Raises:
        TorchMovedError: this torch has none; the text names it and its purpose here.
    """
    module, _, attributes = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in attributes.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise TorchMovedError(
            f"torch {torch.__version__} has no {path.replace(':', '.')}, which colrow needs {purpose}: "
            f"install torch {TESTED[0]} to {TESTED[1]}"
        ) from error
    return found


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    """Within, a class or a module has other attributes. It must have them itself, not from a base."""
    before = {name: vars(owner)[name] for name in attributes}  # as stored: getattr would unwrap a staticmethod
    for name, value in attributes.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)
