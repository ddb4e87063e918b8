"""One step: forward, loss, backward, gradients redistributed to their parameters' placements, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.dryrun.calls import Loss, call_model, give_targets
from colrow.parallel.loss import loss_context
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import packed_of
from colrow.verifying.comparison import Observed, Reference, Sharded, Shards


@dataclass(frozen=True)
class Task:
    """The input of every rank: the unsharded model, its inputs, and the loss."""

    model: nn.Module
    inputs: tuple[Any, ...]
    loss: Loss
    tp: int


def reference_step(task: Task, model: nn.Module) -> Reference:
    """The step of the unsharded model, which is changed in place."""
    loss = task.loss(call_model(model, task.inputs), task.inputs)
    loss.backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    _optimizer(model).step()
    return Reference(loss.item(), gradients, {name: param.detach() for name, param in model.named_parameters()})


def sharded_step(
    task: Task,
    model: nn.Module,
    plan: Plan,
    mesh: DeviceMesh,
    shards_of: Callable[[Tensor], Shards],
) -> Observed:
    """The step of the parallelised model, which is changed in place.

    `shards_of` returns a local tensor's value on each rank that runs in this process.
    """
    parallelize(model, plan, mesh)
    with loss_context(plan, mesh):
        give_targets(model, plan, task.inputs)
        output = call_model(model, task.inputs)
        loss = output if plan.loss == "linear" else task.loss(output, task.inputs)
        loss.backward()
    align_gradients(model.parameters())
    observed = Observed(losses={rank: value.item() for rank, value in shards_of(_local(loss)).items()})
    for name, param in model.named_parameters():
        if param.grad is not None:
            observed.gradients[name] = _sharded(model, name, param.grad, shards_of)
    _optimizer(model).step()
    for name, param in model.named_parameters():
        observed.parameters[name] = _sharded(model, name, param, shards_of)
    return observed


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with an eps far above rounding: otherwise a gradient of 1e-17 gives a step of full size."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-3, eps=1e-3, foreach=False)


def _sharded(model: nn.Module, name: str, tensor: Tensor, shards_of: Callable[[Tensor], Shards]) -> Sharded:
    tensor = tensor.detach()
    assert isinstance(tensor, DTensor)
    values = {rank: value.clone() for rank, value in shards_of(_local(tensor)).items()}
    return Sharded(tuple(tensor.shape), tuple(tensor.placements), packed_of(model, name), values)


def _local(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.wait() if type(local).__name__ == "AsyncCollectiveTensor" else local  # type: ignore[attr-defined]
