"""Models whose code uses a split dim in a way of its own, with plans for them: see `unproven_plans`.

They have one block, unless their blocks differ: a second would be judged as the first is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from colrow.plans.plan import Plan
from helpers import broken_models as m
from helpers.broken_plans import FUSED_MLP, HEADS, gpt_plan


@dataclass(frozen=True)
class Case:
    """A model and a plan; `train`: the model is in training mode."""

    model: Callable[[], nn.Module]
    plan: Callable[[], Plan] = gpt_plan
    train: bool = False


class FeatureMLP(m.MLP):
    """An MLP with a function of its features between the two linears."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(F.gelu(self.up(x))))


def features(function: Callable[[Tensor], Tensor], train: bool = False) -> Case:
    return Case(lambda: m.Gpt(mlp=lambda: FeatureMLP(function)), train=train)


class LoggedMLP(m.MLP):
    """Keeps a statistic of its features in an attribute; `used`: and computes with it."""

    def __init__(self, used: bool = False) -> None:
        super().__init__()
        self.used = used

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        self.seen = h.detach().abs().mean(-1, keepdim=True).sqrt()
        return self.down(h / self.seen if self.used else h)


class GatedMLP(m.GatedMLP):
    """Gate and up in one weight, taken apart by a function."""

    def __init__(self, apart: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.apart(self.gate_up(x)))


def gated(apart: Callable[[Tensor], Tensor]) -> Case:
    return Case(lambda: m.Gpt(mlp=lambda: GatedMLP(apart)), lambda: gpt_plan(**FUSED_MLP))


def halves(h: Tensor) -> Tensor:
    half = h.shape[-1] // 2
    return F.silu(h[..., :half]) * h[..., half:]


def gumbel(h: Tensor) -> Tensor:
    return h - 0.1 * torch.empty_like(h).exponential_().log()


class OwnAttention(m.HeadCount):
    """Attention written out, with a change of the scores [B, H, T, T] and of the output [B, H, T, E]."""

    def __init__(self, scores: Callable[[Tensor], Tensor] | None = None, output: Any = None) -> None:
        super().__init__()
        self.scores, self.output = scores, output

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(*x.shape[:2], -1, m.E).transpose(1, 2) for w in (self.q, self.k, self.v))
        s = q @ k.transpose(-1, -2) / math.sqrt(m.E)
        s = self.scores(s) if self.scores else s
        causal = torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril()
        o = s.masked_fill(~causal, -1e9).softmax(-1) @ v
        o = self.output(o) if self.output else o
        return self.out(o.transpose(1, 2).flatten(2))


def attention(**changes: Any) -> Case:
    return Case(lambda: m.Gpt(lambda: OwnAttention(**changes)), lambda: gpt_plan(**HEADS, attn__out="rowwise"))


def alibi(s: Tensor) -> Tensor:
    """Slopes from the number of heads that this rank has."""
    heads, tokens = s.shape[1], torch.arange(s.shape[-1])
    slopes = 2.0 ** (-8 / heads * torch.arange(1.0, heads + 1))
    return s + slopes[:, None, None] * (tokens - tokens[:, None]).float()


class Scaled(nn.Module):
    """A weight that all heads share."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(m.E))

    def forward(self, o: Tensor) -> Tensor:
        return o * self.scale


class OneKvHead(nn.Module):
    """Multi-query attention; queries, k and v in one weight. `kv`: the places of the k and the v head."""

    def __init__(self, kv: tuple[int, int] = (-2, -1)) -> None:
        super().__init__()
        self.qkv, self.out, self.kv = nn.Linear(m.D, m.D + 2 * m.E), nn.Linear(m.D, m.D), kv

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(*x.shape[:2], -1, m.E)
        q, k, v = heads[..., :-2, :], heads[..., [self.kv[0]], :], heads[..., [self.kv[1]], :]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def one_kv_head(**options: Any) -> Case:
    qkv = {"style": "packed_colwise", "segments": [m.D, 2 * m.E], "replicated": [1]}
    plan = lambda: gpt_plan(attn__qkv=qkv, attn__out="rowwise")  # noqa: E731
    return Case(lambda: m.Gpt(lambda: OneKvHead(**options)), plan)


class SlopedAttention(m.HeadCount):
    """Attention whose batch and heads are one dim, with slopes that it is given for all of them."""

    def forward(self, x: Tensor, slopes: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(w(x)) for w in (self.q, self.k, self.v))
        B, _, T, _ = q.shape
        q, k, v = (t.reshape(-1, T, m.E) for t in (q, k, v))
        s = torch.baddbmm(slopes, q, k.transpose(1, 2))
        o = torch.bmm(s.softmax(-1), v).view(B, -1, T, m.E)
        return self.out(o.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, m.E).transpose(1, 2)


class SlopedBlock(m.Block):
    def forward(self, x: Tensor) -> Tensor:
        rise = 2.0 ** -torch.arange(1.0, m.H + 1) * torch.arange(x.shape[1])[:, None, None]
        slopes = rise.permute(2, 1, 0).repeat(x.shape[0], 1, 1).to(x.dtype)  # [B H, 1, T]
        x = x + self.attn(self.norm1(x), slopes)
        return x + self.mlp(self.norm2(x))


def sloped(outer: int = 1) -> Case:
    """The plan takes each rank's heads of the slopes; `outer`: wrongly, of so many samples at a time."""
    block = {"style": "local_block", "input": ["replicate", "none"], "slices": {"1": {"dim": 0, "inner": outer * m.H}}}
    heads = HEADS | {f"attn__{n}": "packed_colwise" for n in "qkv"}  # the block sums their input's gradient
    plan = lambda: gpt_plan(**heads, attn=block, attn__out="rowwise")  # noqa: E731
    return Case(lambda: m.Gpt(SlopedAttention, block=SlopedBlock), plan)


class TokenBlock(m.Block):
    """A block in which tokens meet: on the residual stream, or behind the first norm."""

    def __init__(self, attention: nn.Module, mlp: nn.Module, stream: Any = None, normed: Any = None) -> None:
        super().__init__(attention, mlp)
        self.stream, self.normed = stream, normed

    def forward(self, x: Tensor) -> Tensor:
        if self.stream is not None:
            x = x + self.stream(x.transpose(1, 2)).transpose(1, 2)
        h = self.norm1(x)
        x = x + self.attn(h if self.normed is None else 0.5 * (h + self.normed(h)))
        return x + self.mlp(self.norm2(x))


def tokens(normed: Callable[[Tensor], Tensor]) -> Case:
    local = {"style": "sequence", "use_local_output": True}
    return Case(lambda: m.Gpt(block=partial(TokenBlock, normed=normed)), lambda: gpt_plan(sequence=True, norm1=local))


def fast_plan(**more: Any) -> Plan:
    """As `llama-fast` splits: each rank has a shard of the flattened tokens."""
    modules: dict[str, Any] = dict.fromkeys(("blocks.*.norm1", "blocks.*.norm2", "norm"), "grad_sum") | more
    modules |= {"embed": "fast_embedding", "head": {"style": "fast_head", "gather": True}}
    for module, columns, row in (("attn", ["q", "k", "v"], "out"), ("mlp", ["up"], "down")):
        modules[f"blocks.*.{module}"] = {"style": "fast_gather", "columns": columns}
        modules |= {f"blocks.*.{module}.{name}": "fast_colwise" for name in columns}
        modules[f"blocks.*.{module}.{row}"] = "fast_rowwise"
    return Plan(modules=modules, loss="replicated", name="fast")


def flattened(normed: Callable[[Tensor], Tensor], train: bool = False) -> Case:
    return Case(lambda: m.Gpt(OwnAttention, block=partial(TokenBlock, normed=normed)), fast_plan, train)


class WrittenSizes(m.Gpt):
    """Writes the sizes of the tokens, which a rule makes a rank's, and the number of sequences."""

    def __init__(self) -> None:
        super().__init__(OwnAttention)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x).view(-1, ids.shape[1], m.D).view(ids.shape[0], -1, m.D)
        return self.head(self.norm(x))


def viewed(function: Callable[[Tensor], Tensor]) -> Case:
    """Features in eight groups, whose number the code writes and a rule makes a rank's."""
    groups = {"style": "replicate", "sizes": {"view(*, *, 8, *)": "*, *, /tp, *"}}
    return Case(
        lambda: m.Gpt(mlp=lambda: FeatureMLP(lambda h: function(h.view(*h.shape[:2], 8, -1)).flatten(2))),
        lambda: gpt_plan(mlp=groups),
    )


def causal_convolution() -> nn.Module:
    return nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(m.D, m.D, 3, groups=m.D))


def on_stream(module: Callable[[], nn.Module], train: bool = False, **plan: Any) -> Case:
    return Case(
        lambda: m.Gpt(block=lambda a, b: TokenBlock(a, b, stream=module())), lambda: gpt_plan(**plan), train=train
    )


class NormedInside(m.MLP):
    """The norm of a pre-norm layer is the MLP's own: what enters it is the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(m.D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


def normed_inside(norm: str) -> Case:
    """`norm`: its style."""
    styles: dict[str, Any] = {
        "mlp": {"style": "local_block", "input": ["replicate"]},
        "mlp__norm": norm,
        "mlp__up": "packed_colwise",
        "mlp__down": {"style": "packed_rowwise", "output": "replicate"},
        "norm2": None,
    }

    def model() -> nn.Module:
        gpt = m.Gpt(mlp=NormedInside)
        for block in gpt.blocks:
            block.norm2 = nn.Identity()
        return gpt

    return Case(model, lambda: gpt_plan(**styles))


class NormInTraining(m.MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        return self.down(h / h.norm(dim=-1, keepdim=True) if self.training else h)


class NormalisedGradient(torch.autograd.Function):
    """The identity, whose backward divides by the norm of all of the gradient that it sees."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] / (1e-6 + gradients[0].norm())


class OwnLoop(m.Gpt):
    """Its own loop shifts the tokens before the fourth block."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x + 0.1 * F.pad(x, (0, 0, 1, -1)) if i == 3 else x)
        return self.head(self.norm(x))


class PartDoubled(m.Gpt):
    """Writes into a part of its logits, of a DTensor's sharded or other dim."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, ids: Tensor) -> Tensor:
        logits = super().forward(ids) * 1.0
        logits.narrow(self.dim, 1, logits.shape[self.dim] - 1).mul_(2)
        return logits


class ChangedLogits(m.Gpt):
    """A function of its logits."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, ids: Tensor) -> Tensor:
        return self.function(super().forward(ids))


def logits(function: Callable[[Tensor], Tensor], sequence: bool = False) -> Case:
    return Case(lambda: ChangedLogits(function), lambda: gpt_plan("vocab_parallel", sequence=sequence))


def noisy_gradient(x: Tensor) -> Tensor:
    """The identity, whose backward adds noise."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda gradient: gradient + 0.1 * torch.randn_like(gradient))
    return x


class AuxiliaryLosses(m.Gpt):
    """Returns the sum of a loss of each MLP's features, times 0 or another number."""

    def __init__(self, function: Callable[[Tensor], Tensor], weight: float) -> None:
        super().__init__(mlp=lambda: FeatureMLP(self.noted))
        self.loss, self.weight = function, weight

    def noted(self, h: Tensor) -> Tensor:
        self.losses.append(self.weight * self.loss(h))
        return h

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        self.losses: list[Tensor] = []
        return super().forward(ids), sum(self.losses, torch.zeros(()))


def auxiliary(function: Callable[[Tensor], Tensor], weight: float) -> Case:
    return Case(lambda: AuxiliaryLosses(function, weight), train=True)


class CheckpointedMLP(m.MLP):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(super().forward, x, use_reentrant=False)
        return y


class CheckpointedNoise(m.MLP):
    """Recomputes its noisy features: in a function of its own, or with the module that makes them."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.noise = Noise()
        self.recomputed = self.noise.forward if function else self.noise

    def forward(self, x: Tensor) -> Tensor:
        return self.down(checkpoint(self.recomputed, self.up(x), use_reentrant=False))


class Noise(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return F.gelu(h + torch.randn_like(h))


def hooked() -> nn.Module:
    model = m.Gpt()
    model.norm.weight.register_hook(lambda gradient: gradient * 0.5)
    return model


def last_block_differs() -> nn.Module:
    model = m.Gpt(layers=5)
    for i, block in enumerate(model.blocks):
        block.mlp = FeatureMLP((lambda h: h.softmax(-1)) if i == 4 else (lambda h: h))
    return model


def block_twice() -> nn.Module:
    model = m.Gpt(layers=2)
    first, second = model.blocks
    model.blocks = nn.ModuleList([first, first, second])
    return model


def mapped_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one head, mapped over heads and samples."""
    head = lambda q, k, v: (q @ k.T / math.sqrt(m.E)).softmax(-1) @ v  # noqa: E731
    out: Tensor = torch.vmap(torch.vmap(head))(q, k, v)
    return out


class MappedAttention(m.HeadCount):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (w(x).view(*x.shape[:2], -1, m.E).transpose(1, 2) for w in (self.q, self.k, self.v))
        return self.out(mapped_heads(q, k, v).transpose(1, 2).flatten(2))


def each_row(h: Tensor) -> Tensor:
    """Rows of [T, F, B], each divided by its own norm: vmap takes a row's first element for its dtype alone."""
    return torch.vmap(lambda row: row / (1 + row.norm()))(h.flatten(0, 1)).view(h.shape)


def turned_pairs(h: Tensor) -> Tensor:
    """Pairs as complex numbers, times a Python one."""
    return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2)
