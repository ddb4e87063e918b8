"""Flags of a verb from a dataclass: one place, so that every verb's help and errors look alike."""

from __future__ import annotations

from typing import TypeVar

import tyro

T = TypeVar("T")


def parse(flags: type[T], verb: str, argv: list[str]) -> T:
    """The flags in argv. Prints help and exits 0 for --help; names what is wrong and exits 2 for bad usage."""
    return tyro.cli(flags, prog=f"colrow {verb}", args=argv)
