"""Models that are split by channels, or by layers whose outputs are gathered."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, STATES = 8, 3


class SelectiveScan(nn.Module):
    """A Mamba layer in plain code, with its norm and its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = 2 * D
        self.norm, self.into = nn.LayerNorm(D), nn.Linear(D, 2 * self.inner)
        self.conv = nn.Conv1d(self.inner, self.inner, 2, padding=1, groups=self.inner)
        self.select, self.step = nn.Linear(self.inner, 1 + 2 * STATES), nn.Linear(1, self.inner)
        self.decay, self.skip = nn.Parameter(torch.rand(self.inner, STATES)), nn.Parameter(torch.rand(self.inner))
        self.back = nn.Linear(self.inner, D)

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.into(self.norm(x)).chunk(2, -1)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        step, write, read = self.select(u).split([1, STATES, STATES], -1)
        step = F.softplus(self.step(step))
        state = torch.zeros(x.shape[0], self.inner, STATES, dtype=x.dtype, device=x.device)
        out = []
        for t in range(x.shape[1]):
            kept = torch.exp(-step[:, t, :, None] * self.decay)
            state = kept * state + (step * u)[:, t, :, None] * write[:, t, None]
            out.append((state * read[:, t, None]).sum(-1))
        return x + self.back((torch.stack(out, 1) + u * self.skip) * F.silu(gate))


class Branching(nn.Module):
    """It cannot be traced, and normalises over the features of each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(32, 8)
        self.mix, self.old = nn.Linear(8, 12), nn.utils.weight_norm(nn.Conv1d(1, 6, 3, padding=1))
        self.new = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 6, 1))
        self.up, self.out = nn.ConvTranspose1d(6, 4, 2, 2), nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = F.normalize(self.mix(F.normalize(self.bag(ids))))
        if x.sum() > 100:
            x = x * 2
        x = F.normalize(self.new(F.normalize(self.old(x[:, None]))))
        return self.out(self.up(x).relu_().mean(1))


class Normalised(nn.Module):
    """Channels of a batch norm between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.norm, self.back = (
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.norm(self.into(x)).relu()).mean((2, 3))


class Bare(nn.Module):
    """Matrices without modules, on both sides of a residual; an LSTM, and weights in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out = nn.Parameter(torch.randn(20, 8)), nn.Parameter(torch.randn(8, 20))
        self.layers = nn.ParameterList([nn.Parameter(torch.randn(8, 8) / 3) for _ in range(2)])
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed[ids]
        for weight in self.layers:
            x = F.layer_norm(x + F.linear(x, weight).relu(), (8,))
        return self.lstm(x)[0] @ self.out


class FewKvHeads(nn.Module):
    """An attention with q, k and v in one weight, of fewer kv heads than two ranks divide.

    Args:
        kv: their number. One, which every rank uses; or three, of which a rank uses those of its query heads.
    """

    HEADS, WIDTH = 6, 4

    def __init__(self, kv: int) -> None:
        super().__init__()
        self.kv = kv
        self.qkv = nn.Linear(D, (self.HEADS + 2 * kv) * self.WIDTH)
        self.out = nn.Linear(self.HEADS * self.WIDTH, D)

    def forward(self, x: Tensor) -> Tensor:
        sizes = [n * self.WIDTH for n in (self.HEADS, self.kv, self.kv)]
        q, k, v = (y.unflatten(-1, (-1, self.WIDTH)).transpose(1, 2) for y in self.qkv(x).split(sizes, -1))
        k, v = (y.repeat_interleave(self.HEADS // self.kv, 1) for y in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
