"""Cases of a table that are a further variant of a proof: `make test` leaves them out, `make test-all` runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest


def params(values: Iterable[Any], exhaustive: Callable[..., bool]) -> list[Any]:
    """The values for `parametrize`; those of which `exhaustive` is true run with --exhaustive only.

    A tuple is a test's several parameters, and `exhaustive` takes as many.
    """
    found = []
    for value in values:
        args = value if isinstance(value, tuple) else (value,)
        found.append(pytest.param(*args, marks=pytest.mark.exhaustive if exhaustive(*args) else ()))
    return found


def collected(request: pytest.FixtureRequest, *names: str) -> list[tuple[Any, ...]]:
    """The values of these parameters in the requesting module's tests that are collected, each once, in order."""
    found: dict[tuple[Any, ...], None] = {}
    for item in request.session.items:
        case = getattr(item, "callspec", None)
        if item.path == request.path and case and set(names) <= case.params.keys():
            found[tuple(case.params[name] for name in names)] = None
    return list(found)
