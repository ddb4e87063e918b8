"""Models written as models of other packages are: their inputs, and what a derived plan splits of each."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

D, HEADS, T = 16, 4, 6


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


X = torch.randn(2, T, D, dtype=torch.float64, generator=generator())
IDS = torch.randint(0, 20, (2, 8), generator=generator())


class Attention(nn.Module):
    """Queries of one tensor, keys and values of another."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.heads = HEADS

    def forward(self, x: Tensor, context: Tensor, turns: tuple[Tensor, Tensor] | None = None) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.reshape(y.shape[0], y.shape[1], self.heads, -1).transpose(1, 2)

        q, k, v = heads(self.q(x)), heads(self.k(context)), heads(self.v(context))
        if turns is not None:
            cos, sin = turns
            q, k = q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin
        y = F.scaled_dot_product_attention(q, k, v)
        return self.o(y.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1))


class Mlp(nn.Module):
    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, 4 * D), nn.Linear(4 * D, D), nn.ReLU(inplace=inplace)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.down(self.act(self.up(x))))


class Latents(nn.Module):
    """The queries are parameters (Perceiver), and so is what the norm in the block normalises."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.attention = nn.LayerNorm(D), Attention()

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.attention(self.norm(x), context)

    def __init__(self) -> None:
        super().__init__()
        self.latents, self.cross = nn.Parameter(torch.randn(4, D)), self.Cross()
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        latents = self.latents.expand(x.shape[0], -1, -1)
        return self.head((latents + self.cross(latents, x)).mean(1))


class LayerScale(nn.Module):
    """A factor for each feature around a module (CaiT)."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.scale


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = LayerScale(Mlp()), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.block(x))


class Rotary(nn.Module):
    """Angles that have a gradient, handed over as a tuple (Flux)."""

    def __init__(self) -> None:
        super().__init__()
        self.speed, self.attention, self.head = nn.Linear(1, D // HEADS), Attention(), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        angles = self.speed(x.new_ones(x.shape[1], 1).cumsum(0))
        return self.head(x + self.attention(x, x, turns=(angles.cos(), angles.sin())))


class InPlace(nn.Module):
    """Activations that write into the output of column and of row products (deepctr)."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.head = Mlp(inplace=True), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mlp(x))


class ConvolutionOut(nn.Module):
    """A U-Net's end: the channels of the last convolution are the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mlp, self.norm = nn.Linear(D, D), Mlp(), nn.GroupNorm(2, D)
        self.last = nn.Conv1d(D, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(F.silu(self.norm((x + self.mlp(x)).transpose(1, 2))))


class BareHead(nn.Module):
    """Logits as a product with the embedding's weight in the code of a module that holds other things too (Whisper)."""

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.mlp = nn.Embedding(20, D), Mlp()

        def forward(self, ids: Tensor, x: Tensor) -> Tensor:
            y = self.embed(ids) + x.mean(1, keepdim=True)
            return (y + self.mlp(y)) @ self.embed.weight.T

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decoder = Mlp(), self.Decoder()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        return self.decoder(ids, x + self.encode(x))


class Tied(nn.Module):
    """The same in a model of token shards, whose own code has the product behind the last norm."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(D), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.norm(x))

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, D), nn.LayerNorm(D)
        self.blocks = nn.ModuleList(self.Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x)[:, -4:], self.embed.weight)


class TiedBias(Tied):
    """The head is a module, whose bias its decoder adds: BERT's, as transformers write it."""

    class Head(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(20, generator=generator()))
            self.decoder = nn.Linear(D, 20)
            self.decoder.weight, self.decoder.bias = weight, self.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.decoder(x)

    def __init__(self) -> None:
        super().__init__()
        self.head = self.Head(self.embed.weight)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class HeadBias(nn.Module):
    """A table of biases [buckets, heads] as an embedding, which is split by heads; a cross-attention without one makes
    zeros of a rank's heads, and hands them to the next (T5)."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.heads = Attention(), HEADS

        def forward(self, x: Tensor, bias: Tensor) -> Tensor:
            a, n = self.attention, x.shape[1]
            q, k, v = (f(x).view(x.shape[0], n, self.heads, -1).transpose(1, 2) for f in (a.q, a.k, a.v))
            y = ((q @ k.transpose(-1, -2)) + bias).softmax(-1) @ v
            return a.o(y.transpose(1, 2).reshape(x.shape[0], n, -1))

    class WithTable(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(T, HEADS)

        def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
            n = torch.arange(x.shape[1], device=x.device)
            return super().forward(x, self.table((n[:, None] - n[None]).abs()).permute(2, 0, 1)[None])

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = self.WithTable(), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.layer(x))


class TwoNames(nn.Module):
    """A module that another one holds too, without calling it (Performer)."""

    class Holder(nn.Module):
        def __init__(self, held: nn.Module) -> None:
            super().__init__()
            self.instance = held

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()
        self.holder, self.head = self.Holder(self.mlp), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mlp(x))


class OwnLinear(nn.Module):
    """Linear layers that are no nn.Linear, one with a factor behind its product (TabM)."""

    class Times(nn.Module):
        def __init__(self, inputs: int, outputs: int, *, scaled: bool) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(outputs, inputs) / 4), nn.Parameter(torch.randn(outputs))
            self.scale = nn.Parameter(torch.rand(outputs)) if scaled else None

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.T
            return (y if self.scale is None else y * self.scale) + self.bias

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = self.Times(D, 4 * D, scaled=False), self.Times(4 * D, D, scaled=True)
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.gelu(self.up(x))))


class PackedConvolution(nn.Module):
    """Queries, keys and values that meet again before a depthwise convolution, and are split apart after it
    (Qwen3-Next): the check must not take a rank's parts for mixed ones."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
            self.conv, self.heads = nn.Conv1d(3 * D, 3 * D, 3, padding=1, groups=3 * D), HEADS

        def forward(self, x: Tensor) -> Tensor:
            parts = torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1).transpose(1, 2)
            mixed = self.conv(parts).transpose(1, 2)
            q, k, v = torch.split(mixed, [mixed.shape[-1] // 3] * 3, dim=-1)
            return self.o(q * k.sigmoid() + v)

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.head = self.Mixer(), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.mixer(x))


class Timed(nn.Module):
    """Scale and shift of a norm without parameters by the embedding of a time, whose frequencies are a size in the
    code (DiT). The model itself holds the positions, which no style can split."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mlp, self.ada = nn.LayerNorm(D, elementwise_affine=False), Mlp(), nn.Linear(D, 2 * D)

        def forward(self, x: Tensor, c: Tensor) -> Tensor:
            shift, scale = self.ada(F.silu(c)).chunk(2, dim=-1)
            return x + self.mlp(self.norm(x) * (1 + scale[:, None]) + shift[:, None])

    class Time(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Sequential(nn.Linear(8, D), nn.SiLU(), nn.Linear(D, D))

        def forward(self, step: Tensor) -> Tensor:
            angles = step[:, None].double() * torch.exp(-torch.arange(4.0, device=step.device))
            return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def __init__(self) -> None:
        super().__init__()
        self.time, self.patches, self.positions = self.Time(), nn.Linear(D, D), nn.Parameter(torch.randn(T, D))
        self.blocks, self.head = nn.ModuleList(self.Block() for _ in range(2)), nn.Linear(D, 5)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        c, x = self.time(step), self.patches(x) + self.positions
        for block in self.blocks:
            x = block(x, c)
        return self.head(x)


class Adapted(nn.Module):
    """Layers with a frozen weight and two thin matrices beside it (LoRA): a row split leaves x A a sum, which B
    multiplies before it is reduced."""

    class Layer(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs) / 4, requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(2, inputs) / 4), nn.Parameter(torch.randn(outputs, 2) / 4)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight) + 2.0 * (x @ self.a.T @ self.b.T)

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = self.Layer(D, 4 * D), self.Layer(4 * D, D), nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.gelu(self.up(x))))


class ValueResidual(nn.Module):
    """A later layer mixes the first one's values, of its heads, into its own (iTransformer): the gradient of what both
    read was summed over the ranks twice."""

    class Layer(nn.Module):
        def __init__(self, *, first: bool) -> None:
            super().__init__()
            self.norm, self.qkv, self.o = nn.LayerNorm(D), nn.Linear(D, 3 * D), nn.Linear(D, D)
            self.mix, self.heads = None if first else nn.Linear(D, HEADS), HEADS

        def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
            x = self.norm(x)
            q, k, own = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
            v = own
            if self.mix is not None and first is not None:
                share = self.mix(x).sigmoid().transpose(1, 2).unsqueeze(-1)
                v = own * share + first * (1 - share)
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)), own

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer(first=i == 0) for i in range(2))
        self.head = nn.Linear(D, 5)

    def forward(self, x: Tensor) -> Tensor:
        first: Tensor | None = None
        for layer in self.layers:
            out, own = layer(x, first)
            x, first = x + out, own if first is None else first
        return self.head(x)


MORE_INPUTS: dict[Callable[[], nn.Module], tuple[Tensor, ...]] = {
    BareHead: (torch.randint(0, 20, (2, 5), generator=generator()),),
    Timed: (torch.tensor([3, 500]),),
}
SPLIT: dict[Callable[[], nn.Module], set[str]] = {
    Latents: {"cross.attention.q.weight", "cross.attention.o.weight"},
    Scaled: {"block.inner.up.weight", "block.inner.down.weight"},
    Rotary: {"attention.q.weight", "attention.o.weight"},
    InPlace: {"mlp.up.weight", "mlp.down.weight"},
    ConvolutionOut: {"mlp.up.weight", "mlp.down.weight"},
    HeadBias: {"layer.table.weight", "layer.attention.q.weight", "layer.attention.o.weight"},
    TwoNames: {"mlp.up.weight", "mlp.down.weight"},
    OwnLinear: {"up.weight", "down.weight"},
    PackedConvolution: {"mixer.q.weight", "mixer.conv.weight", "mixer.o.weight"},
    ValueResidual: {"layers.0.qkv.weight", "layers.1.qkv.weight", "layers.1.mix.weight", "layers.1.o.weight"},
    Timed: {"time.mlp.2.weight", "blocks.0.ada.weight", "blocks.1.ada.weight", "blocks.1.mlp.down.weight"},
    Adapted: {"up.weight", "up.b", "down.weight", "down.a"},
    BareHead: {"encode.up.weight", "encode.down.weight", "decoder.mlp.up.weight", "decoder.mlp.down.weight"},
}


def inputs_of(build: Callable[[], nn.Module]) -> tuple[Tensor, ...]:
    return (IDS,) if build in (Tied, TiedBias) else (X, *MORE_INPUTS.get(build, ()))
