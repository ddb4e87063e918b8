"""The usual reason for a pattern of errors."""

from __future__ import annotations

from colrow.verifying.comparison import Errors, Observed, Reference


def likely_cause(errors: Errors, observed: Observed, reference: Reference, limit: float, tp: int) -> str:
    """One sentence; empty when every error is within `limit`."""
    if errors.worst <= limit:
        return ""
    # From what is certain to what is likely: each step leaves fewer causes for what was seen.
    buffers = [name for name, error in errors.buffers.items() if error > limit]
    if buffers and max([errors.loss, *errors.gradients.values()]) <= limit:
        return f"loss and gradients are exact, and each rank writes the buffer {buffers[0]} from its own shard"
    if errors.of_step <= limit:
        return (
            "a step is exact and the next forward is not: a module keeps a value of its rank's shard in an attribute, "
            "and uses it in the next forward"
        )
    bad = {name: error for name, error in errors.gradients.items() if error > limit}
    missing = [name for name in bad if name not in observed.gradients]
    if missing:
        return f"{missing[0]} gets no gradient under the plan: the module that uses it is cut off from the loss"
    if errors.loss > limit:
        return (
            "the loss itself differs: a fused weight split across its parts, a head count written into a view, or a "
            "layout that is declared wrongly (run `colrow check`)"
        )
    if not bad:
        return (
            "gradients agree and the parameters after a step do not: the optimizer does not get the model's parameters"
        )
    differ = [name for name in bad if observed.ranks_differ(name)]
    if differ and len(differ) == len(bad):
        return (
            f"the loss is exact and the ranks differ ({differ[0]}): a replicated parameter used on one rank's shard of "
            "the activations, such as a norm on sequence shards without style sequence, or a norm on local heads "
            "without style grad_sum"
        )
    times = [name for name in bad if name in reference.gradients and _is_times_tp(observed, reference, name, tp)]
    if times and len(times) == len(bad):
        return (
            f"the loss is exact and gradients are {tp} times too large ({times[0]}): summed over tp, but equal on all "
            "ranks"
        )
    if len(bad) == len(errors.gradients):
        return "the loss is exact and every gradient is wrong: the loss's own backward (log-softmax on split logits)"
    return "the loss is exact and some gradients are wrong: an activation's gradient is not reduced over tp"


def _is_times_tp(observed: Observed, reference: Reference, name: str, tp: int) -> bool:
    return abs(observed.gradients[name].ratio(reference.gradients[name]) - tp) < 1e-6
