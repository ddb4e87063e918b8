"""The loop of image.py, audio.py and diffusion.py: derive a plan once, apply it, train with a loss of one's own.

`colrow train` reads tokens. For anything else write the loop as here: what a model takes, what its loss is, and where
its batches come from are yours; five lines are colrow's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import colrow
from colrow.plans.derive_options import DeriveOptions

Batch = tuple[Tensor, ...]


class Attention(nn.Module):
    """[B, T, D] to [B, T, D]; each token sees all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Attention and MLP on a residual stream, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def derived_once(model: nn.Module, mesh: DeviceMesh, inputs: Batch) -> colrow.Plan:
    """A plan for the mesh's tp axis, derived by the first rank: the others wait for it. Its loss is `replicated`: every
    rank gets the complete output, so any loss can follow."""
    text: list[Any] = [None]
    if dist.get_rank() == 0:
        options = DeriveOptions(loss="replicated")
        text[0] = colrow.Plan.derive(model, tp=mesh["tp"].size(), inputs=inputs, options=options).to_yaml()
    dist.broadcast_object_list(text)
    return colrow.Plan.from_yaml(text[0])


def train(
    model: nn.Module,
    batch: Callable[[int], Batch],
    loss_of: Callable[[nn.Module, Batch], Tensor],
    inputs: Batch,
    mesh: DeviceMesh,
    steps: int,
) -> list[float]:
    """The losses of `steps` steps. Collective over `mesh`, which has an axis named tp.

    Args:
        batch: the tensors of a step, the same on each rank of a tp group.
        loss_of: a scalar, from the model and a batch.
        inputs: what the model takes, for the derivation: its values do not count, its sizes do.
    """
    plan = derived_once(model, mesh, inputs)
    colrow.parallelize(model, plan, mesh)
    model.to(mesh.device_type)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after parallelize: it holds what trains
    losses = []
    for step in range(steps):
        with colrow.loss_context(plan, mesh):
            loss = loss_of(model, tuple(x.to(mesh.device_type) for x in batch(step)))
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(run: Callable[[DeviceMesh, int], list[float]], steps: int = 20) -> None:
    """Join the ranks that torchrun has started, train, and print the losses."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    for step, loss in enumerate(run(mesh, steps)):
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss:.4f}")
    dist.destroy_process_group()
