"""Which operators give zeros: of an auxiliary loss with the weight 0, nothing is wrong that is computed on a shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colrow.sharding.local_call import Shape
from colrow.sharding.local_layout import REPLICATED, UNKNOWN, Layout, sharded
from colrow.sharding.operators import Linear, operator


def makes_zeros(func: Any, name: str, plain: Sequence[Any], zeros: Sequence[bool]) -> bool:
    """Whether an operator's result is zeros, wherever its inputs are finite.

    Args:
        name: of the operator, without its overload.
        plain: its arguments that are no tensors.
        zeros: of each of its tensors, in order, whether it is known to be zeros.
    """
    facts = operator(name)
    numbers = [leaf for leaf in plain if type(leaf) in (int, float)]
    if facts.linear is Linear.EACH and not facts.contracts and numbers == [0]:  # times the number 0
        return True
    if not any(zeros):
        return False
    if name.endswith(("_backward", "_backward_data")):  # a derivative is linear in the gradient
        return zeros[0] and "grad" in func._schema.arguments[0].name
    if facts.linear in (Linear.FIRST, Linear.NUMERATOR):
        return zeros[0]
    if facts.linear is Linear.EACH:
        return len(zeros) <= 2  # a bias may follow
    if facts.linear is Linear.TERMS:
        return all(zeros) and not (facts.addends and len(zeros) < 2)
    return name.rstrip("_") == "masked_fill" and zeros[0] and numbers == [0]


def layout_of_zeros(here: Shape, there: Shape, ranks: int) -> Layout:
    """Of zeros of the shape `here` where the unsharded model has zeros of the shape `there`."""
    if len(here) != len(there):
        return UNKNOWN
    differing = [d for d, (a, b) in enumerate(zip(here, there, strict=True)) if a != b]
    if not differing:
        return REPLICATED
    is_shard = len(differing) == 1 and here[differing[0]] * ranks == there[differing[0]]
    return sharded(differing[0]) if is_shard else UNKNOWN
