"""Parity of a parallel model with the unsharded one: loss, every gradient, and parameters after optimizer steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.mesh import Mesh
from colrow.models.llama import Llama, LlamaConfig
from colrow.parallel.grad_norm import align_gradients
from colrow.parallel.layout import full_tensor, packed_of
from colrow.parallel.loss import loss_context, model_loss
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan

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
}
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
    model = Llama((MODELS | DEEP_MODELS)[name])
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


def tp_difference(
    device: str,
    reference: nn.Module,
    plan: Plan,
    mesh: DeviceMesh,
    steps: int = 5,
    data: Callable[[int], tuple[Tensor, Tensor]] | None = None,
    before_step: Callable[[nn.Module], Any] = lambda model: align_gradients(model.parameters()),
) -> Difference:
    """Train a copy of `reference` under the plan beside it, and compare loss, gradients (step 0) and parameters."""
    data = data or (lambda step: batch(device, seed=step))
    model = parallelize(copy.deepcopy(reference), plan, mesh)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False) for m in (reference, model)]
    loss_error, gradients = 0.0, {}
    for step in range(steps):
        ids, targets = batch(device, seed=step)
        want = cross_entropy(reference(ids), targets)
        want.backward()
        ids, targets = data(step)
        with loss_context(plan, mesh):
            loss = model_loss(model, plan, mesh, ids, targets)
            loss.backward()
        before_step(model)
        if step == 0:
            loss_error = abs(whole(loss).item() - want.item()) / abs(want.item())
            expected = {name: param.grad for name, param in reference.named_parameters()}
            for name, param in model.named_parameters():
                assert param.grad is not None, f"{name} has no gradient"
                got = param.grad
                assert isinstance(got, DTensor)
                gradients[name] = relative(full_tensor(got, packed_of(model, name)), expected[name])
            assert gradients.keys() == expected.keys()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    expected = dict(reference.named_parameters())
    parameters = {
        name: relative(full_tensor(param.detach(), packed_of(model, name)), expected[name].detach())
        for name, param in model.named_parameters()
    }
    return Difference(loss_error, gradients, parameters)


def tp_mesh(device: str, tp: int) -> DeviceMesh:
    return Mesh(tp=tp).build(device, tp)
