"""A plain PyTorch loop around a model of one's own: derive a plan, check it, apply it, train.

    torchrun --nproc-per-node 2 examples/library/plain_loop.py

Four lines are colrow's; all else is what the loop would be on one device.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import colrow

VOCAB, WIDTH, HEADS, TOKENS, BATCH = 512, 64, 4, 32, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        q, k, v = (part.view(B, T, HEADS, WIDTH // HEADS).transpose(1, 2) for part in (q, k, v))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).reshape(B, T, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Token ids [B, T] to logits [B, T, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Ids and targets [BATCH, TOKENS]: by the step alone, so that every rank of a tp group reads the same batch."""
    start = torch.randint(0, VOCAB, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    ids = (start + 3 * torch.arange(TOKENS + 1)) % VOCAB
    return ids[:, :-1], ids[:, 1:]


def train(mesh: DeviceMesh, steps: int = 20) -> list[float]:
    """The losses of `steps` steps. Collective over `mesh`, which has an axis named tp."""
    tp, device = mesh["tp"].size(), torch.device(mesh.device_type)
    torch.manual_seed(0)
    model = Gpt()

    plan = colrow.Plan.derive(model, tp=tp)
    findings = colrow.check(model, plan, colrow.Mesh(tp=tp), batch_size=BATCH, seq_len=TOKENS)
    if any(finding.severity == "error" for finding in findings):
        raise SystemExit("\n".join(map(str, findings)))
    colrow.parallelize(model, plan, mesh)
    model.to(device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)  # after parallelize: it holds what trains
    losses = []
    for step in range(steps):
        ids, targets = (x.to(device) for x in batch(step))
        with colrow.loss_context(plan, mesh):  # forward of the loss and backward: logits stay split over the vocabulary
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    for step, loss in enumerate(train(mesh)):
        if dist.get_rank() == 0:
            print(f"step {step} loss {loss:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
