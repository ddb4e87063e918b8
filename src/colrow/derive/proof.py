"""A plan's proof on a reduced model of the same layers: what settles a plan that the check cannot."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from colrow.derive.derivation import derive
from colrow.dryrun.calls import Inputs, vocabulary
from colrow.dryrun.lockstep import unproven_operators
from colrow.dryrun.planned_step import PlannedStep
from colrow.dryrun.reduced_model import reduced_model
from colrow.errors import PlanError
from colrow.plans.derive_options import DeriveOptions, Styles
from colrow.plans.patterns import with_stars
from colrow.plans.plan import Plan
from colrow.verifying.reduced_plan import counts_sizes, plan_for_reduced, same_but_for_sizes
from colrow.verifying.report import Report
from colrow.verifying.verify import verify

SEQ_LEN, BATCH_SIZE = 64, 4
"""Most tokens in a sequence, and most sequences: fp64 attention over a run's context would take minutes."""


def prove(step: PlannedStep, *, reduced: nn.Module | None = None, unproven: bool = False, vary: bool = False) -> Report:
    """`verify` of the plan on `reduced`, or on the reduced model that the model's family gives.

    Args:
        step: of the run. At most BATCH_SIZE sequences of SEQ_LEN tokens are taken, and all tokens where the model does
            not run on fewer.
        unproven: whether check has left operators unproven at the run's sizes. Where some of them do not run on so few
            tokens, a proof on these says nothing of them: all tokens are taken.
        vary: as `verify` takes it.

    Raises:
        PlanError: there is no such model, the plan cannot be carried over to it, or it does not run on a CPU.
    """
    model, plan, tp, seq_len = step.model, step.plan, step.tp, step.seq_len
    small, changes = reduced_model(model if reduced is None else reduced, tp)
    if reduced is not None:
        changes = f"{type(small).__name__} of model.reduced"
    # in fp64, of few short sequences: what is wrong with a plan is wrong at any size, but for the cases below
    fitted = _fitted(plan, model, small, tp)
    short = seq_len if seq_len <= SEQ_LEN else max(SEQ_LEN // tp, 1) * tp
    few = min(step.batch_size, BATCH_SIZE)
    given = None if step.inputs is None else Inputs.of(step.inputs)
    if given is not None and small is not model:
        given = given.within(vocabulary(small))

    def batch(sequences: int, length: int) -> Inputs | None:
        return given.map(lambda x: x[:sequences, :length]) if given and _are_token_ids(given) else given

    def proved(length: int) -> Report:
        given = batch(few, length)
        return verify(small, fitted, tp, inputs=given, loss=step.loss, batch_size=few, seq_len=length, vary=vary)

    def unproven_at(of: nn.Module, by: Plan, sequences: int, length: int) -> set[tuple[str, str]]:
        at = PlannedStep(of, by, tp, sequences, length, batch(sequences, length), step.loss)
        return {(each.operator, each.line) for each in unproven_operators(at)}

    report = None
    try:
        report = proved(short)
    except PlanError:
        if short == seq_len:
            raise
    # the model may need the run's length: a table of positions that it adds, for one
    if short < seq_len and (report is None or report.training_failure):
        short = seq_len
        report = proved(short)
    assert report is not None
    if unproven and report.ok and (few < step.batch_size or short < seq_len):
        missed = unproven_at(model, plan, step.batch_size, seq_len) - unproven_at(small, fitted, few, short)
        if missed:
            few = step.batch_size
            report = proved(seq_len)
    return replace(report, reduced=changes)


def _are_token_ids(inputs: Inputs) -> bool:
    integers = (torch.int32, torch.int64)
    return all(isinstance(x, Tensor) and x.dtype in integers and x.dim() == 2 for x in inputs)


def _fitted(plan: Plan, model: nn.Module, small: nn.Module, tp: int) -> Plan:
    """The plan for the reduced model. Sizes in options cannot be carried over; a derived plan is derived once more."""
    fitted = plan_for_reduced(plan, model, small)
    if small is model or not counts_sizes(plan):
        return fitted
    names = {style.name for style in plan.modules.values()}
    styles: tuple[Styles, ...] = ("fast", "overlap") if any(n.startswith("fast_") for n in names) else ("plain",)
    for kind, kept in itertools.product(styles, ((), _unsharded_matrices(plan, model, small, tp))):
        try:
            options = DeriveOptions(styles=kind, loss=plan.loss, keep_whole=kept)
            derived: Plan = derive(small, tp, options=options).plan(plan.name)
        except PlanError:
            continue
        if same_but_for_sizes(derived, fitted, small):
            return derived
    return fitted


def _unsharded_matrices(plan: Plan, model: nn.Module, small: nn.Module, tp: int) -> tuple[str, ...]:
    """Matrices of the reduced model that the plan leaves unsharded in the model: a user may have wanted that."""
    layouts = plan.parameters(model, tp)
    unsharded = {with_stars(name) for name, layout in layouts.items() if layout.placement.is_replicate()}
    return tuple(name for name, param in small.named_parameters() if param.dim() > 1 and with_stars(name) in unsharded)
