"""What a derived plan does for one model of a package: run in the environment of the model's group.

    ENVIRONMENT/bin/python -m benchmarks.models.foreign.judge GROUP --tp 2 4 [--models KEY ...]

Prints a line of JSON for each model and degree. The verdicts are

    useful        at least 60% of the parameters are split, the plan is proved, and the check finds no error
    little        proved, and less is split
    nothing       nothing is split
    unproven      no error is found, and none in plans broken on purpose either
    refused       derive, check or verify say in one line why there is no plan
    not built     the package does not build the model, or does not run it
    fails         an exception that is no message
    WRONG         the check finds an error, or loss or a gradient differs: must never stand in the table
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.models.apart import Row, run_all
from benchmarks.models.foreign.registry import GROUPS, models_of
from colrow.derive.judged import derive_judged
from colrow.dryrun.calls import Inputs
from colrow.errors import ColrowError
from colrow.plans.plan import Plan
from colrow.plans.split_share import SplitShare
from colrow.verifying.verify import verify

ATTENTION = re.compile("attention|attn|mha", re.IGNORECASE)


def examine(group: str, key: str, degrees: Sequence[int], phase: Callable[[str], None]) -> Iterator[Row]:
    """A row for each degree."""
    found = next(each for each in models_of(group) if each.key == key)
    row: Row = {"model": key, "package": found.package, "name": found.name, "field": found.field}
    phase("building")
    torch.manual_seed(0)
    try:
        model, given = found.build()
        inputs = Inputs.of(given)
        with torch.no_grad():
            model.eval()(**inputs.given) if inputs.names else model(*inputs)
        model.train()
    except Exception as error:
        yield from (row | {"tp": tp, "verdict": "not built", "reason": _line(error)} for tp in degrees)
        return
    for tp in degrees:
        phase(f"deriving tp={tp}")
        yield row | {"tp": tp} | judged(model, inputs, tp)


def judged(model: nn.Module, inputs: Inputs, tp: int) -> Row:
    """The verdict at one degree."""
    start = time.process_time()
    row: Row = {}
    try:
        found = derive_judged(model, tp, inputs=inputs)
        plan: Plan = found.plan()
        row["seconds"] = round(time.process_time() - start, 1)
        share = SplitShare.of(model, plan, tp)
        row |= {"share": round(share.split, 3), "attention": attention_split(model, plan, tp)}
        row["reason"] = "; ".join(why for _, _, why in share.rest[:1]) if share.split < 0.9 else ""
        findings = found.judgement.findings if found.judgement is not None else ()
        errors = [f for f in findings if f.severity == "error"]
        if errors:
            return row | {"verdict": "WRONG", "reason": str(errors[0])}
        if not share.split:
            return row | {"verdict": "nothing"}
        report = verify(model, plan, tp, inputs=inputs)
    except ColrowError as error:
        return row | {"verdict": "refused", "reason": _line(error)}
    except Exception as error:
        return row | {"verdict": "fails", "reason": _line(error)}
    if report.verdict == "wrong":
        return row | {"verdict": "WRONG", "reason": report.failure or report.cause}
    if report.verdict == "inconclusive":
        return row | {"verdict": "unproven", "reason": report.failure or row["reason"]}
    return row | {"verdict": "little" if share.is_small else "useful"}


def attention_split(model: nn.Module, plan: Plan, tp: int) -> float | None:
    """The share of the attention's parameters that is split; None for a model without attention."""
    layouts, split, total = plan.parameters(model, tp), 0, 0
    inside = [f"{name}." for name, module in model.named_modules() if name and ATTENTION.search(type(module).__name__)]
    for name, param in model.named_parameters():
        if any(name.startswith(scope) for scope in inside):
            total += param.numel()
            split += param.numel() * (layouts[name].local_shape != tuple(param.shape))
    return round(split / total, 3) if total else None


def _line(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, ColrowError):
        return text
    return f"{type(error).__name__}: {(text.splitlines() or [''])[0]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.foreign.judge")
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument("--tp", type=int, nargs="+", default=[2])
    parser.add_argument("--models", nargs="*", help="as PACKAGE/NAME; all of the group unless given")
    parser.add_argument("--limit", type=int, default=240, help="seconds of CPU for one model and degree")
    parser.add_argument("--budget", type=float, default=float("inf"), help="start no model after so many seconds")
    given = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    keys: list[Any] = [each.key for each in models_of(given.group)]
    jobs = [(key, given.tp) for key in keys if given.models is None or key in given.models]
    for rows in run_all(jobs, partial(examine, given.group), limit=given.limit * len(given.tp), budget=given.budget):
        for row in rows:
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
