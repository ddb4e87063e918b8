"""The check: what is wrong with a plan for a model, before anything runs and without a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import nn

from colrow.checking.buffers import check_buffers
from colrow.checking.dynamic import OF_CODE, check_dynamic
from colrow.checking.finding import CODES, Code, Finding, Severity, finding, finding_of
from colrow.checking.gradients import check_gradients
from colrow.checking.options import check_options
from colrow.checking.static import check_stages, check_static, fused_suspects
from colrow.checking.unproven import check_unproven
from colrow.dryrun.block_kinds import BlockTraces
from colrow.dryrun.calls import GivenInputs, Loss, default_loss
from colrow.dryrun.dry_run import dry_run_of, traces_of_step
from colrow.dryrun.lockstep import unproven_operators
from colrow.dryrun.planned_step import PlannedStep
from colrow.dryrun.result import DryRun
from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.parallel.parallelize import is_parallel
from colrow.plans.patterns import with_stars
from colrow.plans.plan import Plan

__all__ = ["CODES", "Code", "Finding", "Severity", "check", "check_dynamic", "check_gradients", "check_static"]


class Findings(list[Finding]):
    """Findings, errors first.

    Attributes:
        flops_split: the share of the forward's floating-point operations that the plan splits, where a dry run saw it.
    """

    flops_split: float | None = None


def check(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh,
    batch_size: int = 1,
    seq_len: int = 512,
    *,
    inputs: GivenInputs | None = None,
    loss: Loss = default_loss,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> Findings:
    """What is wrong with `plan` for `model` on `mesh`: errors first, an empty list for a sound plan.

    The static layer runs first. When it finds no error, a dry run on fake tensors follows, with the rules on
    activations, communication and gradients. When that finds no error either, every operator on a shard has to be
    proven (CR414). The model may be on the meta device, and is not changed.

    Args:
        batch_size: sequences on one rank.
        inputs: example arguments, positional or a mapping by name; unless given, what the model takes by
            [Note: example inputs].
        loss: of the model's output, as the model returns it, and the inputs. By default next-token cross entropy, or a
            weighted sum of an output that is not logits, plus the scalars of the output (auxiliary losses).
        param_dtype, reduce_dtype: of FSDP2's mixed precision, where you use it: the dtype that the model computes in,
            and the one in which you expect gradients to be summed.
        compiled: each block will be compiled with `torch.compile`.
    """
    step = PlannedStep(model, plan, mesh.tp, batch_size, seq_len, inputs, loss, param_dtype)
    return _checked(step, mesh, reduce_dtype, compiled)


def _checked(
    step: PlannedStep,
    mesh: Mesh,
    reduce_dtype: torch.dtype | None = None,
    compiled: bool = False,
    traces_of: Callable[[PlannedStep], BlockTraces] = traces_of_step,
) -> Findings:
    model, plan = step.model, step.plan
    found = check_static(model, plan, mesh.tp, step.seq_len) + check_stages(model, mesh.pp)
    flops_split = None
    if is_parallel(model):
        if not _errors(found):
            message = "modules of the model are parallelised already, and a dry run begins with a plain model"
            found.append(finding("CR410", "model", message, "check the keys of all calls together, as one plan"))
    elif not _errors(found) and mesh.tp > 1:
        try:
            run = dry_run_of(step, traces_of, judged=True)
        except PlanError as error:
            found.append(finding_of(error, f"plan {plan.name}"))
            return _ordered(found)
        flops_split = run.flops_split(mesh.tp)
        known = {f.code for f in found} & {"CR302"}  # the static layer names the head, the dry run only the loss
        found += [f for f in _from_run(model, plan, mesh.tp, run) if f.code not in known]
        found += check_options(run, reduce_dtype, compiled)
        suspects = [f for f in found if f.severity == "error" and f.code in OF_CODE]
        others = [f for f in found if f not in suspects]
        if not _errors(others) and run.reference_failure is None:
            unproven = run.unproven
            if unproven is None:
                unproven = unproven_operators(replace(step, dtype=run.dtype))
            found = others + check_unproven(unproven, suspects)
    return _ordered(found, flops_split)


def check_step(step: PlannedStep, traces_of: Callable[[PlannedStep], BlockTraces] = traces_of_step) -> Findings:
    """`check` of the plan of a step, on a mesh of tp alone. `traces_of`: as `dry_run_of` takes it."""
    return _checked(step, Mesh(tp=step.tp), traces_of=traces_of)


def _ordered(found: list[Finding], flops_split: float | None = None) -> Findings:
    ordered = Findings(sorted(_collapse(found), key=lambda f: f.severity != "error"))
    ordered.flops_split = flops_split
    return ordered


def _from_run(model: nn.Module, plan: Plan, tp: int, run: DryRun) -> list[Finding]:
    seen = [*check_dynamic(run, plan, tp), *check_gradients(run, tp), *check_buffers(run)]
    if run.reference_failure is not None:  # without a dry run, names are the only sign of fused weights
        seen += [replace(suspect, severity="warning") for suspect in fused_suspects(model, plan)]
    return seen


def _errors(found: Iterable[Finding]) -> bool:
    return any(f.severity == "error" for f in found)


def _collapse(found: list[Finding]) -> list[Finding]:
    """One finding for what is the same in every layer, with `*` for the layer's number."""
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for f in found:
        groups[f.code, with_stars(f.where)].append(f)
    collapsed = []
    for members in groups.values():
        first, pattern = members[0], _pattern([f.where for f in members])
        message, fix = first.message, first.fix
        parent, parent_pattern = first.where.rpartition(".")[0], pattern.rpartition(".")[0]
        for name, stars in ((first.where, pattern), (parent, parent_pattern)):  # a parameter's fix names its module
            if name:
                message, fix = message.replace(name, stars), fix.replace(name, stars)
        collapsed.append(replace(first, where=pattern, message=message, fix=fix))
    return collapsed


def _pattern(names: list[str]) -> str:
    """The names as one, with `*` for the components in which they differ."""
    columns = zip(*(name.split(".") for name in names), strict=True)
    return ".".join(column[0] if len(set(column)) == 1 else "*" for column in columns)
