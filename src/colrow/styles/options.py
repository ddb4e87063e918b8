"""An option of a style: a dataclass field that is read from, and written as, what a plan file holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError
from colrow.sharding.placements import format_placement, parse_placement


def option(convert: Callable[[Any], Any], default: Any = None, *, previous: str | None = None) -> Any:
    """An option of a style.

    Args:
        convert: makes the value out of what a plan file holds.
        previous: the option's name in plans of earlier releases: read for ever, never written.
    """
    # read by `Style.__post_init__` (convert) and `style_from_data` (previous)
    return dataclasses.field(default=default, metadata={"convert": convert, "previous": previous})


def integers_of(value: Any) -> tuple[int, ...] | None:
    """The option of several numbers."""
    return None if value is None else tuple(int(n) for n in value)


def placements_of(value: Any) -> tuple[Placement | None, ...] | None:
    """The option of several tensors' placements; a single one stands for one tensor."""
    if value is None:
        return None
    return tuple(parse_placement(item) for item in (value if isinstance(value, tuple | list) else (value,)))


def named_placements_of(value: Any) -> dict[str, Placement | None] | None:
    """The option of keyword arguments' placements."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise PlanError(f"keyword layouts are a mapping from argument to placement, not {value!r}")
    return {str(key): parse_placement(item) for key, item in value.items()}


def names_of(value: Any) -> tuple[str, ...]:
    """The option of several names."""
    if not isinstance(value, list | tuple):
        raise TypeError("several names are a list")
    return tuple(value)


def plain(value: Any) -> Any:
    """The value of an option as a plan file holds it."""
    if isinstance(value, Placement):
        return format_placement(value)
    if isinstance(value, tuple | list):
        return ["none" if item is None else plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
