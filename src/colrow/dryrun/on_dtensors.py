"""What DTensor does wrong, or in another way than one process: operators that the two runs cannot take on trust.

[Note: gradients of a split loss]
Within torch's `loss_parallel`, the backward of `nll_loss` gives the gradient of the logits already, and the backward of
log-softmax is the identity (pytorch#190746). The identity is right for that gradient, and for one whose sum over the
classes is zero, as the gradient of logits is: a second log-softmax of log-probabilities changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from colrow.dryrun.numbered import Operation
from colrow.sharding.draws import draws_by_element, may_draw
from colrow.sharding.local_layout import PARTIAL, Kind, Layout
from colrow.sharding.operators import CUMULATIVE, Linear, argument_of, operator
from colrow.torch_compat import dtensor_handlers, tree_unflatten

UNMATCHED = "no cross entropy takes this log-softmax of split logits: its backward in the loss context is the identity"


class LossGradients:
    """Which gradients, by number, are those of `nll_loss`, and which sum to zero over the classes."""

    def __init__(self) -> None:
        self._of_cross_entropy: set[Any] = set()
        self._sum_to_zero: set[Any] = set()
        self._terms = _Terms()

    def ran(self, operation: Operation, results: Sequence[Any], zeros: set[Any]) -> str:
        """Note an operator with DTensors by its results' numbers; why it is wrong, or empty."""
        name, facts, by_loss = operation.name, operator(operation.name), operation.func in dtensor_handlers()
        inputs = {value.number for value in operation.values}
        found = {number for number in results if number is not None}
        self._sum_to_zero |= found if self._terms.cancel(operation, results) else set()
        known = self._of_cross_entropy | self._sum_to_zero | zeros
        if by_loss and name in ("nll_loss_backward", "nll_loss2d_backward"):
            self._of_cross_entropy |= found
        elif by_loss and name == "_log_softmax_backward_data":
            if operation.values[0].number not in known:
                return UNMATCHED
            self._sum_to_zero |= found
        elif self._of_cross_entropy & inputs:
            if not (facts.moves or facts.linear is Linear.TERMS) or not inputs <= known:
                return "a cross entropy takes split log-probabilities that are changed after their log-softmax"
            self._of_cross_entropy |= found
        elif self._sum_to_zero & inputs and (facts.moves or _scales(operation)):
            self._sum_to_zero |= found
        return ""


class _Terms:
    """What gradients sum to over the last dim, the classes: numbers with their factors, of gradients that are written
    to one class each. Those of a margin, `p[..., 1] - p[..., 0]` of log-probabilities, cancel."""

    def __init__(self) -> None:
        self._sums: dict[Any, Counter[Any]] = {}
        self._scaled: dict[Any, tuple[Any, float]] = {}

    def cancel(self, operation: Operation, results: Sequence[Any]) -> bool:
        """Note an operator by its results' numbers; whether its result sums to zero."""
        name, result = operation.name, results[0] if len(results) == 1 else None
        numbers = [value.number for value in operation.values]
        if result is None or None in numbers:
            return False
        if name == "select_backward":
            dim = argument_of(operation.func, "dim", *tree_unflatten(operation.leaves, operation.tree))
            if dim % operation.results[0].ndim == operation.results[0].ndim - 1:
                of, factor = self._scaled.get(numbers[0], (numbers[0], 1.0))
                self._sums[result] = Counter({of: factor})
        elif name == "neg" or (name == "mul" and len(numbers) == len(operation.numbers) == 1):
            of, factor = self._scaled.get(numbers[0], (numbers[0], 1.0))
            self._scaled[result] = of, factor * (-1.0 if name == "neg" else operation.numbers[0])
        elif name in ("add", "add_") and len(numbers) == 2 and all(number in self._sums for number in numbers):
            total = Counter(self._sums[numbers[0]])
            total.update(self._sums[numbers[1]])
            self._sums[result] = total
            return not any(total.values())
        return False


def _scales(operation: Operation) -> bool:
    """Whether it multiplies its one tensor by a number."""
    facts = operator(operation.name)
    return facts.rule == "elementwise" and facts.linear not in (None, Linear.TERMS) and len(operation.values) == 1


def takes_all_for_none(operation: Operation, layout: Layout) -> bool:
    """Whether it runs over an empty list of dims, which means all, and DTensor leaves its `layout` sharded: each rank
    computes with a result of its own, or all with the first one's."""
    dim = argument_of(operation.func, "dim", *tree_unflatten(operation.leaves, operation.tree))
    return dim == [] and layout.kind is Kind.SHARDED and not operator(operation.name).moves


DRAWN_IN_BACKWARD = "it draws random numbers in backward, where each rank draws for its shard alone"


def not_as_in_one_process(operation: Operation, layout: Layout, in_backward: bool) -> Iterator[tuple[str, int | None]]:
    """Why an operator on DTensors is not proven, and the dim. `layout`: of its first result."""
    dim = argument_of(operation.func, "dim", *tree_unflatten(operation.leaves, operation.tree))
    sharded = layout.kind is Kind.SHARDED
    # DTensor's rule takes -1 for another dim than the last
    if sharded and operation.name in CUMULATIVE and dim % operation.results[0].ndim == layout.dim:
        yield "DTensor runs it on each shard alone", layout.dim
    if operation.name in ("any", "all") and layout == PARTIAL:
        yield "DTensor adds up truth values over ranks", None
    shards = [value.layout.dim for value in operation.values if value.layout.kind is Kind.SHARDED]
    if shards and may_draw(operation.func) and not draws_by_element(operation.func):
        # DTensor seeds ranks apart, or not at all: neither gives the numbers of one process
        yield "each rank draws random numbers for its shard of a DTensor", shards[0]
    elif shards and in_backward and operation.draws:
        yield DRAWN_IN_BACKWARD, shards[0]
