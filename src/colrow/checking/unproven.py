"""The last layer: operators of which nothing says that they are right on a shard (CR414), and log-softmaxes of split
logits whose gradients are wrong (CR305).

The other layers know mistakes that people make, and explain them. This one knows what is right, and lists the rest
([Note: proven operators] in `sharding.shard_rules`). So it finds what nobody thought of, and may list what is right.
"""

from __future__ import annotations

from collections.abc import Sequence

from colrow.checking.dynamic import FIX_LOG_SOFTMAX
from colrow.checking.finding import Finding, finding
from colrow.dryrun.unproven import Unproven

FIXES = {
    "CR305": FIX_LOG_SOFTMAX,
    "CR413": "name the dims, or gather what is before it; of `amax()`, whose backward does this, use `max()`",
    "CR414": (
        "gather what it needs before it, or leave the layers before it out of the plan; `colrow verify` settles it"
    ),
}


def check_unproven(found: Sequence[Unproven], suspects: Sequence[Finding] = ()) -> list[Finding]:
    """Findings on operators, layouts and gradients; one for each module and kind.

    Args:
        found: what `lockstep.unproven_operators` lists.
        suspects: errors in the model's own code, which are returned instead where the step computes with something
            that is not proven. Where it does not, they are of values that nothing needs: of a statistic that is only
            logged, say.
    """
    if suspects and any(unproven.is_used for unproven in found):
        return list(suspects)
    return [finding(each.code, each.where or "model", _message(each), FIXES[each.code]) for each in found]


def _message(unproven: Unproven) -> str:
    if unproven.code != "CR414":
        return unproven.reason
    line = f" at {unproven.line}" if unproven.line else ""
    dim = "" if unproven.dim is None else f" on a shard of dim {unproven.dim}"
    return f"{unproven.operator}{dim}{line} is not proven: {unproven.reason}"
