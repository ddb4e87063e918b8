"""Prove a plan by running it: all ranks in one process, the real styles and collectives, against the whole model.

torch's LocalTensorMode runs every rank's tensors side by side on a fake process group. Where torch has none (it is
private), `available` says so and nothing here works.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from colrow.errors import PlanError
from colrow.parallel.layout import boxes_at, packed_of
from colrow.parallel.loss import loss_context
from colrow.parallel.parallelize import parallelize
from colrow.plans.derive.trace import _FirstTensor, call_keywords
from colrow.plans.plan import Plan

try:
    from torch.distributed._local_tensor import LocalTensor, LocalTensorMode, get_local_tensor_mode_list
    from torch.testing._internal.distributed.fake_pg import FakeStore
except ImportError:  # pragma: no cover - depends on the release of torch
    LocalTensor = LocalTensorMode = None  # type: ignore[assignment,misc]

available = LocalTensorMode is not None


@dataclass(frozen=True)
class Parity:
    """How far the parallelised model is from the whole one."""

    loss: float
    """Relative difference of the loss, the worst rank's."""
    gradients: dict[str, float]
    """For each parameter the norm of the difference of gradients over the norm of the gradient, the worst rank's."""

    @property
    def worst(self) -> float:
        return max(self.gradients.values(), default=0.0)


@contextlib.contextmanager
def simulated_ranks(tp: int) -> Iterator[DeviceMesh]:
    """A tp mesh of simulated ranks. Raises PlanError where torch has no LocalTensorMode, or a group exists already."""
    if not available:
        raise PlanError("this torch has no LocalTensorMode: verify with gloo processes instead")
    if dist.is_initialized():
        raise PlanError("a process group exists already: simulated ranks need a process of their own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=tp)
    try:
        with LocalTensorMode(tp):
            yield init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",))
    finally:
        modes = get_local_tensor_mode_list()
        while modes:
            modes.pop()
        dist.destroy_process_group()


def each_rank(x: Tensor) -> list[Tensor]:
    """A local tensor as every simulated rank has it."""
    if isinstance(x, LocalTensor):
        return [x._local_tensors[rank] for rank in sorted(x._local_tensors)]
    return [x]


def parity(model: nn.Module, plan: Plan, tp: int, inputs: tuple[Tensor, ...], seed: int = 0) -> Parity:
    """One forward and backward of `model` under `plan` on simulated ranks, against the model itself.

    `model` is on the CPU and stays as it is. The loss is cross-entropy for [.., vocabulary] logits of token inputs,
    and a random projection of the output otherwise.
    """
    tokens = inputs[0].dtype == torch.long
    reference = copy.deepcopy(model).eval()
    out = _outputs(reference, inputs)
    against = _against(out.detach(), tokens, seed)
    expected_loss = _loss(out, against)
    expected_loss.backward()
    wanted = {name: p.grad for name, p in reference.named_parameters()}
    with simulated_ranks(tp) as mesh:
        local = parallelize(copy.deepcopy(model).eval(), plan, mesh)
        with loss_context(plan, mesh):
            loss = _loss(_outputs(local, inputs), against)
            loss.backward()
        whole = loss.full_tensor() if isinstance(loss, DTensor) else loss
        found = {name: _gradient(local, name, p, tp) for name, p in local.named_parameters()}
        losses = [float(x) for x in each_rank(whole.detach())]
    scale = max(float(g.norm()) for g in wanted.values() if g is not None)
    errors: dict[str, float] = {}
    for name, target in wanted.items():
        if name not in found:
            errors[name] = float("inf")
            continue
        ranks = found[name]
        if target is None or not float(target.norm()):
            errors[name] = max((float(g.norm()) / scale for g in ranks or []), default=0.0)
        elif ranks is None:
            errors[name] = float("inf")
        else:
            floor = 1e-6 * scale
            errors[name] = max(float((g - target).norm()) / max(float(target.norm()), floor) for g in ranks)
    extra = found.keys() - wanted.keys()
    errors |= dict.fromkeys(extra, float("inf"))
    exact = float(expected_loss.detach())
    return Parity(max(abs(x - exact) for x in losses) / max(abs(exact), 1e-12), errors)


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    keywords, names = call_keywords(model)
    return _FirstTensor(model, keywords, names)(*inputs)


def _loss(out: Tensor, against: Tensor) -> Tensor:
    """Cross-entropy with token targets, or a projection on a floating-point tensor."""
    if against.dtype == torch.long:
        return F.cross_entropy(out.flatten(0, 1), against)
    return (out * against).sum()


def _against(out: Tensor, tokens: bool, seed: int) -> Tensor:
    """Made outside the simulation, where all ranks share one generator."""
    generator = torch.Generator().manual_seed(seed)
    if tokens and out.dim() == 3:
        return torch.randint(0, out.shape[-1], (out.shape[0] * out.shape[1],), generator=generator)
    probe = torch.randn(out.shape, generator=generator, dtype=torch.float64) / out.numel() ** 0.5
    return probe.to(out.dtype)


def _gradient(model: nn.Module, name: str, param: Tensor, tp: int) -> list[Tensor] | None:
    """The whole gradient as every rank sees it, in the global order of a packed parameter."""
    grad: Any = param.grad
    if grad is None:
        return None
    if not isinstance(grad, DTensor):
        return each_rank(grad)
    assert isinstance(param, DTensor)
    packed = packed_of(model, name)
    if packed is None:
        return each_rank(grad.full_tensor())
    parts = each_rank(grad.redistribute(placements=param.placements).to_local())
    out = torch.zeros(param.shape, dtype=parts[0].dtype)
    for rank, part in enumerate(parts):
        for box in boxes_at(tuple(param.shape), param.placements, (tp,), (rank,), packed):
            out[box.global_slices] = part[box.local_slices]
    return [out]
