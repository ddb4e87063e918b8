"""A sample of the composed models (`benchmarks/composed`): the check against two ranks in fp64; `make composed` runs
more."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest

from benchmarks.composed.compose import Case, compose
from benchmarks.composed.judge import MOST_DRAWS, Counts, Row, ids_of, judged
from benchmarks.composed.truth import Truth, truths
from helpers.harness import Ranks

CASES = {case.name: case for case in [*map(compose, range(34)), *(compose(seed, fast=True) for seed in range(6))]}
SAMPLE = {case.name for case in [*map(compose, range(20)), *(compose(seed, fast=True) for seed in range(4))]}


@pytest.fixture(scope="module")
def rows(request: pytest.FixtureRequest, ranks: Ranks) -> list[Row]:
    taken = CASES.keys() if request.config.getoption("--exhaustive") else SAMPLE
    found = on_ranks(ranks, [case for name, case in CASES.items() if name in taken])
    return [judged(case, truth, ask=False) for case, truth in found if truth.verdict in ("right", "wrong")]


def on_ranks(ranks: Ranks, cases: list[Case], draws: Sequence[int] = (0,)) -> list[tuple[Case, Truth]]:
    found: list[Truth] = ranks(2).run(truths, [(case, ids_of(case)) for case in cases], draws)[0]
    return list(zip(cases, found, strict=True))


@pytest.mark.distributed
def test_the_check_finds_the_wrong_plans_and_passes_the_right_ones(rows: list[Row], ranks: Ranks) -> None:
    counts = Counts.of(rows)
    assert counts.wrong >= len(rows) / 4
    assert counts.right >= len(rows) * 3 / 8
    missed = [row for row in rows if row.truth.verdict == "wrong" and not row.found]
    # Two ranks once called a right plan of seed 19 wrong, on one machine and never again (docs/log.md): so they are
    # asked twice, and a plan that they call wrong once is a warning.
    again = on_ranks(ranks, [CASES[row.case] for row in missed])
    for row, (_, second) in zip(missed, again, strict=True):
        warnings.warn(f"{row.case}: wrong by {row.truth}, then {second}", stacklevel=1)
    assert [case.name for case, second in again if second.verdict == "wrong"] == []
    assert len(missed) <= 1
    assert [row.case for row in rows if row.truth.verdict == "right" and row.errors] == []
    assert counts.right_unproven <= 1


@pytest.mark.distributed
def test_a_plan_that_is_right_for_some_numbers_alone_is_wrong(ranks: Ranks) -> None:
    """DTensor divides the gradient of `amax()` by how many elements are the largest on rank 0."""
    case = compose(9131)
    verdicts = {draw: on_ranks(ranks, [case], (draw,))[0][1].verdict for draw in range(MOST_DRAWS)}
    assert set(verdicts.values()) == {"right", "wrong"}
    assert on_ranks(ranks, [case], range(MOST_DRAWS))[0][1].verdict == "wrong"
    assert judged(case, Truth("wrong"), ask=False).errors


@pytest.mark.distributed
def test_a_run_starts_with_right_plans_alone(rows: list[Row]) -> None:
    """By the function with which `colrow train` decides: one plan of each kind that the check does not settle."""
    trained = [row for row in rows if CASES[row.case].train]
    wrong = next(row for row in trained if row.truth.verdict == "wrong" and not row.errors)
    right = next(row for row in trained if row.truth.verdict == "right" and not row.unproven)
    for row, accepted in ((wrong, False), (right, True)):
        assert judged(CASES[row.case], row.truth).accepted == accepted, row.case


@pytest.mark.distributed
def test_a_check_without_the_last_layer_misses_wrong_plans(rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control."""
    monkeypatch.setattr("colrow.checking.check.check_unproven", lambda *args: [])
    row = next(row for row in rows if row.truth.verdict == "wrong" and not row.errors)
    assert not judged(CASES[row.case], row.truth, ask=False).found
