"""Whether a plan may train a model: what the check finds, and a proof where the check proves nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import nn

from colrow.checking.check import Finding, Findings, check_step
from colrow.checking.finding import NOT_PROVEN
from colrow.checking.tried import with_tried_fixes
from colrow.derive.judged import Judgement
from colrow.derive.proof import prove
from colrow.dryrun.block_kinds import runs_known_code
from colrow.dryrun.calls import GivenInputs, Loss, default_loss
from colrow.dryrun.planned_step import PlannedStep
from colrow.errors import ColrowError
from colrow.mesh import Mesh
from colrow.plans.plan import Plan, is_preset
from colrow.verifying.report import Report

Verify = Literal["auto", "always", "never"]


class Proofs(Protocol):
    """Where proofs are kept between starts of a run."""

    def find(self, say: Callable[[str], None]) -> bool:
        """Whether there is a proof that still counts; `say` gets what has changed since it was made."""

    def keep(self, report: Report) -> None:
        """Keep a proof."""


@dataclass(frozen=True)
class Decision:
    """Whether a plan may train a model.

    Attributes:
        findings: of the check, errors first.
        report: of verify; None where it was not run.
        refusal: why no run may start, and what to do; empty where it may.
        flops_split: the share of the forward's floating-point operations that the plan splits, where the check ran.
    """

    findings: tuple[Finding, ...]
    report: Report | None = None
    refusal: str = ""
    flops_split: float | None = None

    @property
    def accepted(self) -> bool:
        """Whether a run may start."""
        return not self.refusal


@dataclass(frozen=True)
class Start:
    """What one start of a run brings beside the model and its plan.

    Attributes:
        judgement: what the plan's derivation found at this batch and sequence length: it is not looked for again. A
            plan that was proved then is proved, unless `verify` is `always` or `build_reduced` is given.
        proofs: what was proved before, and where to keep a proof.
        say: called with a line before a proof that takes seconds, and one with its result.
        meanwhile: the end of the first line.
    """

    judgement: Judgement | None = None
    proofs: Proofs | None = None
    say: Callable[[str], None] = lambda line: None
    meanwhile: str = "in seconds"


def decide(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh,
    batch_size: int = 1,
    seq_len: int = 512,
    *,
    inputs: GivenInputs | None = None,
    loss: Loss = default_loss,
    name: str = "",
    stop_on_errors: bool = True,
    verify: Verify = "auto",
    build_reduced: Callable[[], nn.Module] | None = None,
    start: Start = Start(),
) -> Decision:
    """Decide as `colrow train` does before it starts ranks. No GPU and no process group is needed; none may be there.

    The check's errors refuse the plan. Then, with `verify: auto`, a plan is verified on a reduced model where the check
    leaves something unproven (CR414, or CR410: it could not run), or the model is not one of the project's own. It is
    accepted when the verdict is *proved*.

    Args:
        batch_size, inputs, loss: as `colrow.check` takes them. Of `inputs`, token ids are taken modulo the vocabulary
            of the reduced model.
        name: of the model in messages.
        stop_on_errors: whether the check's errors refuse the plan (`check: false` turns this off).
        verify: `always` and `never` as well.
        build_reduced: builds a smaller model of the same layers; unless given, the model's family gives one, or the
            model is taken as it is.
    """
    if mesh.tp == 1:
        return Decision(())
    case = _Case(PlannedStep(model, plan, mesh.tp, batch_size, seq_len, inputs, loss), name or type(model).__name__)
    own, found = is_own(model), Findings()
    # With `check: false` too, for CR414, which asks for a proof. Our presets on our models never have it.
    if stop_on_errors or (own and verify == "auto" and not is_preset(plan)):
        found = check_step(case.step) if start.judgement is None else start.judgement.findings
    if stop_on_errors and errors_found(found, case.title):
        found = with_tried_fixes(case.step, found)
        return Decision(tuple(found), refusal=errors_found(found, case.title))
    unproven = next((f for f in found if f.code in NOT_PROVEN), None)
    if verify == "never" or (verify == "auto" and own and unproven is None):
        return Decision(tuple(found), flops_split=found.flops_split)
    if start.proofs is not None and start.proofs.find(start.say):
        start.say(f"plan {plan.name} was proved at tp={mesh.tp} when the run was started before")
        return Decision(_settled(found), flops_split=found.flops_split)
    report = start.judgement.report if start.judgement and verify == "auto" and build_reduced is None else None
    if report is not None and report.verdict == "proved" and not report.training_failure:
        start.say(f"proved when the plan was derived: loss and {report.parameters} gradients are those of one process")
        decision = Decision(_settled(found), report, flops_split=found.flops_split)
    else:
        why = (
            f"{unproven.code} at {unproven.where}" if unproven else f"{case.name} is a model that nobody here has seen"
        )
        why = "verify: always" if verify == "always" else why
        start.say(f"{why}: a reduced model is verified at tp={mesh.tp}, {start.meanwhile}")
        decision = _proved(case, found, build_reduced, start.say)
    if start.proofs is not None and decision.accepted and decision.report is not None:
        start.proofs.keep(decision.report)
    return decision


def _proved(
    case: _Case, found: Findings, build_reduced: Callable[[], nn.Module] | None, say: Callable[[str], None]
) -> Decision:
    try:
        report = case.prove(build_reduced, found)
    except Exception as error:  # whatever stops the proof stops the run, and says what helps
        text = str(error) if isinstance(error, ColrowError) else f"{type(error).__name__}: {error}"
        return Decision(tuple(found), refusal=_not_proved(case.title, f"it could not be verified: {text}", found))
    if refusal := _refusal(case.title, report, found):
        return Decision(tuple(found), report, refusal)
    say(f"proved: loss and {report.parameters} gradients are those of one process ({report.seconds:.1f} s)")
    return Decision(_settled(found), report, flops_split=found.flops_split)


@dataclass(frozen=True)
class _Case:
    """The step that is checked and verified, and the model's name in messages."""

    step: PlannedStep
    name: str

    @property
    def title(self) -> str:
        return f"plan {self.step.plan.name} for {self.name} at tp={self.step.tp}"

    def prove(self, build_reduced: Callable[[], nn.Module] | None, found: Findings) -> Report:
        reduced = None if build_reduced is None else build_reduced()
        unproven = {f.code for f in found} & set(NOT_PROVEN)
        return prove(self.step, reduced=reduced, unproven="CR414" in unproven, vary=bool(unproven))


def is_own(model: nn.Module) -> bool:
    """Whether the model is one of the project's, with nothing of a user's in it: the project's tests cover it."""
    return type(model).__module__.startswith("colrow.models.") and runs_known_code(model)


def errors_found(found: Sequence[Finding], title: str) -> str:
    """The text that lists all findings when one of them is an error; else empty."""
    errors = sum(finding.severity == "error" for finding in found)
    if not errors:
        return ""
    head = f"the check found {errors} error{'s' if errors > 1 else ''} in {title}, and nothing was started"
    return "\n".join([head, *_lines(found), "(`--check False` leaves the decision to verify)"])


def _refusal(title: str, report: Report, found: Sequence[Finding]) -> str:
    """Why a verified plan may not train; empty where it is proved."""
    if report.verdict == "wrong":
        return _wrong(title, report, found)
    if report.training_failure:
        return _not_proved(title, f"in training mode the model itself raises {report.training_failure}", found)
    if report.verdict == "inconclusive":
        blind = "verify finds no error, and none in plans broken on purpose either"
        return _not_proved(title, f"it could not be verified: {report.failure}" if report.failure else blind, found)
    return ""


def _wrong(title: str, report: Report, found: Sequence[Finding]) -> str:
    what = f"the sharded model raises {report.failure}"
    if not report.failure:
        worst = f" ({report.worst[0].name})" if report.worst else ""
        buffer, after = report.max_buffer_rel_err, report.next_loss_rel_err
        what = (
            f"relative errors against one process, by verify: loss {report.loss_rel_err:.1e}, gradients "
            f"{report.max_grad_rel_err:.1e}{worst}"
            + (f", buffers {buffer:.1e}" if buffer > report.tolerance else "")
            + (f", loss after a step {after:.1e}" if after > report.tolerance else "")
        )
    fix = "correct the plan, or take plan: derive; `colrow verify` says more"
    head = f"{title} is wrong, and nothing was started"
    return "\n".join([head, _row("what", what), _row("why", report.cause), _row("fix", fix), *_lines(found)])


def _not_proved(title: str, what: str, found: Sequence[Finding]) -> str:
    lines = (
        f"{title} is not proved, and nothing was started",
        _row("what", what),
        "  fix   give verify a smaller model with the same layers,",
        "        model.reduced: package.module:callable,",
        "        or start without a proof, verify: never",
    )
    return "\n".join([*lines, *_lines(found)])


def _row(label: str, text: str) -> str:
    """A line of an error's text, in 80 columns."""
    indent = " " * 8
    return textwrap.fill(text, 80, initial_indent=f"  {label:4}  ", subsequent_indent=indent, break_on_hyphens=False)


def _settled(found: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings of a plan that is proved: without those that call something unproven."""
    return tuple(finding for finding in found if finding.code not in NOT_PROVEN)


def _lines(found: Sequence[Finding]) -> list[str]:
    return [line for finding in found for line in finding.lines]
