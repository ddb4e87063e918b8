"""`colrow verify MODEL --plan P --tp N`: loss, gradients and a step of the sharded and of the unsharded model."""

from __future__ import annotations

import math
import multiprocessing
from dataclasses import dataclass
from typing import Any, Literal

from colrow.cli.flags import PlanFlags, parse
from colrow.cli.text import Terminal, print_json
from colrow.verifying.report import Report, Verdict
from colrow.verifying.verify import verify

EXIT_STATUS: dict[Verdict, int] = {"proved": 0, "wrong": 1, "inconclusive": 3}
_VERDICTS: dict[Verdict, str] = {
    "proved": "[green]proved: the sharded model computes the same[/]",
    "wrong": "[bold red]wrong: the sharded model does not compute the same[/]",
    "inconclusive": "[yellow]inconclusive: no error found, but none of a model broken on purpose either[/]",
}


@dataclass(frozen=True)
class Flags(PlanFlags):
    """Prove that the sharded model computes the same loss, gradients and step as one process does."""

    backend: Literal["auto", "local", "gloo"] = "auto"
    """local simulates the ranks in this process, gloo starts a process for each."""


def main(argv: list[str]) -> int:
    """Exit 0 when the plan is proved right, 1 when it is wrong, 2 for bad usage, 3 when inconclusive."""
    flags = parse(Flags, "verify", argv)
    multiprocessing.set_forkserver_preload(["colrow.verifying.backends"])  # imported once, not by each rank
    from colrow.dryrun.calls import vocabulary
    from colrow.dryrun.reduced_model import reduced_model

    model, reduced = reduced_model(flags.load_model(), flags.tp)
    inputs = flags.load_inputs()
    if inputs is not None and reduced is not None:
        inputs = inputs.within(vocabulary(model))
    plan = flags.load_plan(model)
    report = verify(model, plan, flags.tp, backend=flags.backend, inputs=inputs, vary=True)
    if flags.json:
        print_json(_finite(report.to_data() | {"reduced": reduced}))
    else:
        show(report, reduced, f"plan {plan.name} for {flags.model} at tp={flags.tp}", Terminal(highlight=False))
    return EXIT_STATUS[report.verdict]


def show(report: Report, reduced: str | None, title: str, console: Terminal) -> None:
    """The report for a terminal."""
    worst = report.worst
    ranks = "simulated ranks" if report.backend == "local" else "processes over gloo"
    lines = [f"{title}: {report.parameters} parameters, {report.tp} {ranks}, {report.seconds:.1f} s"]
    if reduced is not None:
        lines.append(f"reduced model with the same modules: {reduced}")
    if report.failure:
        lines.append(f"{'the sharded model raises' if report.verdict == 'wrong' else 'no ranks'}: {report.failure}")
    else:
        lines += [
            f"  loss       {report.loss_rel_err:.1e} relative error",
            f"  gradients  {report.max_grad_rel_err:.1e} at most" + (f", {worst[0].name}" if worst else ""),
            f"  one step   {report.max_step_rel_err:.1e} at most, of any parameter",
            f"  next loss  {report.next_loss_rel_err:.1e} relative error",
            *([f"  buffers    {report.max_buffer_rel_err:.1e} at most"] if report.max_buffer_rel_err else []),
            f"  tolerance  {report.tolerance:.0e}",
            f"  compared   in {' and in '.join(report.modes)} mode{', dropout off' if report.dropout_off else ''}",
            *(f"             with {values}" for values in report.values),
            *([f"  training   the model itself raises {report.training_failure}"] if report.training_failure else []),
        ]
    if worst and report.max_grad_rel_err > report.tolerance:
        lines.append("largest errors of gradients:")
        lines += [f"  {w.rel_err:.1e}  {w.name}{', ranks differ' if w.ranks_differ else ''}" for w in worst]
    if report.cause:
        lines.append(f"likely cause: {report.cause}")
    if report.control is not None:
        lines.append(f"negative control: {report.control.change}")
        found = "found" if report.control.caught else "NOT found"
        lines.append(f"  {found}, error {report.control.rel_err:.1e}")
    elif report.verdict == "inconclusive" and not report.failure:
        lines.append("negative control: no change was found that makes this model wrong")
    for line in lines:
        console.say(line)
    no_ranks = report.failure and report.verdict == "inconclusive"
    console.print("[yellow]inconclusive: nothing was compared[/]" if no_ranks else _VERDICTS[report.verdict])


def _finite(value: Any) -> Any:
    """Infinities as null: JSON has none."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
