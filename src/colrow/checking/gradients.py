"""The third layer: gradients that would be wrong though the loss is exact.

Found from what the tensors of the dry run's backward are (see [Note: equal and varying] in `dryrun.values`), not from
names: a norm is right without a style where its input is replicated, and wrong where it is a shard.
"""

from __future__ import annotations

from collections.abc import Iterator

from colrow.checking.finding import Finding, finding
from colrow.dryrun.module_tracker import LOSS
from colrow.dryrun.result import DryRun


def check_gradients(run: DryRun, tp: int) -> list[Finding]:
    """Replicated parameters with partial gradients, gradients counted tp times, and parameters with none."""
    if run.reference_failure is not None or run.failure is not None:
        return []
    return [*_partial(run, tp), *_none(run)]


def _partial(run: DryRun, tp: int) -> Iterator[Finding]:
    earlier = any(
        mismatch.problem in ("varying_as_replicate", "equal_as_shard") and not mismatch.backward
        for mismatch in run.mismatches
    )
    if earlier:
        return  # the activations are wrong already, and so are their gradients
    # a sum that is wrong in forward has a wrong backward too, which is no second mistake
    summed = ("equal_summed", "addend_summed")
    follows = any(mismatch.problem in summed and not mismatch.backward for mismatch in run.mismatches)
    for mismatch in run.mismatches:
        where = mismatch.param or mismatch.where or "model"
        if not mismatch.backward or where == LOSS:
            continue
        if mismatch.problem == "varying_as_replicate" and mismatch.param:
            message = "each rank's gradient comes from its shard of the activations, and nothing sums them over tp"
            yield finding("CR501", where, message, _style_that_sums(run, mismatch.where, tp))
        elif mismatch.problem == "varying_as_replicate":
            message = "the gradient of an activation differs between ranks and is declared replicate"
            fix = "use to_local(grad_placements=[Partial()]) here, or a style that reduces it (prepare_input)"
            yield finding("CR504", where, message, fix)
        elif mismatch.problem == "equal_as_partial":
            message = "every rank has the complete gradient, and the style sums them over tp"
            yield finding("CR502", where, message, "give the module style replicate, or leave it out of the plan")
        elif mismatch.problem in summed and not follows:
            message = "a gradient that is summed over tp already, or equal on all ranks, is summed here again"
            fix = "sum it in one place: inside a block or after a gather use styles that leave the sum to it"
            yield finding("CR502", where, message, fix)


def _style_that_sums(run: DryRun, module: str, tp: int) -> str:
    """Style `sequence` for a module on sequence shards; `grad_sum` for one on a shard of the heads or features."""
    got, want = run.outputs.get(module), run.reference_outputs.get(module)
    if got and want and len(got[0].shape) == 3 and (got[0].shape[1] * tp == want[0].shape[1] or got[0].is_dtensor):
        return f"give {module} the style sequence, or grad_sum if it is no norm"
    return f"give {module} the style grad_sum"


def _none(run: DryRun) -> Iterator[Finding]:
    for name in run.no_gradient:
        message = "it gets a gradient in the unsharded model and none under the plan"
        yield finding("CR503", name, message, "check the styles of the module that uses it")
