"""Watches the local arithmetic of one rank: every collective, and which tensors are the same on all ranks.

[Note: equal and varying]
A local tensor is *equal* when every rank holds the same values, *varying* when ranks may differ. Inputs and replicated
parameters are equal, shards and pending sums vary; an operation on a varying tensor gives a varying one; an all-gather
or all-reduce gives an equal one. DTensor declares placements and never compares them with what a tensor is. Each of
these declarations is wrong, and none raises:

    declared    tensor    what follows
    replicate   varying   in forward, ranks take their own part for the whole; in backward, a gradient that is a part
                          of a sum is taken for the sum
    shard       equal     in forward, the whole is taken for a part: the dimension becomes tp times longer
    partial     equal     the same value is summed over ranks: tp times too large

A tensor is known by its storage and the window on it, so that a detached or saved alias is the same tensor.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import _api as dtensor_api
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colrow.dryrun.where import Where, frames
from colrow.ops.parallel_linear import traffic

_COLLECTIVES = {
    "all_gather_into_tensor": "all_gather",
    "all_gather_into_tensor_coalesced": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "reduce_scatter_tensor_coalesced": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_reduce_coalesced": "all_reduce",
    "all_to_all_single": "all_to_all",
    "shard_dim_alltoall": "all_to_all",
    "broadcast": "broadcast",
}
_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "_dtensor")
_IN_PLACE = {
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
}
_EQUAL_AFTER = ("all_gather", "all_reduce", "broadcast")
_NO_VALUES = ("empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full")
_ZEROS = ("zeros", "zeros_like", "new_zeros", "zero_")
_KEEPS_ADDEND = ("view", "_unsafe_view", "reshape", "clone", "_to_copy", "transpose", "permute", "detach", "alias",
                 "unsqueeze", "squeeze", "expand", "contiguous", "t", "slice", "split", "cat")  # fmt: skip
_RANDOM = ("native_dropout", "bernoulli", "bernoulli_", "rand_like", "randn_like", "_fused_dropout")

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_grouped_mm", "_scaled_dot_product_flash_attention_for_cpu")

Window = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Event:
    """A collective as it happened.

    Attributes:
        change: `partial → shard(1)` where DTensor knows it, else empty.
        implicit: the operation for whose sake DTensor moved the data unasked, else empty.
        again: the same tensor was gathered before in this pass.
        nbytes: of the larger side, on one rank.
    """

    op: str
    where: str
    backward: bool
    nbytes: int
    dtype: str
    change: str = ""
    implicit: str = ""
    again: bool = False


@dataclass(frozen=True)
class Slip:
    """A declaration that does not fit what a tensor is; see [Note: equal and varying].

    Attributes:
        kind: `part_as_whole`, `whole_as_part`, `equal_as_partial`, `equal_summed`, `addend_summed`, `random_on_part`.
        param: the parameter whose gradient it is, if it is one's.
    """

    kind: str
    where: str
    backward: bool
    param: nn.Parameter | None = None
    dim: int | None = None


class Watch(TorchDispatchMode):
    """A mode around forward and backward of a parallelised model on fake tensors."""

    def __init__(self, where: Where, tp: int) -> None:
        super().__init__()
        self._tp = tp
        self.events: list[Event] = []
        self.slips: list[Slip] = []
        self._where = where
        self._varying: set[Window] = set()
        self._storages: set[int] = set()  # written in place with varying values: all windows vary
        self._addend: set[Window] = set()  # varying, with an equal term added: must not be summed over ranks
        self._like_part: set[Window] = set()  # no values yet, but of the shape of a varying tensor
        self._packed_weights: set[Window] = set()
        self._packed: set[Window] = set()  # out of a fused weight whose segments were split one by one
        self.class_losses = 0  # log-softmaxes of DTensors that no cross entropy took
        self._zeros: set[Window] = set()  # as good as not there, where they are added
        self._shares: set[Window] = set()  # equal values divided by tp: to sum them over ranks is right
        self._gathered: set[tuple[bool, Window]] = set()
        self._running: set[int] = set()  # storages that a collective fills: views of them do not wait for it
        self._alive: list[Any] = []  # a storage's address may not be used again while it is a key

    # -- what a tensor is ------------------------------------------------------------------------------------------

    def varies(self, tensor: Tensor) -> bool:
        """Whether ranks may hold different values in this local tensor."""
        window = self._window(tensor)
        return window in self._varying or window[0] in self._storages

    def gathering(self, tensor: Tensor) -> bool:
        """Whether the tensor is what a collective gives, or a view of it, so that it may still be on its way."""
        return self._window(tensor)[0] in self._running

    def mark(self, tensor: Tensor, varying: bool) -> None:
        """Say what a local tensor is."""
        (self._varying.add if varying else self._varying.discard)(self._window(tensor))

    def packed(self, tensor: Tensor) -> bool:
        """Whether the tensor comes from a fused weight of which each segment was split on its own."""
        return self._window(tensor) in self._packed

    def mark_packed(self, param: Tensor) -> None:
        """Say of a parameter that it is such a weight: what it is multiplied with comes from it."""
        self._packed_weights.add(self._window(param))

    def mark_dtensor(self, tensor: DTensor) -> None:
        """A DTensor's local part varies unless it is declared replicated."""
        if any(not placement.is_replicate() for placement in tensor.placements):
            self.mark(tensor._local_tensor, True)

    def _window(self, tensor: Tensor) -> Window:
        tensor = _plain(tensor)
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return storage._cdata, int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride())

    # -- operations ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if any(isinstance(leaf, DTensor) or _is_async(leaf) for leaf in inputs):
            for leaf in inputs:
                if isinstance(leaf, DTensor):
                    self.mark_dtensor(leaf)
            self._count_class_losses(func)
            return NotImplemented  # it comes again, on local tensors
        out = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.HigherOrderOperator):
            return out
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = func.name().partition("::")[2].partition(".")[0]
        varying = [leaf for leaf in inputs if self.varies(leaf)]
        self._track_packed(name, inputs, outputs)
        if name == "_unsafe_view":  # no view to whom a collective hands on: it waits, and shares the memory
            self._running.difference_update(self._window(leaf)[0] for leaf in inputs)
        if func.namespace in _NAMESPACES:
            self._running.update(self._window(leaf)[0] for leaf in outputs)
        if func.namespace in _NAMESPACES and name in _COLLECTIVES:
            self._collective(_COLLECTIVES[name], func, args, inputs, outputs)
            return out
        if func.namespace == "c10d" and name in _IN_PLACE:
            self._in_place(name, inputs)
            return out
        if func.namespace == "colrow":
            self._inside_operator(name, args, outputs)
            return out
        if name in ("div", "mul") and not varying and self._by_tp(name, args):
            self._shares.update(self._window(leaf) for leaf in outputs)
        if varying and name not in _NO_VALUES:
            for leaf in outputs:
                self.mark(leaf, True)
            if name.endswith("_") and func._schema.is_mutable:
                self._storages.add(self._window(inputs[0])[0])
            self._track_addend(name, inputs, varying, outputs)
        elif name in _NO_VALUES:
            for leaf in outputs:
                self.mark(leaf, False)
                (self._like_part.add if varying else self._like_part.discard)(self._window(leaf))
        if not varying:
            known = self._zeros.update if name in _ZEROS else self._zeros.difference_update
            known(self._window(leaf) for leaf in outputs)
        if name in _RANDOM and (varying or any(self._window(leaf) in self._like_part for leaf in inputs)):
            self._slip("random_on_part")
        return out

    def _count_class_losses(self, func: Any) -> None:
        if func is torch.ops.aten._log_softmax.default:
            self.class_losses += 1
        elif func in (torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss2d_forward.default):
            self.class_losses -= 1

    def _track_packed(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        windows = {self._window(leaf) for leaf in inputs}
        weights, packed = bool(windows & self._packed_weights), bool(windows & self._packed)
        made = {self._window(leaf) for leaf in outputs} if weights or packed else set()
        if name in _PRODUCTS:
            self._packed |= made if weights else set()  # a product of activations mixes the parts: it is packed no more
        elif weights:
            self._packed_weights |= made
        else:
            self._packed |= made

    def _by_tp(self, name: str, args: Any) -> bool:
        factor = args[1] if len(args) > 1 else None
        if isinstance(factor, Tensor) or factor is None:
            return False
        return bool(abs(float(factor) - (self._tp if name == "div" else 1 / self._tp)) < 1e-9)

    def _track_addend(self, name: str, inputs: list[Tensor], varying: list[Tensor], outputs: list[Tensor]) -> None:
        if name in ("add", "add_", "sub", "addmm", "linear"):
            terms = inputs[:1] if name == "addmm" else inputs[2:] if name == "linear" else inputs
            equal = [self._window(leaf) for leaf in terms if leaf.is_floating_point() and not self.varies(leaf)]
            counted = (window for window in equal if window not in self._shares and window not in self._zeros)
            adds = any(counted) and not _inside_dtensor()
            adds |= name in ("add", "add_", "sub") and any(self._window(leaf) in self._addend for leaf in varying)
        else:
            adds = name in _KEEPS_ADDEND and any(self._window(leaf) in self._addend for leaf in varying)
        if adds:
            self._addend.update(self._window(leaf) for leaf in outputs)

    def _collective(self, op: str, func: Any, args: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        backward = self._where.backward()
        window = self._window(inputs[0])
        change, implicit = _reason()
        again = op == "all_gather" and (backward, window) in self._gathered
        self._gathered.add((backward, window))
        self.events.append(
            Event(
                op=op,
                where=self._where.module(),
                backward=backward,
                nbytes=max(_nbytes(inputs), _nbytes(outputs)),
                dtype=str(inputs[0].dtype).removeprefix("torch."),
                change=change,
                implicit=implicit,
                again=again,
            )
        )
        sums = op in ("all_reduce", "reduce_scatter") and "sum" in [a for a in args if isinstance(a, str)]
        if sums and not change and not self.varies(inputs[0]):
            self._slip("equal_summed")
        if sums and window in self._addend:
            self._slip("addend_summed")
        for leaf in outputs:
            self.mark(leaf, op not in _EQUAL_AFTER)

    def _in_place(self, name: str, inputs: list[Tensor]) -> None:
        """A collective that writes into its first tensor; this project's operations call these."""
        target = inputs[0]
        self._event(_IN_PLACE[name], inputs[-1], max(_nbytes([leaf]) for leaf in inputs))
        varies = _IN_PLACE[name] not in _EQUAL_AFTER
        self.mark(target, varies)
        (self._storages.add if varies else self._storages.discard)(self._window(target)[0])

    def _inside_operator(self, name: str, args: Any, outputs: list[Tensor]) -> None:
        """An operator of `ops.parallel_linear` or `ops.tokens`: what it gives is a part, but for a gather's."""
        if name == "scatter_sum" and not self.varies(args[0]):
            self._slip("equal_summed")
        elif name == "scatter_sum" and self._window(args[0]) in self._addend:
            self._slip("addend_summed")
        for op, sent, nbytes in traffic(name, args, outputs):
            self._event(op, sent, nbytes)
        for leaf in outputs:
            self.mark(leaf, name not in ("gather", "whole"))

    def _event(self, op: str, sent: Tensor, nbytes: int) -> None:
        dtype = str(sent.dtype).removeprefix("torch.")
        self.events.append(Event(op, self._where.module(), self._where.backward(), nbytes, dtype))

    # -- declarations ----------------------------------------------------------------------------------------------

    @contextmanager
    def declarations(self) -> Iterator[None]:
        """See what `DTensor.from_local` and `to_local` are told, in forward and in backward."""
        from_local, to_local = DTensor.from_local, DTensor.to_local

        def watched_from_local(
            local_tensor: Tensor, device_mesh: Any = None, placements: Any = None, *args: Any, **kwargs: Any
        ) -> DTensor:
            self._declared(local_tensor, placements)
            return from_local(local_tensor, device_mesh, placements, *args, **kwargs)

        def watched_to_local(tensor: DTensor, *args: Any, **kwargs: Any) -> Tensor:
            self.mark_dtensor(tensor)
            return to_local(tensor, *args, **kwargs)

        cls: Any = DTensor
        cls.from_local, cls.to_local = staticmethod(watched_from_local), watched_to_local
        try:
            with self._backward_of_to_local():
                yield
        finally:
            cls.from_local, cls.to_local = staticmethod(from_local), to_local

    @contextmanager
    def _backward_of_to_local(self) -> Iterator[None]:
        """See how `to_local` declares its gradient: newer torch asks `from_local`, 2.11 makes the DTensor itself."""
        function: Any = getattr(dtensor_api, "_ToTorchTensor", None)
        if function is None or "grad_placements" in inspect.signature(DTensor.from_local).parameters:
            yield
            return
        backward = function.backward

        def watched(ctx: Any, grad: Tensor) -> Any:
            given = backward(ctx, grad)
            self._declared(grad, given[0].placements)
            return given

        function.backward = staticmethod(watched)
        try:
            yield
        finally:
            function.backward = staticmethod(backward)

    def _declared(self, tensor: Tensor, placements: Any) -> None:
        if not placements or not tensor.is_floating_point():
            return
        placement, varies, backward = placements[0], self.varies(tensor), self._where.backward()
        if placement.is_replicate() and varies:
            self._slip("part_as_whole")
            self.mark(tensor, False)  # one mistake is one slip: what follows is taken as declared
        elif placement.is_partial() and not varies and self._window(tensor) not in self._shares:
            self._slip("equal_as_partial")
        elif placement.is_partial() and self._window(tensor) in self._addend:
            self._slip("addend_summed")
        elif placement.is_shard() and not varies and not backward and tensor.requires_grad:
            self._slip("whole_as_part", dim=placement.dim)
        if not placement.is_replicate():
            self.mark(tensor, True)

    def _slip(self, kind: str, dim: int | None = None) -> None:
        backward = self._where.backward()
        param = _parameter_of_node() if backward else None
        self.slips.append(Slip(kind, self._where.module(), backward, param, dim))


def _plain(tensor: Tensor) -> Tensor:
    if isinstance(tensor, DTensor):
        tensor = tensor._local_tensor
    return getattr(tensor, "elem", tensor) if _is_async(tensor) else tensor


def _is_async(tensor: Any) -> bool:
    return type(tensor).__name__ == "AsyncCollectiveTensor"


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _parameter_of_node() -> nn.Parameter | None:
    """The parameter into which the running backward node hands its gradient."""
    node: Any = torch._C._current_autograd_node()
    for following, _ in node.next_functions if node is not None else ():
        variable = getattr(following, "variable", None)
        if isinstance(variable, nn.Parameter):
            return variable
    return None


def _reason() -> tuple[str, str]:
    """(the change of placement, the operation that asked for it unasked) of a collective, from DTensor's frames."""
    change = implicit = ""
    for frame in frames():
        name = frame.f_code.co_name
        if name == "redistribute_local_tensor" and not change:
            change = f"{_named(frame.f_locals['current_spec'])} → {_named(frame.f_locals['target_spec'])}"
        elif name == "redistribute_local_args":
            known = frame.f_locals
            schemas = (known.get("suggested_input_schema"), getattr(known.get("op_info"), "schema", None))
            implicit = next((str(schema.op) for schema in schemas if schema is not None), "an operation")
    return change, implicit


def _inside_dtensor() -> bool:
    return any("/distributed/tensor/_" in frame.f_code.co_filename.replace("\\", "/") for frame in frames())


def _named(spec: Any) -> str:
    def one(placement: Any) -> str:
        if placement.is_partial():
            return "partial"
        return f"shard({placement.dim})" if hasattr(placement, "dim") else "replicate"

    return ", ".join(one(placement) for placement in spec.placements)
