"""What a dry run knows of each local tensor, and how an operation passes that to its results.

[Note: equal and varying]
A local tensor is *equal* when every rank holds the same values, *varying* when ranks may differ. Inputs and replicated
parameters are equal, shards and pending sums vary; an operation on a varying tensor gives a varying one; an all-gather
or all-reduce gives an equal one. DTensor declares placements and never compares them with what a tensor is. Each of
these declarations is wrong, and none raises:

    declared    tensor    consequence
    replicate   varying   in forward, each rank computes with its own shard as if it were the complete tensor; in
                          backward, one term of a sum over ranks is used as the sum
    shard       equal     in forward, a complete tensor counts as one shard: the dim becomes tp times longer
    partial     equal     the same value is summed over ranks: tp times too large

A tensor is identified by its storage and the window on it, so that a detached or saved alias is the same tensor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from colrow.sharding.operators import Filling, Linear, Operator, operator, operator_name
from colrow.sharding.zeros import makes_zeros
from colrow.torch_compat import frames, inside_dtensor, is_async, local_shard, tree_leaves

Window = tuple[int, int, tuple[int, ...], tuple[int, ...]]
"""Storage address, offset, shape, stride."""


@dataclass
class Value:
    """What is known of one window of a storage.

    Attributes:
        varying: ranks may hold different values; see [Note: equal and varying].
        packed_weight: a fused weight of which each segment was split on its own, or a view of one.
        packed: computed from such a weight: its features are the segments' shards, one after the other.
        has_addend: varying, and an equal term was added on every rank: a sum over ranks would count the term tp times.
        is_zero: zeros, which may be added on every rank.
        is_share: an equal value divided by tp, which may be summed over ranks.
        gathered_in: the passes, named by whether they are backward, in which it was all-gathered.
    """

    varying: bool = False
    packed_weight: bool = False
    packed: bool = False
    has_addend: bool = False
    is_zero: bool = False
    is_share: bool = False
    gathered_in: set[bool] = field(default_factory=set)


@dataclass
class Storage:
    """What is known of a storage.

    Attributes:
        handle: keeps the storage alive: its address is a key, and must not be used again.
        varying: varying values were written into it in place: every window on it varies.
        in_flight: an asynchronous collective fills it, and views of it do not wait for the collective.
        written: batch norm has written it, which its version does not count.
    """

    handle: torch.UntypedStorage
    varying: bool = False
    in_flight: bool = False
    written: bool = False


class Values:
    """The `Value` of every local tensor of a step, by tensor: `values[x].varying`."""

    def __init__(self) -> None:
        self._values: dict[Window, Value] = defaultdict(Value)
        self._storages: dict[int, Storage] = {}

    def __getitem__(self, tensor: Tensor) -> Value:
        return self._values[self._window(tensor)]

    def _window(self, tensor: Tensor) -> Window:
        tensor = _local(tensor)
        handle = self.storage(tensor).handle
        return handle._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())

    def storage(self, tensor: Tensor) -> Storage:
        """What is known of the tensor's storage."""
        handle = _local(tensor).untyped_storage()
        return self._storages.setdefault(handle._cdata, Storage(handle))

    @contextmanager
    def kept(self, tensors: Sequence[Tensor]) -> Iterator[None]:
        """Within, `squeeze_` or another view in place gives them other windows on their storages."""
        before = [(tensor, self[tensor], self.storage(tensor)) for tensor in tensors]
        yield
        for tensor, value, storage in before:
            if self.storage(tensor) is storage:  # not so after `x.data = y`
                self._values[self._window(tensor)] = value

    def varies(self, tensor: Tensor) -> bool:
        """Whether ranks may hold different values in this local tensor."""
        return self[tensor].varying or self.storage(tensor).varying


@dataclass(frozen=True)
class Op:
    """One operation on local tensors, after it ran.

    Attributes:
        varying: the inputs that vary.
        mutates: it writes to one of its inputs.
    """

    func: Any
    args: Any
    inputs: list[Tensor]
    outputs: list[Tensor]
    varying: list[Tensor]
    mutates: bool

    @cached_property
    def name(self) -> str:
        return operator_name(self.func)

    @cached_property
    def facts(self) -> Operator:
        return operator(self.name)

    @cached_property
    def plain(self) -> list[Any]:
        """The arguments that are no tensors."""
        return [leaf for leaf in tree_leaves(self.args) if not isinstance(leaf, Tensor)]

    @cached_property
    def is_filled(self) -> bool:
        """Whether it takes only the shape of its input, and gives a new tensor."""
        return not self.mutates and self.facts.fills not in (None, Filling.RANDOM)


def track_packed(values: Values, op: Op) -> None:
    """packed weight → view: packed weight; × activations: packed. packed → packed, but for a matmul of activations,
    which mixes the features."""
    from_weight = any(values[x].packed_weight for x in op.inputs)
    from_packed = any(values[x].packed for x in op.inputs)
    for out in op.outputs:
        if op.facts.contracts:
            values[out].packed |= from_weight
        elif from_weight:
            values[out].packed_weight = True
        else:
            values[out].packed |= from_packed


def track_in_flight(values: Values, op: Op, functional: bool) -> None:
    """The result of an operator of functional collectives is in flight until AsyncCollectiveTensor waits."""
    if op.name == "_unsafe_view":
        # AsyncCollectiveTensor waits on _unsafe_view (not a view in its schema): the result is complete, same storage
        for x in op.inputs:
            values.storage(x).in_flight = False
    if functional:
        for out in op.outputs:
            values.storage(out).in_flight = True


def track_varying(values: Values, op: Op) -> None:
    """varying → varying. A result without values of its own is equal."""
    if op.is_filled:
        for out in op.outputs:
            values[out].varying = False
        return
    for out in op.outputs if op.varying else ():
        values[out].varying = True
    if op.varying and op.name.endswith("_") and op.mutates:
        values.storage(op.inputs[0]).varying = True  # other windows on it see the new values too


def track_addend(values: Values, op: Op) -> None:
    """varying + equal has an addend, and what only moves its elements keeps it.

    Not counted: zeros, a share of 1/tp, and what DTensor adds itself (it adds a row linear's bias on one rank).
    """
    if not op.varying or op.is_filled:
        return
    terms = [op.inputs[i] for i in op.facts.addends or () if i < len(op.inputs)]
    adds = any(_counts_as_addend(values, term) for term in terms) and not inside_dtensor(frames())
    if op.facts.moves or op.facts.linear is Linear.TERMS:
        adds |= any(values[x].has_addend for x in op.varying)
    for out in op.outputs if adds else ():
        values[out].has_addend = True


def _counts_as_addend(values: Values, term: Tensor) -> bool:
    value = values[term]
    return term.is_floating_point() and not values.varies(term) and not value.is_share and not value.is_zero


def track_zero(values: Values, op: Op) -> None:
    """Zeros are equal on all ranks. In place they are not looked for: other windows on the storage may vary."""
    zeros = not op.mutates and makes_zeros(op.func, op.name, op.plain, [values[x].is_zero for x in op.inputs])
    for out in op.outputs if zeros else ():
        values[out].varying = values[out].has_addend = False
    for out in op.outputs if zeros or not op.varying else ():
        values[out].is_zero = zeros or op.facts.fills is Filling.ZERO


def track_share(values: Values, op: Op, tp: int) -> None:
    """equal / tp, or equal * (1 / tp), is a share, and so are views and rows of one."""
    if op.facts.linear is Linear.FIRST and not op.varying and op.inputs and values[op.inputs[0]].is_share:
        for out in op.outputs:
            values[out].is_share = True
    if op.name not in ("div", "mul") or op.varying:
        return
    factor = op.args[1] if len(op.args) > 1 else None
    if not isinstance(factor, int | float):  # a tensor, or a complex number
        return
    if abs(factor - (tp if op.name == "div" else 1 / tp)) < 1e-9:
        for out in op.outputs:
            values[out].is_share = True


def track_statistics(values: Values, op: Op) -> None:
    """In training, batch norm writes its running statistics, which not every schema of it says."""
    if op.facts.statistics and op.args[5] is not False:  # training; cuDNN's own operator runs in training alone
        for buffer in (op.args[position] for position in op.facts.statistics):
            if isinstance(buffer, Tensor):
                values.storage(buffer).written = True
                values.storage(buffer).varying |= bool(op.varying)


def _local(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = local_shard(tensor)
    return getattr(tensor, "elem", tensor) if is_async(tensor) else tensor
