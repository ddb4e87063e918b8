"""`colrow verify MODEL --plan P --tp N`: the sharded model's numbers beside the unsharded one's, on a CPU."""

from __future__ import annotations

import json
import math
import multiprocessing
import sys
from dataclasses import dataclass
from typing import Any, Literal

from rich.console import Console

from colrow.cli.flags import PlanFlags, parse
from colrow.cli.text import wrapped
from colrow.verifying.verify import Report, verify


@dataclass(frozen=True)
class Flags(PlanFlags):
    """Prove that the sharded model computes the same loss, gradients and step as one process does."""

    backend: Literal["auto", "local", "gloo"] = "auto"
    """local simulates the ranks in this process, gloo starts a process for each."""


def main(argv: list[str]) -> int:
    """Exit 0 when the numbers agree, 1 when not, 2 for bad usage."""
    flags = parse(Flags, "verify", argv)
    multiprocessing.set_forkserver_preload(["colrow.verifying.backends"])  # imported once, not by each rank
    from colrow.dryrun.reduced_model import reduced_model

    model, shrunk = reduced_model(flags.load_model(), flags.tp)
    plan = flags.load_plan(model)
    report = verify(model, plan, flags.tp, backend=flags.backend)
    if flags.json:
        json.dump(_finite(report.to_data() | {"twin": shrunk}), sys.stdout, indent=1)
        print()
    else:
        show(report, shrunk, f"plan {plan.name} for {flags.model} at tp={flags.tp}", Console(highlight=False))
    return 0 if report.ok else 1


def show(report: Report, shrunk: str | None, title: str, console: Console) -> None:
    """The report for a terminal."""
    worst = report.worst
    ranks = "simulated ranks" if report.backend == "local" else "processes over gloo"
    lines = [f"{title}: {report.parameters} parameters, {report.tp} {ranks}, {report.seconds:.1f} s"]
    if shrunk is not None:
        lines.append(f"small twin of the same modules: {shrunk}")
    if report.failure:
        lines.append(f"the sharded model raises: {report.failure}")
    else:
        lines += [
            f"  loss       {report.loss_rel_err:.1e} relative error",
            f"  gradients  {report.max_grad_rel_err:.1e} at most" + (f", {worst[0].name}" if worst else ""),
            f"  one step   {report.max_step_rel_err:.1e} at most, of any parameter",
            f"  tolerance  {report.tolerance:.0e}",
        ]
    if worst and report.max_grad_rel_err > report.tolerance:
        lines.append("the gradients that are furthest off:")
        lines += [f"  {w.rel_err:.1e}  {w.name}{', ranks differ' if w.ranks_differ else ''}" for w in worst]
    if report.cause:
        lines.append(f"usually: {report.cause}")
    if report.control is not None:
        seen = "found" if report.control.caught else "NOT found: this proof says nothing"
        lines.append(f"control: the plan broken on purpose ({report.control.change}) is {seen}, "
                     f"error {report.control.rel_err:.1e}")  # fmt: skip
    for line in lines:
        console.print(wrapped(line, console.width), markup=False, soft_wrap=True)
    console.print("[green]the numbers agree[/]" if report.ok else "[bold red]the numbers do not agree[/]")


def _finite(value: Any) -> Any:
    """JSON knows no infinity: a null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
