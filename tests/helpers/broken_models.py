"""Small models, sound and broken, for the tests of check and verify."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.layers import Language

V, D, H, E = 64, 32, 8, 4


class Attention(nn.Module):
    """Attention with q, k, v in one weight; `order` says how they lie in it."""

    def __init__(self, order: str = "parts", dropout: float = 0.0, bias: bool = False) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=bias)
        self.out = nn.Linear(D, D, bias=bias)
        self.order, self.dropout = order, dropout

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        B, T, _ = qkv.shape
        if self.order == "parts":  # [q | k | v]
            q, k, v = (t.view(B, T, -1, E).transpose(1, 2) for t in qkv.chunk(3, dim=-1))
        elif self.order == "view":  # the same, by a view
            q, k, v = qkv.view(B, T, 3, -1, E).permute(2, 0, 3, 1, 4)
        else:  # [q0 k0 v0 | q1 k1 v1 | ...]: head by head, which a plain column split does not cut
            q, k, v = qkv.view(B, T, -1, 3 * E).transpose(1, 2).chunk(3, dim=-1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        return self.out(o.transpose(1, 2).reshape(B, T, -1))


class HeadCount(nn.Module):
    """Attention that writes the number of heads into its views."""

    def __init__(self, form: str = "view") -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))
        self.form = form

    def heads(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        if self.form == "view":
            return x.view(B, T, H, -1).transpose(1, 2)
        if self.form == "unflatten":
            return x.unflatten(-1, (H, -1)).transpose(1, 2)
        return x.reshape(B, T, H, x.shape[-1] // H).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(w(x)) for w in (self.q, self.k, self.v))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(o.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """Gate and up in one weight."""

    def __init__(self, call: str = "chunk") -> None:
        super().__init__()
        self.gate_up = nn.Linear(D, 4 * D, bias=False)
        self.down = nn.Linear(2 * D, D, bias=False)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        gate, up = both.chunk(2, dim=-1) if self.call == "chunk" else both.split(both.shape[-1] // 2, dim=-1)
        return self.down(F.silu(gate) * up)


class MLP(nn.Module):
    def __init__(self, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D, bias=bias), nn.Linear(4 * D, D, bias=bias)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(F.gelu(self.up(x))))


class LatentNormMLP(nn.Module):
    """A norm between the column and the row linear: over a part of the features it is another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 4 * D, bias=False), nn.Linear(4 * D, D, bias=False)
        self.scale = Scale(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.scale(self.up(x)))


class Scale(nn.Module):
    def __init__(self, size: int = D) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


class KeywordMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(input=F.gelu(self.up(input=x)))


class ValueMLP(MLP):
    """Takes a branch by what the values are."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum().item() > 0 else -x)


class SoftmaxMLP(MLP):
    """Its features compete with each other, as a router's experts do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).softmax(-1))


class NormedMLP(MLP):
    """Divides its features by their norm."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h / h.norm(dim=-1, keepdim=True))


class ScaledLinear(nn.Linear):
    """A linear layer with a scale of its own for each output, kept as a buffer."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, bias=False)
        self.register_buffer("scale", torch.ones(o))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


class LoraLinear(nn.Linear):
    """A linear layer with its adapter inside."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o, bias=False)
        self.a, self.b = nn.Linear(i, 2, bias=False), nn.Linear(2, o, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.b(self.a(x))


class OwnLinear(nn.Module):
    """A linear layer of the user's own class."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(o, i))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Block(nn.Module):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(D), attention, nn.LayerNorm(D), mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class AveragingBlock(Block):
    """Keeps a moving average of the last token, written in place."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__(attention, mlp)
        self.register_buffer("average", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.average: Tensor
        self.average.mul_(0.9).add_(x.detach()[0, -1], alpha=0.1)
        return super().forward(x)


class AssigningBlock(AveragingBlock):
    """The same, by assignment."""

    def forward(self, x: Tensor) -> Tensor:
        self.average = 0.9 * self.average + 0.1 * x.detach()[0, -1]
        return Block.forward(self, x)


class BatchNormBlock(Block):
    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__(attention, mlp)
        self.bn = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.bn(x.transpose(1, 2)).transpose(1, 2)
        return super().forward(x)


class AdapterBlock(Block):
    """A block with a low-rank adapter beside its MLP."""

    def __init__(self, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__(attention, mlp)
        self.a, self.b = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        h = self.norm2(x)
        return x + self.mlp(h) + self.b(self.a(h))


class Gpt(Language):
    """A decoder of `layers` blocks."""

    def __init__(
        self,
        attention: Any = lambda: Attention("heads"),
        mlp: Any = MLP,
        layers: int = 1,
        tied: bool = False,
        block: Any = Block,
    ) -> None:
        super().__init__(D, V, (block(attention(), mlp()) for _ in range(layers)))
        if tied:
            self.head.weight = self.embed.weight
