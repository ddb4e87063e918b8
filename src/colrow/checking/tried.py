"""Fixes that were tried: of the changes that could end a finding, the first with which the check finds no error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import yaml
from torch import nn

from colrow.checking.check import Findings, check_step
from colrow.checking.finding import NOT_PROVEN, Finding
from colrow.dryrun.planned_step import PlannedStep
from colrow.plans.patterns import matches, matching, module_names, with_stars
from colrow.plans.plan import Plan

_MOST = 2
"""Findings whose fixes are tried: each try costs a dry run."""
_SPLIT_EMBEDDING = {"style": "rowwise", "input": "replicate", "output": "shard(1)"}
_LEFT_OUT = None
Change = dict[str, Any]
"""New styles by key of the plan; `_LEFT_OUT` takes the key away."""


def with_tried_fixes(step: PlannedStep, found: Findings) -> Findings:
    """What `check_step` has found, where the fix of some codes is a change of the plan that leaves no other error.

    Where there is none, their fix stays what it is.
    """
    tried = [f for f in found if f.code in _CANDIDATES and f.severity == "error"][:_MOST]
    advised = Findings(_tried(f, step, found) if f in tried else f for f in found)
    advised.flops_split = found.flops_split
    return advised


def _tried(finding: Finding, step: PlannedStep, found: Findings) -> Finding:
    known = {(f.code, f.where) for f in found if f is not finding}
    for change in _CANDIDATES[finding.code](step.model, finding.where):
        plan = _changed(step.plan, step.model, change)
        if plan is not None and not any(
            f.severity == "error" and f.code not in NOT_PROVEN and (f.code, f.where) not in known
            for f in check_step(replace(step, plan=plan))
        ):
            return replace(finding, fix=_text(change, finding.where))
    return finding


def _changed(plan: Plan, model: nn.Module, change: Change) -> Plan | None:
    """None where one key of the plan names other modules too."""
    modules, names = dict(plan.modules), module_names(model)
    for place, style in change.items():
        meant = matching(place, names)
        for key in [key for key in modules if any(matches(key, name) for name in meant)]:
            if not set(matching(key, names)) <= set(meant):
                return None
            del modules[key]
        if style is not _LEFT_OUT:
            modules[place] = style
    return replace(plan, modules=modules)


def _text(change: Change, where: str) -> str:
    texts = []
    for key, style in change.items():
        name = "the module" if where == key else key
        if style is _LEFT_OUT:
            texts.append(f"leave {name} out of the plan")
        else:
            # of a bare name safe_dump ends the document too: "sequence\n...\n"
            written = yaml.safe_dump(style, default_flow_style=True, sort_keys=False, width=1000)
            texts.append(f"give {name} the style {written.removesuffix('...' + chr(10)).strip()}")
    return " and ".join(texts)


def _of_wrong_class(model: nn.Module, where: str) -> Iterator[Change]:
    yield {where: "sequence"}
    yield {where: _SPLIT_EMBEDDING}
    yield {where: {**_SPLIT_EMBEDDING, "output": "replicate"}}
    yield {where: _LEFT_OUT}


def _of_replicated_input(model: nn.Module, where: str) -> Iterator[Change]:
    embeddings = {with_stars(name) for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    yield dict.fromkeys(sorted(embeddings), _SPLIT_EMBEDDING)
    yield {where: "replicate"}


def _of_written_buffer(model: nn.Module, where: str) -> Iterator[Change]:
    for dim in (1, 2, 0):  # [B, T, D], [B, D, T] of convolutions and batch norms, flattened tokens
        shard = f"shard({dim})"
        inward = {"input": [shard], "desired": ["replicate"], "use_local_input": True}
        outward = {"output": "replicate", "desired_output": shard}
        yield {where.rpartition(".")[0]: {"style": "prepare_input_output", **inward, **outward}}


_CANDIDATES: dict[str, Callable[[nn.Module, str], Iterator[Change]]] = {
    "CR206": _of_wrong_class,
    "CR406": _of_replicated_input,
    "CR415": _of_written_buffer,
}
