"""Compute precision without FSDP2: low-precision copies of the parameters, and sums of the copies' gradients.

    begin     copies = parameters, rounded;  sums = 0
    forward   reads the copies, which stand in the parameters' places
    backward  sums += gradients of the copies             each as soon as it is there, which frees it
    end       the parameters are back, their `.grad` the sums

It gives what FSDP2's mixed precision gives where nothing is sharded over data axes, in memory that never moves and
without hooks on modules: a CUDA graph of forward and backward needs both. A gradient that is pending over tp (a norm's)
is added up pending, in the parameters' dtype, and `align_gradients` reduces it once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.parallel.layout import local_tensor


class ComputeWeights:
    """Copies in `dtype` of all parameters of `model`, whose tensors must be their final ones.

    The optimizer and checkpoints see the parameters alone; what they write is read at the next `reading` or `summing`.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._owners = [
            (module, name, param)
            for module in model.modules()
            for name, param in module._parameters.items()
            if param is not None
        ]
        self._copies = {param: self._copy_of(param, dtype) for param in model.parameters()}  # a tied one once
        self._sums: dict[nn.Parameter, Tensor] = {}

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The model computes with copies of what the parameters are now."""
        with torch.no_grad():
            copies, params = ([local_tensor(t) for t in side] for side in (self._copies.values(), self._copies))
            torch._foreach_copy_(copies, params)
        self._place(self._copies)
        try:
            yield
        finally:
            self._place({})

    @contextmanager
    def summing(self) -> Iterator[None]:
        """`reading`; at its end each `.grad` is the sum over the backwards within, good until the next `summing`."""
        if self._sums:
            torch._foreach_zero_([local_tensor(total) for total in self._sums.values()])
        with self.reading():
            yield
        for param, total in self._sums.items():
            param.grad = total

    def _place(self, instead: Mapping[nn.Parameter, nn.Parameter]) -> None:
        for module, name, param in self._owners:
            module._parameters[name] = instead.get(param, param)

    def _copy_of(self, param: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        copy = nn.Parameter(param.detach().to(dtype, copy=True), requires_grad=param.requires_grad)
        if param.requires_grad:
            copy.register_post_accumulate_grad_hook(partial(self._add, param))
        return copy

    @torch.no_grad()
    def _add(self, param: nn.Parameter, copy: Tensor) -> None:
        grad, copy.grad = copy.grad, None
        assert grad is not None
        if param not in self._sums:
            self._sums[param] = _zeros_like(grad, param.dtype)
        local_tensor(self._sums[param]).add_(local_tensor(grad))


def _zeros_like(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the gradient's placements, which need not be the parameter's."""
    local = torch.zeros_like(local_tensor(grad), dtype=dtype, memory_format=torch.contiguous_format)
    if not isinstance(grad, DTensor):
        return local
    mesh, placements = grad.device_mesh, grad.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride())
