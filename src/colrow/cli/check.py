"""`colrow check MODEL --plan P --tp N`: what is wrong with a plan, before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from colrow.checking.check import Finding, check_step
from colrow.checking.tried import with_tried_fixes
from colrow.cli.flags import PlanFlags, default_seq_len, parse
from colrow.cli.text import Terminal, print_json, show_share
from colrow.dryrun.planned_step import PlannedStep
from colrow.plans.split_share import SplitShare


@dataclass(frozen=True)
class Flags(PlanFlags):
    """Find what is wrong with a plan: names, sizes, layouts, communication, gradients. No GPU is needed."""

    batch_size: int = 1
    """Sequences on a rank."""
    seq_len: int | None = None
    """Tokens in a sequence; by default the model's context, at most 4096."""
    strict: bool = False
    """Exit 1 also where the check cannot prove that an operator's numbers are right (CR414)."""


def main(argv: list[str]) -> int:
    """Exit 0 without errors, 1 with (or, if strict, with unproven operators), 2 for bad usage."""
    flags = parse(Flags, "check", argv)
    flags.positive("batch_size", "seq_len")
    model = flags.load_model()
    plan = flags.load_plan(model)
    seq_len = flags.seq_len or default_seq_len(model, flags.tp, 4096)
    step = PlannedStep(model, plan, flags.tp, flags.batch_size, seq_len, flags.load_inputs())
    findings = with_tried_fixes(step, check_step(step))
    ok = not any(finding.severity == "error" or (flags.strict and finding.code == "CR414") for finding in findings)
    errors = any(finding.severity == "error" for finding in findings)
    share = None if errors else SplitShare.of(model, plan, flags.tp, findings.flops_split)
    if flags.json:
        data = {"ok": ok, "findings": [finding.to_data() for finding in findings]}
        print_json(data | {"split": share and share.to_data()})
    else:
        show(findings, f"plan {plan.name} for {flags.model} at tp={flags.tp}", Terminal(highlight=False))
        if share is not None:
            show_share(share, Terminal(highlight=False))
    return 0 if ok else 1


def show(findings: list[Finding], title: str, console: Terminal) -> None:
    """The findings for a terminal."""
    same = groupby(findings, key=lambda f: (f.code, f.message.replace(f.where, ""), f.fix.replace(f.where, "")))
    for _, group in same:  # one text for all modules with the same finding
        members = list(group)
        for finding in members:
            colour = "red" if finding.severity == "error" else "yellow"
            console.print(finding.lines[0], style=f"bold {colour}", markup=False, soft_wrap=True)
        for line in members[0].lines[1:]:
            console.say(line, 6)
    errors = sum(finding.severity == "error" for finding in findings)
    warnings = len(findings) - errors
    found = ", ".join(
        f"{n} {severity}{'' if n == 1 else 's'}" for n, severity in ((errors, "error"), (warnings, "warning"))
    )
    console.say(f"{title}: {found}")
