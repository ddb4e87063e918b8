"""Watches the local arithmetic of one rank: every collective, and every placement that does not fit its tensor.

What a tensor is, and what a declaration means, is defined in [Note: equal and varying] of `dryrun.values`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.dryrun import values as rules
from colrow.dryrun.flops import computes_gradients, flops_of
from colrow.dryrun.module_tracker import ModuleTracker
from colrow.dryrun.result import Collective, Pass, PlacementMismatch, Problem
from colrow.dryrun.values import Op, Values
from colrow.ops.parallel_linear import traffic
from colrow.sharding.operators import EQUAL_AFTER
from colrow.torch_compat import (
    TorchDispatchMode,
    current_autograd_node,
    finds_output_shape,
    frames,
    implicit_redistribution,
    is_async,
    is_higher_order,
    local_shard,
    tensors_in,
    watched_to_local_backward,
)


class Watch(TorchDispatchMode):
    """A mode around forward and backward of a parallelised model on fake tensors.

    Attributes:
        collectives: in order. `cause` is the change of placement, where DTensor knows it.
        mismatches: in order; a wrong declaration is listed once, what follows is taken as declared.
        unmatched_log_softmaxes: log-softmaxes of DTensors less the cross entropies that took one.
        flops: of forward, by module.
    """

    def __init__(self, modules: ModuleTracker, tp: int, params: Mapping[int, str]) -> None:
        """`params`: the names of the model's parameters by their id."""
        super().__init__()
        self._modules, self._tp, self._params = modules, tp, params
        self._values = Values()
        self.collectives: list[Collective] = []
        self.mismatches: list[PlacementMismatch] = []
        self.unmatched_log_softmaxes = 0
        self.flops: Counter[str] = Counter()

    # -- what a tensor is ------------------------------------------------------------------------------------------

    def varies(self, tensor: Tensor) -> bool:
        """Whether ranks may hold different values in this local tensor."""
        return self._values.varies(tensor)

    def written(self, tensor: Tensor) -> bool:
        """Whether a batch norm has written the tensor, which its version does not count."""
        return self._values.storage(tensor).written

    def in_flight(self, tensor: Tensor) -> bool:
        """Whether the tensor is the result of a collective, or a view of it, that nothing has waited for."""
        return self._values.storage(tensor).in_flight

    def packed(self, tensor: Tensor) -> bool:
        """Whether the tensor comes from a fused weight of which each segment was split on its own."""
        return self._values[tensor].packed

    def mark_varying(self, tensor: Tensor) -> None:
        """Declare that ranks hold different values in this local tensor."""
        self._values[tensor].varying = True

    def mark_packed(self, param: Tensor) -> None:
        """Declare that each segment of this fused weight was split on its own."""
        self._values[param].packed_weight = True

    def mark_dtensor(self, tensor: DTensor) -> None:
        """A DTensor's local tensor varies unless the DTensor is declared replicated."""
        if any(not placement.is_replicate() for placement in tensor.placements):
            self.mark_varying(local_shard(tensor))

    # -- operations ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = tensors_in((args, kwargs))
        if any(isinstance(x, DTensor) or is_async(x) for x in inputs):
            self._note_dtensors(func, inputs)
            return NotImplemented  # it comes again, on local tensors
        with self._values.kept(inputs if torch.Tag.inplace_view in func.tags else []):
            out = func(*args, **(kwargs or {}))
        if is_higher_order(func) or func.namespace == "prim":  # prim.device, which reads no elements
            return out
        if not self._modules.in_backward() and (flops := flops_of(func, args, kwargs or {}, out)):
            counts = not (finds_output_shape(frames()) or computes_gradients(frames()))
            self.flops[self._modules.current()] += flops if counts else 0
        op = Op(
            func=func,
            args=args,
            inputs=inputs,
            outputs=tensors_in(out),
            varying=[x for x in inputs if self.varies(x)],
            mutates=func._schema.is_mutable,
        )
        handler = _HANDLERS.get(func.namespace, Watch._local)
        rules.track_packed(self._values, op)
        rules.track_in_flight(self._values, op, functional=handler is Watch._functional)
        handler(self, op)
        return out

    def _note_dtensors(self, func: Any, inputs: list[Tensor]) -> None:
        for x in inputs:
            if isinstance(x, DTensor):
                self.mark_dtensor(x)
        if func is torch.ops.aten._log_softmax.default:
            self.unmatched_log_softmaxes += 1
        elif func in (torch.ops.aten.nll_loss_forward.default, torch.ops.aten.nll_loss2d_forward.default):
            self.unmatched_log_softmaxes -= 1

    def _local(self, op: Op) -> None:
        """Arithmetic on this rank. The order matters: the rule on addends reads the values after `op`."""
        rules.track_share(self._values, op, self._tp)
        rules.track_varying(self._values, op)
        rules.track_addend(self._values, op)
        rules.track_zero(self._values, op)
        rules.track_statistics(self._values, op)

    def _functional(self, op: Op) -> None:
        """A collective that returns a new tensor, as DTensor's do; `wait_tensor` and the like move nothing."""
        collective = op.facts.collective
        if not collective:
            self._local(op)
            return
        value, backward = self._values[op.inputs[0]], self._modules.in_backward()
        change, cause_op = _reason()
        repeated = collective == "all_gather" and backward in value.gathered_in
        value.gathered_in.add(backward)
        nbytes = max(_nbytes(op.inputs), _nbytes(op.outputs))
        cause = f"implicit in {cause_op}: {change}" if cause_op else change
        self._record(collective, op.inputs[0], nbytes, cause, implicit=bool(cause_op), repeated=repeated)
        sums = collective in ("all_reduce", "reduce_scatter") and "sum" in [a for a in op.args if isinstance(a, str)]
        # With a change, DTensor redistributes: its placement was compared with the tensor when it was declared.
        if sums and not change and not self.varies(op.inputs[0]):
            self._mismatch("equal_summed")
        if sums and value.has_addend:
            self._mismatch("addend_summed")
        for out in op.outputs:
            self._values[out].varying = collective not in EQUAL_AFTER

    def _in_place(self, op: Op) -> None:
        """A collective that writes into its first tensor; this project's operations call these."""
        collective = op.facts.collective
        if not collective:
            self._local(op)
            return
        target = op.inputs[0]
        self._record(collective, op.inputs[-1], max(_nbytes([x]) for x in op.inputs))
        varying = collective not in EQUAL_AFTER
        self._values[target].varying = self._values.storage(target).varying = varying

    def _own_operator(self, op: Op) -> None:
        """An operator of `ops.parallel_linear` or `ops.tokens`: its result varies, but for a gather's."""
        if op.name == "scatter_sum" and not self.varies(op.args[0]):
            self._mismatch("equal_summed")
        elif op.name == "scatter_sum" and self._values[op.args[0]].has_addend:
            self._mismatch("addend_summed")
        for collective, sent, nbytes in traffic(op.name, op.args, op.outputs):
            self._record(collective, sent, nbytes)
        for out in op.outputs:
            self._values[out].varying = op.name not in ("gather", "all_tokens")

    def _record(self, collective: str, sent: Tensor, nbytes: int, cause: str = "", **known: bool) -> None:
        pass_: Pass = "backward" if self._modules.in_backward() else "forward"
        dtype = str(sent.dtype).removeprefix("torch.")
        self.collectives.append(Collective(collective, self._modules.current(), pass_, nbytes, dtype, cause, **known))

    # -- declarations ----------------------------------------------------------------------------------------------

    @contextmanager
    def declarations(self) -> Iterator[None]:
        """Compare what `DTensor.from_local` and `to_local` declare with the tensors, in forward and in backward."""
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
            with watched_to_local_backward(self._declared):
                yield
        finally:
            cls.from_local, cls.to_local = staticmethod(from_local), to_local

    def _declared(self, tensor: Tensor, placements: Any) -> None:
        if not placements or not tensor.is_floating_point():
            return
        placement, value, varies = placements[0], self._values[tensor], self.varies(tensor)
        if placement.is_replicate() and varies:
            self._mismatch("varying_as_replicate")
            value.varying = False  # report one mistake once: from here on it is taken as declared
        elif placement.is_partial() and not varies and not value.is_share and not value.is_zero:
            self._mismatch("equal_as_partial")
        elif placement.is_partial() and value.has_addend:
            self._mismatch("addend_summed")
        elif placement.is_shard() and not varies and not self._modules.in_backward() and tensor.requires_grad:
            self._mismatch("equal_as_shard", dim=placement.dim)
        if not placement.is_replicate():
            value.varying = True

    def _mismatch(self, problem: Problem, dim: int | None = None) -> None:
        backward = self._modules.in_backward()
        param = self._params.get(id(_parameter_of_node()), "") if backward else ""
        self.mismatches.append(PlacementMismatch(problem, self._modules.current(), backward, param, dim))


_HANDLERS: dict[str, Callable[[Watch, Op], None]] = {
    "_c10d_functional": Watch._functional,
    "_c10d_functional_autograd": Watch._functional,
    "_dtensor": Watch._functional,
    "c10d": Watch._in_place,
    "colrow": Watch._own_operator,
}


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _parameter_of_node() -> nn.Parameter | None:
    """The parameter that the running backward node passes its gradient to."""
    node: Any = current_autograd_node()
    for following, _ in node.next_functions if node is not None else ():
        variable = getattr(following, "variable", None)
        if isinstance(variable, nn.Parameter):
            return variable
    return None


def _reason() -> tuple[str, str]:
    """(the change of placement, the operation that caused it implicitly) of a collective, from DTensor's frames."""
    before, after, implicit = implicit_redistribution(frames())
    return (f"{_named(before)} → {_named(after)}" if before is not None else "", implicit)


def _named(placements: Any) -> str:
    def one(placement: Any) -> str:
        if placement.is_partial():
            return "partial"
        return f"shard({placement.dim})" if hasattr(placement, "dim") else "replicate"

    return ", ".join(one(placement) for placement in placements)
