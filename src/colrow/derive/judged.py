"""Derive a plan that the check and, where that leaves something unproven, a proof find nothing wrong with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from colrow.checking.check import Finding, check
from colrow.checking.finding import NOT_PROVEN
from colrow.derive.derivation import Derivation, derive
from colrow.derive.proof import prove
from colrow.dryrun.calls import GivenInputs, Loss, default_loss
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.plans.patterns import with_stars
from colrow.plans.plan import Plan


@dataclass(frozen=True)
class Objection:
    """Why a derived plan is given up, and the modules or parameters at fault, `*` for the number of every layer."""

    why: str
    places: tuple[str, ...]

    def concerns(self, parameter: str) -> bool:
        """Whether the parameter is at fault, or belongs to a module that is, or to one that holds what is."""
        owner = f"{with_stars(parameter).rpartition('.')[0]}."
        places = [f"{with_stars(place)}." for place in self.places]
        return any(owner.startswith(place) or place.startswith(owner) for place in places)


def derive_judged(
    model: nn.Module, tp: int, *, inputs: GivenInputs | None = None, loss: Loss = default_loss, **options: Any
) -> Derivation:
    """`derive` of a plan that the check does not refuse. What fails is given up: first the sequence shards, then the
    classes of the modules at fault; `Derivation.refused` has the reasons.

    Args:
        options: of `derive`.
    """
    known: dict[str, Objection | None] = {}

    def judge(plan: Plan) -> Objection | None:
        text = plan.to_yaml()
        if text not in known:
            known[text] = objection(model, plan, tp, inputs, loss)
        return known[text]

    return derive(model, tp, inputs=inputs, judge=judge, **options)


def objection(
    model: nn.Module, plan: Plan, tp: int, inputs: GivenInputs | None = None, loss: Loss = default_loss
) -> Objection | None:
    """Errors of the check, or what it leaves unproven and verify finds wrong; None where there is neither."""
    found = check(model, plan, Mesh(tp=tp), 2, max(16 // tp, 1) * tp, inputs=inputs, loss=loss)
    errors = [f for f in found if f.severity == "error"]
    if errors:
        return _objection(errors, errors[0].message)
    unproven = [f for f in found if f.code in NOT_PROVEN]
    if not unproven:
        return None
    try:
        report = prove(model, plan, tp, inputs=inputs, loss=loss)
    except PlanError:  # too large, or it runs on no CPU: the plan stays unproven, and the check says so
        return None
    if report.verdict != "wrong":
        return None
    return _objection(unproven, f"{unproven[0].message}; verify: {report.failure or report.cause}")


def _objection(found: list[Finding], message: str) -> Objection:
    return Objection(f"{found[0].code} at {found[0].where}: {message}", tuple(f.where for f in found))
