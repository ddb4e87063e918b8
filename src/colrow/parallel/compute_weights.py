"""Compute precision without FSDP2: low-precision copies of the parameters, which autograd gives gradients to.

    begin     copies = parameters, rounded               what the optimizer has rounded already stays
    forward   reads the copies, which stand in the parameters' places
    backward  one micro-batch: a copy keeps its gradient;  more: fp32 sums += gradients of the copies, which frees them
    end       the parameters are back; `holder(param).grad` is the gradient

It gives what FSDP2's mixed precision gives where nothing is sharded over data axes, without hooks on modules, in memory
that never moves, which a CUDA graph of forward and backward needs, and without the passes over memory that turn bf16
gradients into fp32 ones where there is nothing to sum. A gradient that is pending over tp (a norm's) is summed in the
parameters' dtype always: `align_gradients` reduces it once a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.sharding.layout import local_tensor
from colrow.torch_compat import foreach, version


class ComputeWeights:
    """Copies in `dtype` of all parameters of `model`, whose tensors must be their final ones.

    The optimizer and checkpoints see the parameters alone; what they write is read at the next `reading` or `summing`.
    torch counts no writes of its fused optimizers: theirs would not be seen.

    Args:
        replayed: a CUDA graph runs each micro-batch: what is done for one is done for all, without Python.

    Attributes:
        copies: by parameter. Who changes a parameter and its copy alike says so: `written`.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, dtype: torch.dtype, *, replayed: bool = False) -> None:
        self._owners = [
            (module, name, param)
            for module in model.modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        self.copies = {param: self._copy_of(param, dtype) for param in model.parameters()}  # a tied one once
        self._replayed = replayed
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._stored: set[nn.Parameter] = set()
        self._keep = self._add_always = False
        self._rounded: dict[nn.Parameter, tuple[int, int, int]] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The model computes with copies of what the parameters are now."""
        with torch.no_grad():
            stale = [param for param in self.copies if self._rounded.get(param) != _version(param)]
            if stale:
                copies, params = [self.copies[param] for param in stale], stale
                foreach("copy_", [local_tensor(t) for t in copies], [local_tensor(t) for t in params])
                self.written(stale)
        self._place(self.copies)
        try:
            yield
        finally:
            self._place({})

    @contextmanager
    def summing(self, micro_batches: int) -> Iterator[None]:
        """`reading`; at its end the holders have the sums over the backwards within, until `drop_gradients`."""
        self._keep = micro_batches == 1
        self._add_always = self._replayed and not self._keep
        self._stored.clear()
        if self._add_always and self._sums:
            foreach("zero_", [local_tensor(total) for total in self._sums.values()])
        with self.reading():
            yield
        for param in self._sums if self._add_always else self._stored:
            param.grad = self._sums[param]

    def holder(self, param: nn.Parameter) -> nn.Parameter:
        """Whose `.grad` is the gradient of `param`: the copy's where it was kept, else the parameter's own."""
        copy = self.copies[param]
        return param if copy.grad is None else copy

    def drop_gradients(self) -> None:
        """Free what the copies keep."""
        for copy in self.copies.values():
            copy.grad = None

    @torch.no_grad()
    def written(self, params: Iterable[nn.Parameter]) -> None:
        """The copies of `params` are what the parameters are."""
        self._rounded.update((param, _version(param)) for param in params)

    def _place(self, instead: Mapping[nn.Parameter, nn.Parameter]) -> None:
        for module, name, param in self._owners:
            module._parameters[name] = instead.get(param, param)

    def _copy_of(self, param: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        copy = nn.Parameter(param.detach().to(dtype, copy=True), requires_grad=param.requires_grad)
        if param.requires_grad:
            copy.register_post_accumulate_grad_hook(partial(self._receive, param))
        return copy

    @torch.no_grad()
    def _receive(self, param: nn.Parameter, copy: Tensor) -> None:
        grad = copy.grad
        assert grad is not None
        pending = isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements)
        if self._keep and not pending:
            return
        copy.grad = None
        if param not in self._sums:
            self._sums[param] = _empty_like(grad, param.dtype)
            if self._add_always:
                local_tensor(self._sums[param]).zero_()
        self._add(param, grad)

    def _add(self, param: nn.Parameter, grad: Tensor) -> None:
        total = local_tensor(self._sums[param])
        if self._add_always or param in self._stored:
            total.add_(local_tensor(grad))
        else:
            self._stored.add(param)
            total.copy_(local_tensor(grad))


def _version(param: nn.Parameter) -> tuple[int, int, int]:
    """Another one as soon as an operation writes into the parameter, or something puts other memory in its place.

    A DTensor's operations are counted at the DTensor, those on its local tensor there. Fused kernels are not counted.
    """
    local = local_tensor(param)
    return local.data_ptr(), version(local), version(param)


def _empty_like(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the gradient's placements, which need not be the parameter's."""
    local = torch.empty_like(local_tensor(grad), dtype=dtype, memory_format=torch.contiguous_format)
    if not isinstance(grad, DTensor):
        return local
    mesh, placements = grad.device_mesh, grad.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride())
