"""Lightning Fabric around a model that colrow has split: tensor and data parallelism in Fabric's own strategy.

    pip install lightning-fabric
    python examples/library/fabric_loop.py

`ModelParallelStrategy` makes a 2-D mesh with the axes `data_parallel` and `tensor_parallel`, and calls `split` with
the model on the meta device and that mesh. Data parallelism is FSDP2's there, as in Lightning's own examples.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

import colrow

VOCAB, WIDTH, TOKENS, BATCH = 512, 64, 32, 8


class Mlp(nn.Module):
    """A small next-token model without attention: ids [B, T] to logits [B, T, VOCAB]."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


PLAN = colrow.Plan(
    {"up": "colwise", "down": "rowwise", "head": {"style": "colwise", "output": "replicate"}}, loss="replicated"
)


def split(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """What Fabric calls to make the model parallel."""
    colrow.parallelize(model, PLAN, mesh["tensor_parallel"])
    if mesh["data_parallel"].size() > 1:
        fully_shard(model, mesh=mesh["data_parallel"])
    return model


def batch(step: int, data_rank: int) -> tuple[Tensor, Tensor]:
    """Ids and targets [BATCH, TOKENS]; the same on every rank of a tp group."""
    start = torch.randint(0, VOCAB, (BATCH, 1), generator=torch.Generator().manual_seed(1000 * data_rank + step))
    ids = (start + 3 * torch.arange(TOKENS + 1)) % VOCAB
    return ids[:, :-1], ids[:, 1:]


def train(fabric: Any, steps: int = 20) -> list[float]:
    """The losses of `steps` steps under a Fabric that has been launched."""
    torch.manual_seed(0)
    model = fabric.setup(Mlp())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), lr=3e-3))
    data_rank = fabric.strategy.device_mesh["data_parallel"].get_local_rank()
    losses = []
    for step in range(steps):
        ids, targets = (x.to(fabric.device) for x in batch(step, data_rank))
        with colrow.loss_context(PLAN, fabric.strategy.device_mesh["tensor_parallel"]):
            loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
            fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(split, data_parallel_size=1, tensor_parallel_size=2)
    fabric = Fabric(accelerator="auto", devices=2, strategy=strategy)
    fabric.launch()
    for step, loss in enumerate(train(fabric)):
        fabric.print(f"step {step} loss {loss:.4f}")


if __name__ == "__main__":
    main()
