"""Parity of a parallel model with the unsharded one: loss, every gradient, and parameters after optimizer steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.config_sections import TrainSection
from colrow.mesh import Mesh
from colrow.models.llama import Llama, LlamaConfig
from colrow.parallel.loss import loss_context, model_loss
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients, clip_scale, grad_norm
from colrow.sharding.layout import full_tensor, local_tensor, packed_of
from colrow.train.optimizer import build_optimizer

TINY = LlamaConfig(
    vocab_size=64,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=4,
    max_position_embeddings=64,
)
MODELS: dict[str, LlamaConfig] = {
    "gqa": TINY,
    "kv3": replace(TINY, num_key_value_heads=3),  # 3 kv heads divide by neither 2 nor 4
    "kv1": replace(TINY, num_key_value_heads=1),
    "tied": replace(TINY, tie_word_embeddings=True),
    "bias": replace(TINY, attention_bias=True, num_key_value_heads=3),
    "qk_norm": replace(TINY, qk_norm=True),
    "qk_norm_kv3": replace(TINY, qk_norm=True, num_key_value_heads=3),
    "odd": replace(TINY, vocab_size=65),  # 33 + 32 rows, or 17 + 17 + 17 + 14
    "odd_tied": replace(TINY, vocab_size=65, tie_word_embeddings=True),
}
SHALLOW_MODELS = {f"{name}-1": replace(config, num_hidden_layers=1) for name, config in MODELS.items()}
DEEP_MODELS = {  # for several pipeline stages on a rank
    "deep": replace(TINY, num_hidden_layers=4),
    "deep_tied": replace(TINY, num_hidden_layers=4, tie_word_embeddings=True),
}


@dataclass
class Difference:
    """Relative errors against the reference: max |a - b| / max |b|."""

    loss: float
    gradients: dict[str, float]
    parameters: dict[str, float]

    @property
    def worst(self) -> float:
        return max([self.loss, *self.gradients.values(), *self.parameters.values()])


def build(name: str, device: str, dtype: torch.dtype = torch.float64) -> Llama:
    """The reference model with every parameter drawn at random: no weight of one hides a missing factor."""
    torch.manual_seed(0)
    model = Llama((MODELS | SHALLOW_MODELS | DEEP_MODELS)[name])
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn(param.shape) * 0.2 + (1.0 if param.ndim == 1 else 0.0))
    return model.to(device=device, dtype=dtype)


def batch(device: str, vocab: int = 64, size: int = 4, seq: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (size, seq + 1), generator=generator).to(device)
    return ids[:, :-1], ids[:, 1:]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def relative(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Reference:
    """What one process sees in some steps on the global batches of seeds 0, 1, ...

    `losses` and `norms` are of each step; `gradients` of the first; `parameters` and `model` of the end.
    """

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    model: Llama


def optimizer_of(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The trainer's own, at a rate that five steps show."""
    params = list(params)
    section = TrainSection(steps=1, global_batch=1, micro_batch=1, lr=1e-2)
    return build_optimizer(params, section, {param for param in params if param.ndim >= 2})


@functools.cache
def train_reference(name: str, device: str, steps: int, size: int, max_norm: float | None = None) -> Reference:
    """Once for all cases of a model: it does not depend on a plan or a mesh."""
    model = build(name, device)
    optimizer = optimizer_of(model.parameters())
    losses, norms, gradients = [], [], {}
    for step in range(steps):
        ids, targets = batch(device, size=size, seed=step)
        loss = cross_entropy(model(ids), targets)
        loss.backward()
        norm = grad_norm(model.parameters())
        losses.append(loss.item())
        norms.append(norm.item())
        if step == 0:
            gradients = {name: _present(p.grad).clone() for name, p in model.named_parameters(remove_duplicate=False)}
        if max_norm is not None:
            assert norms[-1] > max_norm, "clipping is on in every step"
            clip_gradients(model.parameters(), norm, max_norm)
        optimizer.step()
        optimizer.zero_grad()
    parameters = {name: p.detach() for name, p in model.named_parameters(remove_duplicate=False)}
    return Reference(losses, norms, gradients, parameters, model)


@torch.no_grad()
def clip_gradients(params: Iterable[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Scale every gradient by max_norm / norm where the norm is larger, as an update does."""
    for param in params:
        if param.grad is not None:
            local_tensor(param.grad).mul_(clip_scale(norm, max_norm))


def _present(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad


def tp_difference(
    device: str,
    name: str,
    plan: Plan,
    mesh: DeviceMesh,
    steps: int = 5,
    data: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    before_step: Callable[[nn.Module], Any] = lambda model: align_gradients(model.parameters()),
) -> Difference:
    """Train a model under the plan, and compare loss and gradients (step 0) and the last parameters with one process's.

    Args:
        data: what a rank reads in a step, if not the global batch.
    """
    want = train_reference(name, device, steps, size=4)
    data = data or (lambda step: batch(device, seed=step))
    model = parallelize(build(name, device), plan, mesh)
    optimizer = optimizer_of(model.parameters())
    loss_error, gradients = 0.0, {}
    for step in range(steps):
        ids, targets = data(step)
        with loss_context(plan, mesh):
            loss = model_loss(model, plan, mesh, ids, targets)
            loss.backward()
        before_step(model)
        if step == 0:
            loss_error = abs(whole(loss).item() - want.losses[0]) / abs(want.losses[0])
            for key, param in model.named_parameters():
                assert param.grad is not None, f"{key} has no gradient"
                got = param.grad
                assert isinstance(got, DTensor)
                gradients[key] = relative(full_tensor(got, packed_of(model, key)), want.gradients[key])
            assert gradients.keys() == dict(want.model.named_parameters()).keys()
        optimizer.step()
        optimizer.zero_grad()
    parameters = {
        key: relative(full_tensor(param.detach(), packed_of(model, key)), want.parameters[key])
        for key, param in model.named_parameters()
    }
    return Difference(loss_error, gradients, parameters)


def tp_mesh(device: str, tp: int) -> DeviceMesh:
    return Mesh(tp=tp).build(device, tp)
