"""A vision transformer with a class token, trained to classify images.

    torchrun --nproc-per-node 2 examples/beyond_tokens/image.py

17 tokens (16 patches and the class token) are no multiple of tp: the derived plan splits heads and features, and leaves
the sequence alone.
"""

from __future__ import annotations

import loop
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

WIDTH, HEADS, CLASSES, BATCH = 32, 4, 10, 6


class VisionTransformer(nn.Module):
    """Pixels [B, 3, 32, 32] to logits [B, CLASSES]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, kernel_size=8, stride=8)
        self.first = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 17, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(loop.Block(WIDTH, HEADS) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


def build() -> nn.Module:
    torch.manual_seed(0)
    return VisionTransformer()


def batch(step: int) -> loop.Batch:
    """Images whose brightness falls with their class, and the classes."""
    generator = torch.Generator().manual_seed(step)
    classes = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    return torch.randn(BATCH, 3, 32, 32, generator=generator) - classes[:, None, None, None] / CLASSES, classes


def loss_of(model: nn.Module, given: loop.Batch) -> Tensor:
    pixels, classes = given
    return F.cross_entropy(model(pixels), classes)


def run(mesh: DeviceMesh, steps: int) -> list[float]:
    return loop.train(build(), batch, loss_of, batch(0)[:1], mesh, steps)


if __name__ == "__main__":
    loop.main(run)
