"""A plan for a reduced model, from the plan for the model that it stands for."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from colrow.dryrun.block_kinds import module_kinds
from colrow.errors import PlanError
from colrow.models.blocks import block_stacks
from colrow.plans.patterns import is_within
from colrow.plans.plan import Plan
from colrow.styles.base import Style

_SIZES = {"segments", "heads", "kv_heads", "head_dim", "attributes", "sizes"}
"""Options that count features or heads of a module."""


def plan_for_reduced(plan: Plan, model: nn.Module, reduced: nn.Module) -> Plan:
    """The plan with the same style for each module of `reduced`, by its name in `model`.

    Raises:
        PlanError: the reduced model has other modules, or a block of the model has styles that none of its blocks has:
            a proof would not hold for the model.
    """
    if reduced is model:
        return plan
    # names and classes: sizes are what a reduced model changes
    if missing := {kind[:2] for kind in module_kinds(model)} - {kind[:2] for kind in module_kinds(reduced)}:
        name, cls = min(missing, key=str)
        raise PlanError(f"the reduced model has no {cls.__name__} called {name or 'model'}, and the model has one")
    styles = plan.styles_of(model)
    names = {name for name, _ in reduced.named_modules(remove_duplicate=False)}
    kept = {inside for _, inside in _named_blocks(reduced, styles)}
    for block, inside in _named_blocks(model, styles):
        if inside not in kept:
            raise PlanError(f"{block} has styles that no block of the reduced model has")
    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := sorted(names - known):
        raise PlanError(f"the reduced model has a module {unknown[0]}, and the model has none of this name")
    return replace(plan, modules={name: style for name, style in styles.items() if name in names})


def counts_sizes(plan: Plan) -> bool:
    """Whether a style's options hold sizes of the model, which a reduced model does not have."""
    return any(_SIZES & style.options().keys() for style in plan.modules.values())


def same_but_for_sizes(plan: Plan, other: Plan, model: nn.Module) -> bool:
    """Whether two plans for one model give each module the same style, with options that differ in sizes alone."""
    mine, others = (
        {name: _without_sizes(style) for name, style in each.styles_of(model).items()} for each in (plan, other)
    )
    return plan.loss == other.loss and mine == others


def _without_sizes(style: Style) -> Any:
    # of several sizes their number counts: a weight of three segments is no weight of two
    return style.name, {
        key: len(value) if key in _SIZES and isinstance(value, list | dict) else value
        for key, value in style.options().items()
        if key not in _SIZES or isinstance(value, list | dict)
    }


def _named_blocks(model: nn.Module, styles: Mapping[str, Style]) -> Iterator[tuple[str, Hashable]]:
    """Each block with its stack and the styles inside it."""
    for stack in block_stacks(model):
        for name, _ in stack.named_blocks():
            inside = {n.removeprefix(name): style for n, style in styles.items() if is_within(n, name)}
            yield name, (stack.name, repr(sorted(inside.items(), key=lambda item: item[0])))
