"""Compute precision without FSDP2: low-precision copies of the parameters, which get the gradients.

    begin     copies = round(parameters)      but for those that the optimizer's kernel has written already
    forward   the copies stand in `module._parameters`, where the parameters were
    backward  one micro-batch: each copy keeps its gradient;  more: fp32 sums += gradients of copies, then freed
    end       the parameters are back; `grad_holder(param).grad` is the gradient

The results are those of FSDP2's mixed precision where data axes shard nothing. There are no hooks on modules, the
copies never move (a CUDA graph of forward and backward needs that), and a single bf16 gradient is not copied to fp32. A
gradient that is a partial sum over tp (a norm's) goes to fp32 all the same: `align_gradients` reduces it once a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.parallel.weight_copies import WeightCopies
from colrow.sharding.layout import local_tensor
from colrow.sharding.parameter_state import refuse_hooks, state_of
from colrow.torch_compat import foreach


class ComputeWeights(WeightCopies):
    """Copies in `dtype` of all parameters of `model`, which keep the gradients.

    Args:
        graphed: a CUDA graph runs each micro-batch, so all micro-batches run the same kernels: sums start from zeros,
            and the first gradient is added too instead of being copied.

    Raises:
        ConfigError: a parameter has a hook, which would run on the copy's gradient or not at all.
    """

    copies: dict[nn.Parameter, nn.Parameter]

    @torch.no_grad()
    def __init__(self, model: nn.Module, dtype: torch.dtype, *, graphed: bool = False) -> None:
        refuse_hooks(model, "compute precision without FSDP2")
        super().__init__(model)
        self.copies = {param: self._copy_of(param, dtype) for param in model.parameters()}  # a tied one once
        self._graphed = graphed
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._has_sum: set[nn.Parameter] = set()  # whose entry of `_sums` holds this step's gradients
        self._keep_on_copies = self._always_add = False

    @contextmanager
    def accumulate(self, micro_batches: int) -> Iterator[None]:
        self._keep_on_copies = micro_batches == 1
        self._always_add = self._graphed and not self._keep_on_copies
        self._has_sum.clear()
        if self._always_add and self._sums:
            foreach("zero_", [local_tensor(total) for total in self._sums.values()])
        with self.use_copies():
            yield
        for param in self._sums if self._always_add else self._has_sum:
            param.grad = self._sums[param]

    def grad_holder(self, param: nn.Parameter) -> nn.Parameter:
        """The parameter's copy where that kept the gradient, else `param` itself."""
        copy = self.copies[param]
        return param if copy.grad is None else copy

    def drop_gradients(self) -> None:
        for copy in self.copies.values():
            copy.grad = None

    def _placed(self) -> Mapping[nn.Parameter, nn.Parameter]:
        return self.copies

    def _copy_of(self, param: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        copy = nn.Parameter(param.detach().to(dtype, copy=True), requires_grad=param.requires_grad)
        copy.__dict__.update(state_of(param).attributes)
        if param.requires_grad:
            copy.register_post_accumulate_grad_hook(partial(self._receive, param))
        return copy

    @torch.no_grad()
    def _receive(self, param: nn.Parameter, copy: Tensor) -> None:
        grad = copy.grad
        assert grad is not None
        partial_over_tp = isinstance(grad, DTensor) and any(placement.is_partial() for placement in grad.placements)
        if self._keep_on_copies and not partial_over_tp:
            return
        copy.grad = None  # in the hook: of all low-precision gradients only one is alive at a time
        grad = _own_part(grad, param)  # before the sum is made, which takes its shape
        if param not in self._sums:
            self._sums[param] = _empty_like(grad, param.dtype)
            if self._always_add:
                local_tensor(self._sums[param]).zero_()
        self._add(param, grad)

    def _add(self, param: nn.Parameter, grad: Tensor) -> None:
        total = local_tensor(self._sums[param])
        if self._always_add or param in self._has_sum:
            total.add_(local_tensor(grad))
        else:
            self._has_sum.add(param)
            total.copy_(local_tensor(grad))


def _own_part(grad: Tensor, param: nn.Parameter) -> Tensor:
    """The rank's shard of a gradient that every rank has complete: DTensor gives that to an embedding split by rows.
    Its fp32 sum would be as large as the table; the slice needs no communication."""
    if not (isinstance(grad, DTensor) and isinstance(param, DTensor)) or grad.placements == param.placements:
        return grad
    pairs = zip(grad.placements, param.placements, strict=True)
    if all(got == want or got.is_replicate() for got, want in pairs):
        return grad.redistribute(placements=param.placements)
    return grad


def _empty_like(grad: Tensor, dtype: torch.dtype) -> Tensor:
    """Has the gradient's placements, which need not be the parameter's."""
    local = torch.empty_like(local_tensor(grad), dtype=dtype, memory_format=torch.contiguous_format)
    if not isinstance(grad, DTensor):
        return local
    mesh, placements = grad.device_mesh, grad.placements
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=grad.shape, stride=grad.stride())
