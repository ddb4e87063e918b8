"""Negative controls: changes that make a sharded model wrong, to show that the comparison would see it.

A comparison that finds no error proves nothing unless it can find one. A change need not matter for every model, so
several are tried: a gradient that is not summed, one that is summed too often, an activation that is not summed, and
two ranks' shards of a weight exchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import torch
from torch import nn
from torch.distributed.tensor import Partial, Replicate

from colrow.errors import PlanError
from colrow.plans.plan import Plan
from colrow.sharding.layout import Region, regions_at
from colrow.sharding.parameter_state import copied_model
from colrow.styles.base import ParameterLayout, Style, style_from_data
from colrow.styles.linear import Rowwise
from colrow.styles.replicated import LEFT_OUT
from colrow.verifying.backends import RankFailure
from colrow.verifying.comparison import Observed, Reference, compare
from colrow.verifying.report import Control
from colrow.verifying.step import Task

Case = tuple[str, Task, Plan]
"""What was changed, and the task and plan with the change."""


def negative_control(
    task: Task, plan: Plan, reference: Reference, limit: float, run: Callable[[Task, Plan], Observed]
) -> Control | None:
    """The first change whose error the comparison finds, else the last that was tried; None if there is none to try.

    A change with which the sharded model raises is passed over: it shows nothing about the comparison.
    """
    last: Control | None = None
    task = replace(task, next_forward=False)
    for change, changed_task, changed_plan in _cases(task, plan):
        try:
            error = compare(run(changed_task, changed_plan), reference, task.tp).worst
        except (RankFailure, PlanError):
            continue
        last = Control(change, error, error > 100 * limit)  # far above: a control near the limit would prove little
        if last.caught:
            break
    return last


def _cases(task: Task, plan: Plan) -> Iterator[Case]:
    """At most two changes of each type: the comparison of each costs a sharded step."""
    first_names = dict(task.model.named_modules())  # one name a module: a change under one of two would contradict
    styles = {fqn: style for fqn, style in plan.styles_of(task.model).items() if fqn in first_names}
    layouts = plan.parameters(task.model, task.tp)
    changes = (
        *islice(_other_styles(task.model, styles, layouts, sums_gradients=True), 2),
        *islice(_other_styles(task.model, styles, layouts, sums_gradients=False), 2),
        *islice(_reductions_left_out(styles), 2),
    )
    for change, fqn, style in changes:
        yield change, task, replace(plan, modules={**styles, fqn: style}, name="broken")
    for change, model in islice(_shards_exchanged(task.model, layouts, task.tp), 2):
        yield change, replace(task, model=model), plan


def _other_styles(
    model: nn.Module, styles: dict[str, Style], layouts: dict[str, ParameterLayout], *, sums_gradients: bool
) -> Iterator[tuple[str, str, Style]]:
    """Styles that do, or do not, sum the gradients of their replicated parameters, with another in their place."""
    for fqn, module in _trained(model):
        style = styles.get(fqn, LEFT_OUT)
        control = style.negative_control
        if control is None or style.sums_gradients is not sums_gradients:
            continue
        names = [f"{fqn}.{name}" for name, param in module.named_parameters(recurse=False) if param.requires_grad]
        if all(layouts[name].placement.is_replicate() for name in names):
            yield f"{fqn}: {control.change}", fqn, style_from_data(control.style, fqn)


def _reductions_left_out(styles: dict[str, Style]) -> Iterator[tuple[str, str, Style]]:
    for fqn, style in styles.items():
        if isinstance(style, Rowwise) and style.output in (None, Replicate()) and style.use_local_output:
            yield f"{fqn}: the sum over tp of its output left out", fqn, replace(style, output=Partial())


def _shards_exchanged(
    model: nn.Module, layouts: dict[str, ParameterLayout], tp: int
) -> Iterator[tuple[str, nn.Module]]:
    """The model with the shards of ranks 0 and 1 of one weight exchanged. The plan then gives each the other's."""
    for name, param in model.named_parameters():
        layout = layouts[name]
        if param.requires_grad and layout.placement.is_shard():
            first, second = (
                regions_at(tuple(param.shape), (layout.placement,), (tp,), (rank,), layout.packed) for rank in (0, 1)
            )
            # tp may not divide a vocabulary: then what both ranks have of it is exchanged
            sizes = [tuple(map(min, a.size, b.size)) for a, b in zip(first, second, strict=True)]
            if not any(map(math.prod, sizes)):
                continue
            changed = copied_model(model)
            with torch.no_grad():
                weight = changed.get_parameter(name)
                for a, b, size in zip(first, second, sizes, strict=True):
                    mine, theirs = Region(a.offset, size).slices, Region(b.offset, size).slices
                    weight[mine], weight[theirs] = param[theirs], param[mine]
            yield f"{name}: the shards of ranks 0 and 1 exchanged", changed


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules with trainable parameters of their own."""
    for fqn, module in model.named_modules():
        if fqn and any(param.requires_grad for param in module.parameters(recurse=False)):
            yield fqn, module
