"""A small diffusion transformer (DiT), trained to predict the noise in an image.

    torchrun --nproc-per-node 2 examples/beyond_tokens/diffusion.py

The time of the diffusion shifts, scales and gates each block (adaLN): a second input beside the image.
"""

from __future__ import annotations

import math

import loop
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

WIDTH, HEADS, SIDE, PATCH, BATCH, TIMES = 32, 4, 8, 2, 4, 100


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention, self.mlp = loop.Attention(WIDTH, HEADS), loop.Mlp(WIDTH)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(time))[:, None].chunk(6, dim=-1)
        x = x + gate1 * self.attention(self.norm(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm(x) * (1 + scale2) + shift2)


class DiffusionTransformer(nn.Module):
    """Noisy images [B, 3, SIDE, SIDE] and times [B] to the noise [B, 3, SIDE, SIDE]."""

    def __init__(self) -> None:
        super().__init__()
        features = 3 * PATCH * PATCH
        self.patches, self.times = nn.Linear(features, WIDTH), loop.Mlp(WIDTH)
        self.positions = nn.Parameter(torch.randn(1, (SIDE // PATCH) ** 2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, features)

    def forward(self, noisy: Tensor, times: Tensor) -> Tensor:
        patches = F.pixel_unshuffle(noisy, PATCH).flatten(2).transpose(1, 2)
        x = self.patches(patches) + self.positions
        rates = torch.exp(torch.arange(0, WIDTH, 2, device=noisy.device) * (-math.log(10_000) / WIDTH))
        angles = times[:, None] * rates
        time = self.times(torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype))
        for block in self.blocks:
            x = block(x, time)
        noise = self.out(self.norm(x)).transpose(1, 2).unflatten(2, (SIDE // PATCH, SIDE // PATCH))
        return F.pixel_shuffle(noise, PATCH)


def build() -> nn.Module:
    torch.manual_seed(0)
    return DiffusionTransformer()


def batch(step: int) -> loop.Batch:
    """Noisy images, their times, and the noise. The images are planes of a slope."""
    generator = torch.Generator().manual_seed(step)
    slope = torch.linspace(-1, 1, SIDE) * torch.randn(BATCH, 3, SIDE, 1, generator=generator)
    noise = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    times = torch.randint(0, TIMES, (BATCH,), generator=generator)
    kept = torch.cos(0.5 * math.pi * times / TIMES)[:, None, None, None]
    return kept * slope + (1 - kept**2).sqrt() * noise, times, noise


def loss_of(model: nn.Module, given: loop.Batch) -> Tensor:
    noisy, times, noise = given
    return F.mse_loss(model(noisy, times), noise)


def run(mesh: DeviceMesh, steps: int) -> list[float]:
    return loop.train(build(), batch, loss_of, batch(0)[:2], mesh, steps)


if __name__ == "__main__":
    loop.main(run)
