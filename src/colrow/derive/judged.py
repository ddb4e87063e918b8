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

COLLECT_AFTER = 70_000
"""New objects in a derivation after which the collector of reference cycles runs: Python's default is 700."""


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
    seq_len = max(16 // tp, 1) * tp if seq_len is None else seq_len
    with _rare_collections(), Progress(f"deriving a plan for {type(model).__name__}", say) as progress:
        judge = _Judge(lambda plan: PlannedStep(model, plan, tp, batch_size, seq_len, inputs, loss), progress)
        progress.at("tracing")
        found = derive(model, tp, inputs=inputs, judge=judge.checked, prove=judge.proved, **options)
    found.judgement = judge.known(found.plan())
    return found


class _Judge:
    """What check, and then verify, say of plans for one step; of each once: `derive` asks again of some.

    Args:
        step_of: the step under a plan.
    """

    def __init__(self, step_of: Callable[[Plan], PlannedStep], progress: Progress) -> None:
        self._step_of, self._progress = step_of, progress
        self._findings: dict[str, Findings] = {}
        self._judgements: dict[str, Judgement] = {}
        self._unsharded: BlockTraces | None = None

    def checked(self, plan: Plan) -> Objection | None:
        """By the check alone."""
        return _of_errors(self._check(plan, _key(plan)))

    def proved(self, plan: Plan) -> Objection | None:
        """By the check, and by a proof of what that leaves unproven."""
        key = _key(plan)
        found = self._check(plan, key)
        if key not in self._judgements:
            self._judgements[key] = judgement(self._step_of(plan), found, self._progress)
            self._progress.at("tracing")
        return self._judgements[key].objection

    def known(self, plan: Plan) -> Judgement | None:
        """What `proved` has said of the plan; None where it was not asked."""
        return self._judgements.get(_key(plan))

    def _check(self, plan: Plan, key: str) -> Findings:
        if key not in self._findings:
            self._progress.at("checking a plan")
            self._findings[key] = check_step(self._step_of(plan), self._traces_of)
            self._progress.at("tracing")
        return self._findings[key]

    def _traces_of(self, step: PlannedStep) -> BlockTraces:
        """Of the same model and inputs under every plan."""
        if self._unsharded is None:
            self._unsharded = traces_of_step(step)
        return self._unsharded


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Within, the collector of reference cycles runs seldom: graphs are many objects that stay, and it would spend a
    tenth of a derivation's time on going through them again."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], COLLECT_AFTER), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _key(plan: Plan) -> str:
    return replace(plan, notes={}).to_yaml()


def judgement(step: PlannedStep, found: Findings, progress: Progress | None = None) -> Judgement:
    """Objects to errors among the check's findings, and to what these leave unproven and verify finds wrong."""
    if (objection := _of_errors(found)) is not None:
        return Judgement(objection, found)
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


def _of_errors(found: Findings) -> Objection | None:
    errors = [f for f in found if f.severity == "error"]
    return _objection(errors, _cause(errors[0])) if errors else None


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
