"""Derive a plan that the check and, where that leaves something unproven, a proof find nothing wrong with."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from colrow.checking.check import Finding, Findings, check_step
from colrow.checking.finding import NOT_PROVEN
from colrow.derive.derivation import derive
from colrow.derive.progress import Progress
from colrow.derive.proof import SEQ_LEN, prove
from colrow.derive.result import Derivation
from colrow.dryrun.block_kinds import BlockTraces
from colrow.dryrun.calls import GivenInputs, Loss, default_loss
from colrow.dryrun.dry_run import traces_of_step
from colrow.dryrun.planned_step import PlannedStep
from colrow.errors import PlanError
from colrow.plans.patterns import with_stars
from colrow.plans.plan import Plan
from colrow.verifying.report import Report


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


@dataclass(frozen=True)
class Judgement:
    """What check and verify say of a plan.

    Attributes:
        objection: why it is given up; None where it is not.
        findings: of the check.
        report: of verify; None where it was not run, or could not be.
    """

    objection: Objection | None
    findings: Findings
    report: Report | None = None


def derive_judged(
    model: nn.Module,
    tp: int,
    *,
    inputs: GivenInputs | None = None,
    loss: Loss = default_loss,
    batch_size: int = 2,
    seq_len: int | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> Derivation:
    """`derive` of a plan that the check does not refuse. What fails is given up: first the sequence shards, then the
    classes of the modules at fault; `Derivation.refused` has the reasons, and `Derivation.judgement` what was found in
    the plan in the end.

    Args:
        batch_size, seq_len: that the check runs, where no inputs are given.
        say: called with a line when this takes longer than `progress.FIRST` seconds, and then now and again.
        options: of `derive`.
    """
    # `derive` asks again of the same plan (the one without sequence shards, the last one): a check takes seconds
    known: dict[str, Judgement] = {}
    seq_len = max(16 // tp, 1) * tp if seq_len is None else seq_len
    unsharded: list[BlockTraces] = []

    def traces_of(step: PlannedStep) -> BlockTraces:  # of the same model and inputs under every plan
        if not unsharded:
            unsharded.append(traces_of_step(step))
        return unsharded[0]

    def judge(plan: Plan) -> Objection | None:
        key = _key(plan)
        if key not in known:
            progress.at("checking a plan")
            step = PlannedStep(model, plan, tp, batch_size, seq_len, inputs, loss)
            known[key] = judgement(step, progress, traces_of)
            progress.at("tracing")
        return known[key].objection

    with _rare_collections(), Progress(f"deriving a plan for {type(model).__name__}", say) as progress:
        progress.at("tracing")
        found = derive(model, tp, inputs=inputs, judge=judge, **options)
    found.judgement = known.get(_key(found.plan()))
    return found


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Within, the collector of reference cycles runs seldom: graphs are many objects that stay, and it would spend a
    tenth of a derivation's time on going through them again."""
    before = gc.get_threshold()
    gc.set_threshold(100 * before[0], *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _key(plan: Plan) -> str:
    return replace(plan, notes={}).to_yaml()


def judgement(
    step: PlannedStep,
    progress: Progress | None = None,
    traces_of: Callable[[PlannedStep], BlockTraces] = traces_of_step,
) -> Judgement:
    """Objects to errors of the check, and to what it leaves unproven and verify finds wrong."""
    found = check_step(step, traces_of)
    errors = [f for f in found if f.severity == "error"]
    if errors:
        return Judgement(_objection(errors, _cause(errors[0])), found)
    unproven = [f for f in found if f.code in NOT_PROVEN]
    if not unproven:
        return Judgement(None, found)
    if progress is not None:
        progress.at("verifying a plan")
    try:
        longer = replace(step, seq_len=max(step.seq_len, SEQ_LEN))
        report = prove(longer, unproven=any(f.code == "CR414" for f in unproven), vary=True)
    except PlanError:  # too large, or it runs on no CPU: the plan stays unproven, and the check says so
        return Judgement(None, found)
    if report.verdict != "wrong":
        return Judgement(None, found, report)
    cause = "the sharded model raises an error" if report.failure else report.cause
    why = f"{_cause(unproven[0])}; verify: {cause}"
    return Judgement(_objection(unproven, why), found, report)


_CAUSES = {
    "CR306": "the loss cannot be computed on split logits",
    "CR401": "its code fails on the shards that enter it",
    "CR402": "a plain tensor meets a DTensor in it",
    "CR403": "it is called with keyword arguments, which its style does not get",
    "CR404": "DTensor has no rule for an operation in it",
    "CR410": "the check cannot run it",
}
"""Of findings whose message quotes an exception, which is no reason to a reader of the plan; the check shows it."""


def _cause(found: Finding) -> str:
    return _CAUSES.get(found.code, found.message)


def _objection(found: list[Finding], message: str) -> Objection:
    return Objection(f"{found[0].code} at {found[0].where}: {message}", tuple(f.where for f in found))
