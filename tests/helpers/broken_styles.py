"""Styles of a user's own, each with one error that the check must find."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from helpers import broken_models as m


class BiasOnEveryRank(ParallelStyle):
    """A row linear of a user's own: each rank adds the bias to its part, and the parts are summed."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        import torch.distributed._functional_collectives as funcol

        bias = module.bias
        RowwiseParallel()._apply(module, device_mesh)
        module.register_parameter("bias", nn.Parameter(bias.detach().clone()))

        def forward(x: Any) -> Tensor:
            x = x.to_local() if isinstance(x, DTensor) else x
            b = module.bias.to_local() if isinstance(module.bias, DTensor) else module.bias
            return funcol.all_reduce(F.linear(x, module.weight.to_local()) + b, "sum", device_mesh)

        module.forward = forward  # type: ignore[method-assign]
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
        return module


class SumOfEqual(ParallelStyle):
    """Sums over ranks what is equal on all of them."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        import torch.distributed._functional_collectives as funcol

        module.register_forward_hook(lambda m, args, out: funcol.all_reduce(out, "sum", device_mesh))
        return module


class Detach(ParallelStyle):
    """Cuts the gradient of a module's parameters off."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        placed = {n: distribute_tensor(p.detach(), device_mesh, [Replicate()]) for n, p in module.named_parameters()}
        for name, value in placed.items():
            module.register_parameter(name, nn.Parameter(value))

        def forward(x: Tensor) -> Tensor:
            weight, bias = (module._parameters[name].detach().to_local() for name in ("weight", "bias"))
            return F.layer_norm(x, (m.D,), weight, bias)

        module.forward = forward  # type: ignore[method-assign]
        return module


class TakenAsEqual(ParallelStyle):
    """Hands a replicated activation out as a local tensor without a word on its gradient."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        def hook(module: nn.Module, args: Any) -> Any:
            x = DTensor.from_local(args[0], device_mesh, [Shard(1)], run_check=False)
            return (x.redistribute(placements=[Replicate()]).to_local(), *args[1:])

        module.register_forward_pre_hook(hook)
        return module


class ColumnWithoutReduce(ParallelStyle):
    """A column linear on local tensors that forgets the sum over ranks of its input's gradient."""

    def _apply(self, module: nn.Module, device_mesh: Any) -> nn.Module:
        weight = distribute_tensor(module.get_parameter("weight").detach(), device_mesh, [Shard(0)])
        module.register_parameter("weight", nn.Parameter(weight))
        module.forward = lambda x: F.linear(x, module.weight.to_local())  # type: ignore[assignment,operator,method-assign]
        return module
