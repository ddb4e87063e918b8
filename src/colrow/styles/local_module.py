"""How activations enter and leave a module that runs on its shards: gathered or sliced, and summed over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from colrow.errors import PlanError
from colrow.styles.local_buffers import view_buffers
from colrow.styles.shards import ShardSpec, shard_parameters
from colrow.torch_compat import all_gather, all_reduce, reduce_scatter, replaced

GRADS_SUMMED_AT_ENTRY = "_colrow_grads_summed_at_entry"
"""Marks the modules of a block that hands them local tensors and sums these tensors' gradients where it gathers them:
a style inside that gathered its own input would sum them a second time."""


def mark_grads_summed_at_entry(block: nn.Module) -> None:
    """Set the mark on a block and every module inside it."""
    for module in block.modules():
        setattr(module, GRADS_SUMMED_AT_ENTRY, True)


class ShardedModuleStyle(ParallelStyle):
    """Shards the parameters, and redistributes the first input and the output to the requested layouts.

    Args:
        partial: the output is a sum over ranks, and the input this rank's shard of the last dimension; else the input
            is gathered.
        outside: the layout of the input where the plan gives none and no block around the module gathers it.
        gather: the output is a shard of this dim, and is gathered.
        used_inside: each rank uses the sum in its own way, so that the gradient is summed over ranks, too.
    """

    def __init__(
        self,
        specs: dict[str, ShardSpec],
        input: Placement | None,
        output: Placement | None,
        partial: bool,
        outside: Placement | None = None,
        used_inside: bool = False,
        gather: int | None = None,
    ) -> None:
        self.specs, self.input, self.output, self.partial = specs, input, output, partial
        self.outside, self.used_inside, self.gather = outside, used_inside, gather

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        mesh, partial, output = device_mesh, self.partial, self.output
        shard_parameters(module, mesh, self.specs, self.src_data_rank)
        view_buffers(module, mesh, self.specs)
        input = self.input
        if input is None and not getattr(module, GRADS_SUMMED_AT_ENTRY, False):
            input = self.outside

        def before(_: nn.Module, args: Any) -> Any:
            return (local_input(args[0], mesh, input, gather=not partial), *args[1:]) if args else None

        module.register_forward_pre_hook(before)
        if (dim := self.gather) is not None:
            module.register_forward_hook(lambda _, __, out: gathered_output(out, mesh, dim))
        if partial and output is not None and not output.is_partial():
            module.register_forward_hook(lambda _, __, out: sum_over_ranks(out, mesh, output))
            if self.used_inside:  # forward changes nothing; backward all-reduces the ranks' terms of the gradient
                module.register_forward_hook(lambda _, __, out: local_input(out, mesh, output, gather=True))
        return module


def local_input(x: Any, mesh: DeviceMesh, layout: Placement | None, gather: bool) -> Any:
    """`x` as a local tensor. `gather`: complete, its gradient a sum over ranks; otherwise this rank's shard of the
    last dimension. A plain tensor without a layout is left as it is.

    gather, x sharded      forward  all_gather    backward  reduce_scatter
    gather, x replicated   forward  x             backward  all_reduce
    """
    if not isinstance(x, DTensor):
        if layout is None or not isinstance(x, Tensor):
            return x
        x = DTensor.from_local(x, mesh, [layout], run_check=False)
    if gather:  # Partial: each rank's code gives one term of the gradient, and the redistribution's backward sums them
        return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return x.redistribute(placements=[Shard(x.ndim - 1)]).to_local()


def gathered_output(out: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """The complete output, of which `out` is this rank's shard of `dim`; its gradient is the same on all ranks."""
    shards = DTensor.from_local(out, mesh, [Shard(dim % out.ndim)], run_check=False)
    out = shards.redistribute(placements=[Replicate()]).to_local()
    return torch.ops.aten._unsafe_view.default(out, out.shape)  # what a model may write into: see styles.linear


def sum_over_ranks(out: Any, mesh: DeviceMesh, layout: Placement) -> Any:
    """The sum over ranks of `out`, in `layout`: replicated, or a shard of one dimension."""
    if isinstance(out, DTensor):
        # _SumOverRanks returns the complete gradient of a term on every rank: no redistribution may sum it again
        out = out.to_local(grad_placements=[Replicate()])
    return _SumOverRanks.apply(out, mesh, layout.dim if isinstance(layout, Shard) else None)


@contextmanager
def watched_sums(watch: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within, `watch(NAME, function)` stands for the sum over ranks (`sum`) and its backward (`sum_backward`)."""
    forward, backward = watch("sum", _SumOverRanks.forward), watch("sum_backward", _SumOverRanks.backward)
    with replaced(_SumOverRanks, forward=staticmethod(forward), backward=staticmethod(backward)):
        yield


class _SumOverRanks(torch.autograd.Function):
    """y = sum over ranks of x, replicated or a shard of one dimension.

    forward   y = all_reduce(x)      or  reduce_scatter(x)
    backward  dx = dy                or  all_gather(dy)

    The result is a tensor of its own, so that a model may add to it in place.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, dim: int | None) -> Tensor:
        ctx.mesh, ctx.dim = mesh, dim
        if dim is None:
            return all_reduce(x, mesh)
        if x.shape[dim] % mesh.size():
            raise PlanError(
                f"extent {x.shape[dim]} of dim {dim} is not divisible by tp={mesh.size()}: pad the sequence"
            )
        return reduce_scatter(x, dim, mesh)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (dy,) = gradients
        if ctx.dim is not None:
            dy = all_gather(dy, ctx.dim, ctx.mesh)
        return dy, None, None
