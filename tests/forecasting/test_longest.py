"""The search for the longest sequence that fits, on made-up memory."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from colrow.forecasting.choices import largest_that_fits
from colrow.forecasting.forecast import MARGIN

GPU, UNIT, LIMIT = 80.0, 256, 131_072


def longest(needed: Callable[[int], float]) -> int:
    """Where a step of so many tokens needs so much memory."""

    def row(tokens: int) -> Any:
        memory = SimpleNamespace(needed=needed(tokens))
        fits = memory.needed <= (1 - MARGIN) * GPU
        return SimpleNamespace(memory=memory, fits=fits, free=GPU - memory.needed, device=SimpleNamespace(memory=GPU))

    return largest_that_fits(row, 4 * UNIT, UNIT, LIMIT)


@pytest.mark.parametrize("floor", [0.0, 20.0, 60.0])
def test_a_peak_that_few_tokens_do_not_move_is_passed(floor: float) -> None:
    found = longest(lambda tokens: max(floor, 10 + tokens / 1000))
    room = (1 - MARGIN) * GPU
    assert 10 + found / 1000 <= room < 10 + (found + UNIT) / 1000


def test_a_peak_that_few_tokens_move_a_little_is_passed_too() -> None:
    """Their slope would lead to a step of millions of tokens, whose walk takes minutes."""
    asked: list[int] = []

    def needed(tokens: int) -> float:
        asked.append(tokens)
        return max(30 + tokens / 1e6, 10 + tokens / 1000)

    found = longest(needed)
    assert 10 + found / 1000 <= (1 - MARGIN) * GPU < 10 + (found + UNIT) / 1000
    assert max(asked) <= 2 * found
    assert len(asked) < 30


def test_a_model_whose_memory_does_not_grow_fits_to_its_limit() -> None:
    assert longest(lambda tokens: 20.0) == LIMIT
    assert longest(lambda tokens: 90.0) == 0
