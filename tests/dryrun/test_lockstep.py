"""Operators are judged in the dry run's own runs where these are the step's, and in two more where they are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from colrow.dryrun.dry_run import dry_run_of
from colrow.dryrun.lockstep import unproven_operators
from colrow.dryrun.planned_step import PlannedStep
from colrow.plans.plan import Plan
from helpers import broken_models as m
from helpers.broken_plans import gpt_plan, llama
from helpers.unproven_models import Case
from helpers.unproven_plans import RIGHT, WRONG

CASES = {  # and how many operators are not proven
    "capped logits": (RIGHT["capped logits"], 0),
    "norm of features": (WRONG["norm of features"], 1),
    "shared by heads": (WRONG["scale shared by heads"], 1),
}


def step_of(case: Case) -> PlannedStep:
    return PlannedStep(case.model().train(case.train), case.plan(), 2, 4, 16)


@pytest.mark.parametrize("name", CASES)
def test_one_pair_of_runs_shows_what_two_pairs_show(name: str) -> None:
    case, unproven = CASES[name]
    step = step_of(case)
    together = dry_run_of(step, judged=True)
    assert together.unproven == unproven_operators(step)
    assert len(together.unproven) == unproven
    assert replace(together, unproven=None) == dry_run_of(step)


def test_runs_that_differ_stay_apart() -> None:
    plan = gpt_plan()
    shown = {
        "two sequences": PlannedStep(m.Gpt(), plan, 2, 2, 16),
        "one sequence": PlannedStep(m.Gpt(), plan, 2, 1, 16),
        "a block left out": PlannedStep(m.Gpt(layers=3), plan, 2, 2, 16),
        "flattened tokens": PlannedStep(llama(), Plan.preset("llama-fast"), 2, 2, 16),
    }
    together = [name for name, step in shown.items() if dry_run_of(step, judged=True).unproven is not None]
    assert together == ["two sequences"]
