"""The models that are composed: decoders with places at which steps run.

A step is a function of a tensor, by its group and name (so that it can be pickled), or a module. A place is where in
the model it runs: on the features of an MLP, on the scores or the outputs of the heads, behind a norm, on the residual
stream, on the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.composed.along_dim import ALONG
from benchmarks.composed.backward import FUNCTIONS, OF_GRADIENT, changed, hooked
from benchmarks.composed.modules import MODULES, BackwardHook
from benchmarks.composed.of_all import DROPOUT, ELEMENTWISE, OF_ALL, RANDOM

GROUPS: dict[str, Sequence[str]] = {
    "along": list(ALONG),
    "element": list(ELEMENTWISE),
    "all": list(OF_ALL),
    "random": list(RANDOM),
    "dropout": list(DROPOUT),
    "function": list(FUNCTIONS),
    "gradient": list(OF_GRADIENT),
    "hook": list(OF_GRADIENT),
    "module hook": list(OF_GRADIENT),
    "module": list(MODULES),
}
"""The names of the steps in each group."""
WITHOUT_DIM = ("element", "all", "random", "dropout", "module")


@dataclass(frozen=True)
class Step:
    """A function of a tensor; `dim` is of a tensor with as many dims as the place's."""

    group: str
    name: str
    dim: int = 0
    style: Any = None
    """Of a module: what the plan says of it."""

    def __call__(self, x: Tensor) -> Tensor:
        if self.group == "along":
            return ALONG[self.name](x, self.dim)
        if self.group == "element":
            return ELEMENTWISE[self.name](x)
        if self.group == "all":
            return OF_ALL[self.name](x)
        if self.group == "random":
            return RANDOM[self.name](x)
        if self.group == "dropout":
            return DROPOUT[self.name](x)
        if self.group == "function":
            return FUNCTIONS[self.name](x, self.dim)
        if self.group == "gradient":
            return changed(x, self.name, self.dim)
        assert self.group == "hook", self.group
        return hooked(x, self.name, self.dim)

    def __str__(self) -> str:
        dim = "" if self.group in WITHOUT_DIM else f" of dim {self.dim}"
        style = "" if self.style is None else f" ({self.style if isinstance(self.style, str) else self.style['style']})"
        return f"{self.group} {self.name}{dim}{style}"


@dataclass(frozen=True)
class Sizes:
    batch: int = 2
    tokens: int = 12
    features: int = 32
    heads: int = 8
    hidden: int = 40
    vocabulary: int = 48

    @property
    def head(self) -> int:
        return self.features // self.heads


@dataclass(frozen=True)
class Architecture:
    """What a model is.

    Attributes:
        attention: `separate` (q, k, v in three weights), `fused` ([q | k | v] in one), `by heads` (each head's q, k, v
            one after another), `by view` ([q | k | v], taken apart by one view).
        kv_heads: fewer than heads: each serves several.
        mlp: `plain`, `gated` (two weights), or how a fused weight of gate and up is taken apart.
        steps: of each block, by place.
        extra: what the output has beside logits (`activity`, `stream`, `z loss`), or nothing.
        weight: the statistic of a weight that scales the MLP's features, or nothing.
        wrapped: the steps of a place run in a module of their own.
        parameter_hooks: names of parameters, and the change of their gradients.
    """

    sizes: Sizes = Sizes()
    layers: int = 1
    sublayers: tuple[str, ...] = ("attention", "mlp")
    attention: str = "separate"
    kv_heads: int = 8
    mlp: str = "plain"
    bias: bool = False
    written_out: bool = False
    rotary: bool = False
    tied: bool = False
    extra: str = ""
    weight: str = ""
    wrapped: bool = False
    steps: Mapping[tuple[int, str], tuple[Step, ...]] = field(default_factory=dict)
    parameter_hooks: tuple[tuple[str, str], ...] = ()


class Steps(nn.Module):
    """The steps of one place; modules among them are its children."""

    def __init__(self, steps: Sequence[Step], n: int) -> None:
        super().__init__()
        for i, step in enumerate(steps):
            if step.group == "module":
                self.add_module(f"step{i}", MODULES[step.name](n))
            elif step.group == "module hook":
                self.add_module(f"step{i}", BackwardHook(step.name, step.dim))
        self.steps = tuple(steps)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)

    def run(self, x: Tensor) -> Tensor:
        for i, step in enumerate(self.steps):
            x = self.get_submodule(f"step{i}")(x) if step.group.startswith("module") else step(x)
        return x


class Placed(nn.Module):
    """A module with steps at places."""

    def __init__(self, made: Architecture, layer: int, **sizes: int) -> None:
        super().__init__()
        self.wrapped = made.wrapped
        for place, n in sizes.items():
            steps = made.steps.get((layer, place), ())
            if steps:
                self.add_module(f"at_{place}", Steps(steps, n))

    def at(self, place: str, x: Tensor) -> Tensor:
        steps = getattr(self, f"at_{place}", None)
        if steps is None:
            return x
        return steps(x) if self.wrapped else steps.run(x)


class Attention(Placed):
    def __init__(self, made: Architecture, layer: int) -> None:
        s = made.sizes
        super().__init__(made, layer, queries=s.head, scores=s.tokens, heads=s.head, joined=s.features)
        self.kind, self.width, self.rotary = made.attention, s.head, made.rotary
        self.written_out = made.written_out or (layer, "scores") in made.steps
        kv = made.kv_heads * s.head
        if made.attention == "separate":
            self.q = nn.Linear(s.features, s.features, made.bias)
            self.k, self.v = (nn.Linear(s.features, kv, made.bias) for _ in range(2))
        else:
            self.qkv = nn.Linear(s.features, 3 * s.features, made.bias)
        self.out = nn.Linear(s.features, s.features, made.bias)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, H, T, E]."""
        if self.kind == "separate":
            q, k, v = (w(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for w in (self.q, self.k, self.v))
            return q, k, v
        both = self.qkv(x)
        if self.kind == "fused":
            q, k, v = (t.view(*t.shape[:2], -1, self.width).transpose(1, 2) for t in both.chunk(3, -1))
        elif self.kind == "fused by split":
            n = both.shape[-1] // 3
            q, k, v = (t.unflatten(-1, (-1, self.width)).transpose(1, 2) for t in both.split([n, n, n], -1))
        elif self.kind == "by view":
            q, k, v = both.view(*both.shape[:2], 3, -1, self.width).permute(2, 0, 3, 1, 4).unbind(0)
        else:  # by heads
            q, k, v = both.view(*both.shape[:2], -1, 3 * self.width).transpose(1, 2).chunk(3, -1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        q = self.at("queries", q)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        if k.shape[1] != q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        if self.written_out:
            s = self.at("scores", q @ k.transpose(-1, -2) / math.sqrt(self.width))
            causal = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
            o = s.masked_fill(~causal, -1e9).softmax(-1) @ v
        else:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        o = self.at("heads", o)
        return self.out(self.at("joined", o.transpose(1, 2).reshape(*x.shape[:2], -1)))


def rotated(x: Tensor) -> Tensor:
    """Rotary positions of [B, H, T, E]."""
    angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * 0.5 ** torch.arange(x.shape[3] // 2, dtype=x.dtype)
    cos, sin = (torch.cat([t, t], -1) for t in (angles.cos(), angles.sin()))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Mlp(Placed):
    def __init__(self, made: Architecture, layer: int) -> None:
        s = made.sizes
        super().__init__(made, layer, features=s.hidden)
        self.kind, self.weight_statistic = made.mlp, made.weight
        if made.mlp == "plain":
            self.up = nn.Linear(s.features, s.hidden, made.bias)
        elif made.mlp == "gated":
            self.gate, self.up = (nn.Linear(s.features, s.hidden, made.bias) for _ in range(2))
        else:
            self.gate_up = nn.Linear(s.features, 2 * s.hidden, made.bias)
        self.down = nn.Linear(s.hidden, s.features, made.bias)
        self.activity: Tensor | None = None
        self.keeps_activity = made.extra == "activity"

    def forward(self, x: Tensor) -> Tensor:
        h = self.at("features", self.activated(x))
        if self.keeps_activity:
            self.activity = h.square().mean()
        if self.weight_statistic:
            h = h * torch.tanh(statistic(self.weight_statistic, self.down.weight))
        return self.down(h)

    def activated(self, x: Tensor) -> Tensor:
        if self.kind == "plain":
            return F.gelu(self.up(x))
        if self.kind == "gated":
            return F.silu(self.gate(x)) * self.up(x)
        both = self.gate_up(x)
        n = both.shape[-1] // 2
        if self.kind == "chunk":
            gate, up = both.chunk(2, -1)
        elif self.kind == "slices":
            gate, up = both[..., :n], both[..., n:]
        elif self.kind == "split":
            gate, up = both.split(n, -1)
        elif self.kind == "narrow":
            gate, up = both.narrow(-1, 0, n), both.narrow(-1, n, n)
        elif self.kind == "tensor_split":
            gate, up = both.tensor_split(2, -1)
        elif self.kind == "view":
            gate, up = both.view(*both.shape[:-1], 2, n).unbind(-2)
        elif self.kind == "unflatten":
            gate, up = both.unflatten(-1, (2, -1)).movedim(-2, 0)
        elif self.kind == "glu":
            return F.glu(both, -1)
        elif self.kind == "interleaved":
            gate, up = both[..., ::2], both[..., 1::2]
        else:  # interleaved by view
            gate, up = both.unflatten(-1, (-1, 2)).unbind(-1)
        return F.silu(gate) * up


def statistic(kind: str, weight: Tensor) -> Tensor:
    """A number, or one for each input feature, of a weight [out, in]."""
    if kind == "norm":
        return weight.norm() / 4
    if kind == "mean of squares":
        return weight.square().mean() * 20
    if kind == "largest":
        return weight.abs().max() * 3
    if kind == "norm of columns":
        return weight.norm(dim=0) * 3
    return weight.std()


FUSED = ("chunk", "slices", "split", "narrow", "tensor_split", "view", "unflatten", "glu", "interleaved", "by pairs")
STATISTICS = ("norm", "mean of squares", "largest", "norm of columns", "std")


class Block(Placed):
    def __init__(self, made: Architecture, layer: int) -> None:
        n = made.sizes.features
        super().__init__(made, layer, stream=n, normed=n)
        self.norm1, self.norm2 = nn.LayerNorm(n), nn.LayerNorm(n)
        self.attn = Attention(made, layer) if "attention" in made.sublayers else None
        self.mlp = Mlp(made, layer) if "mlp" in made.sublayers else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.at("stream", x)
        h = self.at("normed", self.norm1(x))
        x = x + (h if self.attn is None else self.attn(h))
        h = self.norm2(x)
        return x + (h if self.mlp is None else self.mlp(h))


class Model(Placed):
    """Token ids [B, T] to logits [B, T, V], or to (logits, another scalar)."""

    def __init__(self, made: Architecture) -> None:
        s = made.sizes
        super().__init__(made, 0, embedded=s.features, final=s.features, logits=s.vocabulary)
        self.embed = nn.Embedding(s.vocabulary, s.features)
        self.blocks = nn.ModuleList(Block(made, layer) for layer in range(made.layers))
        self.norm, self.head = nn.LayerNorm(s.features), nn.Linear(s.features, s.vocabulary, bias=False)
        if made.tied:
            self.head.weight = self.embed.weight
        self.extra = made.extra
        for name, change in made.parameter_hooks:
            self.get_parameter(name).register_hook(ParameterHook(change))

    def forward(self, ids: Tensor) -> Any:
        x = self.at("embedded", self.embed(ids))
        for block in self.blocks:
            x = block(x)
        logits = self.at("logits", self.head(self.at("final", self.norm(x))))
        if self.extra == "activity":
            return logits, sum(block.mlp.activity for block in self.blocks)
        if self.extra == "z loss":
            return {"logits": logits, "z loss": 1e-2 * logits.logsumexp(-1).square().mean()}
        if self.extra == "stream":
            return logits, 0.1 * x.square().mean()
        return logits


@dataclass(frozen=True)
class ParameterHook:
    name: str

    def __call__(self, gradient: Tensor) -> Tensor:
        return OF_GRADIENT[self.name](gradient, 0)
