"""The bare proof: a model as it is, under a plan, on simulated ranks, beside itself unsharded."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from colrow.dryrun.calls import Loss, default_loss
from colrow.plans.plan import Plan
from colrow.verifying.backends import run_local
from colrow.verifying.sharded import Errors, compare
from colrow.verifying.step import Task, reference_step


def parity(model: nn.Module, plan: Plan, tp: int, inputs: tuple[Any, ...], loss: Loss = default_loss) -> Errors:
    """One forward, backward and optimizer step on the CPU, in evaluation mode and the model's own dtype.

    Raises:
        PlanError: the plan does not fit, or ranks cannot be simulated here.
        RankFailure: the sharded model raises.
    """
    task = Task(copy.deepcopy(model).eval(), inputs, loss, tp)
    reference = reference_step(task, copy.deepcopy(task.model))
    return compare(run_local(task, plan), reference, tp)
