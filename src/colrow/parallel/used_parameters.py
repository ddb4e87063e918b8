"""Data ranks whose micro-batches use different parameters: experts that nobody chose, branches, dropped layers.

[Note: used parameters]
One process leaves `grad` None where no micro-batch of a step used the parameter, and sums what there is elsewhere. Data
ranks that each see some of the micro-batches must agree on three things, or FSDP2 adds gradients of different
parameters, replicas drift apart, and gloo aborts:

- Which gradients a unit reduces. Before the reduction a trained parameter without a gradient gets zeros: every rank
  sends every parameter.
- Which parameters some rank used. After backward the ranks combine one flag a parameter; `grad` becomes None on all
  ranks where no rank had one. Only a rank with an unused parameter waits for the flags.
- In which order the units gather and reduce. A block, or head, that a rank does not call is run without its forward,
  at its place between the others: a scalar goes through FSDP2's hooks and joins the next block's input, so that
  backward passes here, too, between the reductions of its neighbours. Where a rank calls only one module of the
  head, the forward ends as if it had called all. Where a rank detaches what enters the first block, backward does not
  pass that: it reduces at the end, and then the root. Where it detaches what enters a later one, or computes it under
  `torch.no_grad`, a scalar through the hooks of the blocks before joins it.

A block that ranks call unequally often, more than once, is beyond this: the order of gathers would differ. So is one
whose output alone some ranks detach, or run under `torch.no_grad`, beside a path that is not: nothing tells that.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.parallel.outputs import flatten_tensors
from colrow.torch_compat import FsdpUnit, fsdp_units


def agree_on_used_parameters(
    model: nn.Module, blocks: Sequence[nn.Module], head: Sequence[nn.Module], groups: Sequence[dist.ProcessGroup]
) -> None:
    """Make the ranks of `groups` reduce the same gradients, whatever each rank's micro-batches use; in place.

    Args:
        model: wrapped by `apply_data_parallel`.
        blocks: its units, in the order in which they run.
        head: the modules of the unit that runs last; empty where there is none.
        groups: those of the data axes that have several ranks; with none only the gradients' dtypes are made equal.
    """
    units = fsdp_units(model)
    UsedParameters(units, groups)
    if groups:
        by_module = {unit.module: unit for unit in units}
        called = [[block] for block in blocks] + ([list(head)] if head else [])
        # a unit of several modules is known by one of them
        _SkippedUnits(model, [(next(by_module[m] for m in modules if m in by_module), modules) for modules in called])


class UsedParameters:
    """Collects during a backward which trained parameters have gradients, and drops those that no rank used."""

    def __init__(self, units: Sequence[FsdpUnit], groups: Sequence[dist.ProcessGroup]) -> None:
        self._units, self._groups = units, groups
        self._used: dict[FsdpUnit, list[bool]] = {}
        self._all_used: Tensor | None = None
        for unit in units:
            unit.before_reduction(self._complete)
            unit.at_end_of_backward(self._reduce_left, self._agree)

    def _complete(self, unit: FsdpUnit) -> None:
        has_grad = [grad is not None for grad in unit.unreduced_gradients(fill=bool(self._groups))]
        # The first reduction of a backward: what an earlier backward has left in `.grad` is used too.
        before = self._used.get(unit) or [param.grad is not None for param in unit.parameters()]
        self._used[unit] = [a or b for a, b in zip(has_grad, before, strict=True)]

    def _reduce_left(self) -> None:
        # FSDP2 begins with the root, which comes last on a rank whose backward has passed every unit.
        for unit in reversed(self._units) if self._groups else ():
            unit.reduce_if_left()

    @torch.no_grad()
    def _agree(self) -> None:
        if not self._used or not self._groups:  # no unit has reduced: a micro-batch before the last
            self._used.clear()
            return
        params = [param for unit in self._units for param in unit.parameters()]
        used = [flag for unit in self._units for flag in self._used.get(unit) or [False] * len(unit.parameters())]
        self._used.clear()
        if not params:
            return
        flags = self._flags(used, _device(params[0]))
        found = flags_anywhere(flags, self._groups, wait=not all(used))
        for param, anywhere in zip(params, found or used, strict=True):
            if not anywhere:
                param.grad = None

    def _flags(self, used: list[bool], device: torch.device) -> Tensor:
        if not all(used):
            return torch.tensor(used, dtype=torch.int32, device=device)
        # Ones stay ones: a step that uses everything copies nothing to the device.
        if self._all_used is None or len(self._all_used) != len(used):
            self._all_used = torch.ones(len(used), dtype=torch.int32, device=device)
        return self._all_used


def flags_anywhere(flags: Tensor, groups: Sequence[dist.ProcessGroup], *, wait: bool) -> list[int] | None:
    """The largest flag of any rank for each parameter; None without `wait`, for ranks that know it. Collective.

    Args:
        flags: int32, by parameter; changed.
    """
    for group in groups:
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=group)
    return flags.tolist() if wait else None


class _SkippedUnits:
    """Lets every backward pass all units in one order: those that this rank's forward has passed by run without it, and
    those whose output it has detached get their part of the backward by the next unit's input.

    Args:
        units: in the order in which they run, each with its modules, the first of which to be called gathers it.
    """

    def __init__(self, model: nn.Module, units: Sequence[tuple[FsdpUnit, Sequence[nn.Module]]]) -> None:
        self._units = [unit for unit, _ in units]
        self._next = 0  # the first unit whose turn has not come in this forward
        # units since the last detached input, each with whether its own input had a gradient
        self._reached: list[tuple[FsdpUnit, bool]] = []
        model.register_forward_pre_hook(self._begin, prepend=True)
        for index, (_, modules) in enumerate(units):
            for module in modules:
                # prepended, after FSDP2's own hook was: skipped units come before this module is gathered
                module.register_forward_pre_hook(partial(self._reach, index), prepend=True, with_kwargs=True)
        model.register_forward_hook(self._end, prepend=True)

    def _begin(self, module: nn.Module, args: Any) -> None:
        self._next, self._reached = 0, []

    def _reach(self, index: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if index < self._next:
            return None
        skipped, self._next = self._units[self._next : index], index + 1
        tensors = args, kwargs
        leaves, _ = flatten_tensors(tensors)
        flows = [x.requires_grad for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
        detached: list[tuple[FsdpUnit, bool]] = []
        if flows and not any(flows) and torch.is_grad_enabled():
            detached, self._reached = self._reached, []
        self._reached += [(unit, any(flows)) for unit in [*skipped, self._units[index]]]
        return self._run(detached, skipped, tensors) if detached or skipped else None

    def _end(self, module: nn.Module, args: Any, output: Any) -> Any:
        for unit in self._units:
            output = unit.finish_forward(output)
        skipped, self._next = self._units[self._next :], len(self._units)
        return self._run([], skipped, output) if skipped else output

    def _run(self, detached: Sequence[tuple[FsdpUnit, bool]], skipped: Sequence[FsdpUnit], tensors: Any) -> Any:
        """Run the units' parts that are missing ahead of what reads `tensors`, a tree; returns the tree to read."""
        leaves, rebuild = flatten_tensors(tensors)
        floating = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
        # What a missing part returns is joined to tensors on the way to the loss, so that backward reaches it in its
        # turn.
        on_path = [i for i in floating if leaves[i].requires_grad] or floating[:1]
        device = _device(leaves[on_path[0]]) if on_path else None

        def scalar(flows: bool) -> Tensor:
            flows = flows or any(leaves[i].requires_grad for i in on_path)
            return torch.zeros((), device=device, requires_grad=flows and torch.is_grad_enabled())

        for unit, flowed in detached:
            passed = unit.run_backward_alone(scalar(flowed), trained=bool(unit.parameters()))
            for i in on_path:
                leaves[i] = _Join.apply(leaves[i], passed)
        for unit in skipped:
            trained = bool(unit.parameters()) and torch.is_grad_enabled()
            passed = unit.run_without_forward(scalar(False), trained=trained)
            for i in on_path:
                leaves[i] = _Join.apply(leaves[i], passed)
        return rebuild(leaves)


class _Join(torch.autograd.Function):
    """y = x; in backward x gets y's gradient, and `passed`, a scalar, zero: before what made x, for it is younger."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, passed: Tensor) -> Tensor:
        ctx.dtype, ctx.device = passed.dtype, passed.device
        return x.detach()  # no view, of which FSDP2 would warn, and no copy

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros((), dtype=ctx.dtype, device=ctx.device)


def _device(x: Tensor) -> torch.device:
    return x.to_local().device if isinstance(x, DTensor) else x.device
