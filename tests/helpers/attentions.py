"""Attention as people write it, in one model: sizes in code, kv heads by hand, tables, views of merged dimensions."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.parallel.loss import loss_context, model_loss
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.layout import full_tensor, packed_of
from helpers.layers import MLP, Block, Language
from helpers.parity import cross_entropy, relative, tp_mesh

D, HEADS, KV, VOCAB = 32, 4, 2, 80
HEAD_DIM = D // HEADS


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)


class Separate(nn.Module):
    kv_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.k, self.v = (nn.Linear(D, self.kv_heads * HEAD_DIM) for _ in range(2))


class ByWidth(Fused):
    """Pieces by the width; heads of C // HEADS features with C read from the input; the full width in the last view."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (y.view(B, T, HEADS, C // HEADS).transpose(1, 2) for y in self.qkv(x).split(D, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class FromExtents(Fused):
    """As einops does it: a head's width from the extent of what is viewed, which a rank's shards halve."""

    def forward(self, x: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.reshape(*y.shape[:2], HEADS, y.shape[2] // HEADS).permute(0, 2, 1, 3)

        q, k, v = map(heads, self.qkv(x).chunk(3, -1))
        y = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class MinusOneLast(Separate):
    """The -1 takes up the split: fewer features for as many heads, which nothing downstream notices."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class Grouped(Separate):
    """kv heads expanded by hand."""

    kv_heads = KV

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q(x).view(B, T, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (linear(x).view(B, T, KV, HEAD_DIM).transpose(1, 2) for linear in (self.k, self.v))
        k, v = (y[:, :, None].expand(B, KV, HEADS // KV, T, HEAD_DIM).reshape(q.shape) for y in (k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, D))


class Merged(Separate):
    """Batch and heads as one dimension, tokens first."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        T, B, C = x.shape
        q, k, v = (linear(x).contiguous().view(T, B * HEADS, -1).transpose(0, 1) for linear in (self.q, self.k, self.v))
        scores = torch.bmm(q, k.transpose(1, 2)).view(B, HEADS, T, T).softmax(-1)
        y = torch.bmm(scores.view(B * HEADS, T, T), v).transpose(0, 1).contiguous().view(T, B, C)
        return self.out(y).transpose(0, 1)


class Biased(Fused):
    """A table of positions for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(HEADS, 127) * 0.5)
        self.register_buffer("places", torch.arange(64)[:, None] - torch.arange(64) + 63)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.qkv(x).reshape(B, T, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5 + self.table[:, self.places[:T, :T]]
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C))


class TorchsOwn(nn.Module):
    """q, k and v in one parameter without a module of its own; weights that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        return self.inner(x, x, x, attn_mask=mask)[0]


class Functional(Fused):
    """A function gets the weights, as in torchvision's Swin: the products' modules are never called."""

    def forward(self, x: Tensor) -> Tensor:
        return attend(x, self.qkv.weight, self.qkv.bias, self.out.weight, self.out.bias, HEADS)


def attend(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, heads: int) -> Tensor:
    B, T, C = x.shape
    q, k, v = F.linear(x, w_in, b_in).reshape(B, T, 3, heads, C // heads).permute(2, 0, 3, 1, 4)
    scores = q.matmul(k.transpose(-2, -1)) * (C // heads) ** -0.5
    return F.linear(scores.softmax(-1).matmul(v).transpose(1, 2).reshape(B, T, C), w_out, b_out)


class Sliced(Fused):
    """q, k and v by slices of one product; the width in the first view and the last."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        y = self.qkv(x.reshape(B, T, C))
        q, k, v = y[:, :, :D], y[..., D : 2 * D], y.narrow(-1, 2 * D, D)
        q, k, v = (part.reshape(B, T, HEADS, C // HEADS).transpose(1, 2) for part in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))


class SlicedFromEnd(Sliced):
    """The same, its bounds counted from the end."""

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        y = self.qkv(x)
        q, k, v = y[..., -3 * D : -2 * D], y.narrow(-1, -2 * D, D), y[..., -D:]
        q, k, v = (part.reshape(B, T, HEADS, C // HEADS).transpose(1, 2) for part in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))


class Windowed(Fused):
    """Shifted windows, their mask written in place, and a table [places, heads] that is indexed and permuted."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.shift = 4, 2
        self.table = nn.Parameter(torch.randn(2 * self.width - 1, HEADS) * 0.5)
        places = torch.arange(self.width)
        self.register_buffer("places", places[:, None] - places + self.width - 1)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        width, shift = self.width, self.shift
        y = x.roll(-shift, 1).view(B, -1, width, C).reshape(-1, width, C)
        q, k, v = self.qkv(y).reshape(y.shape[0], width, 3, HEADS, C // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * HEAD_DIM**-0.5
        scores = scores + self.table[self.places.view(-1)].view(width, width, -1).permute(2, 0, 1)
        zones = x.new_zeros(T)
        zones[-width:-shift], zones[-shift:] = 1, 2
        zones = zones.view(-1, width)
        mask = zones.unsqueeze(1) - zones.unsqueeze(2)
        scores = scores.view(B, -1, HEADS, width, width) + mask.masked_fill(mask != 0, -100.0)[:, None]
        y = (scores.view(-1, HEADS, width, width).softmax(-1) @ v).transpose(1, 2).reshape(y.shape[0], width, C)
        return self.out(y).view(B, T, C).roll(shift, 1)


class OtherWidths(nn.Module):
    """torch's attention with keys and values of other widths, each with a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(D, 24)
        self.inner = nn.MultiheadAttention(D, HEADS, kdim=24, vdim=24, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.context(x)
        return self.inner(x, y, y, need_weights=False)[0]


class NormedWide(Separate):
    """Norms over all heads of queries and keys, which the shards of one rank do not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q_norm(self.q(x)), self.k_norm(self.k(x)), self.v(x)
        q, k, v = (y.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for y in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Written(nn.Module):
    """A layer written out in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = nn.LayerNorm(D), nn.LayerNorm(D), Separate(), MLP(D, times=3)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).view(B, T, HEADS, -1).transpose(1, 2) for f in (self.attn.q, self.attn.k, self.attn.v))
        x = x + self.attn.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, C))
        return x + self.mlp.down(F.gelu(self.mlp.up(self.norm2(x))))


class Parallel(nn.Module):
    """Attention and MLP beside each other, with one product into both and one out of both."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(D), nn.Linear(D, 6 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, y = self.into(self.norm(x)).split([D, D, D, 3 * D], -1)
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return x + self.out(torch.cat([attended, F.gelu(y)], -1))


class Routed(nn.Module):
    """Experts chosen by the data: how many tokens each gets, and which run, is known only then."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, 4), nn.ModuleList(MLP(D, times=3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weight, chosen = self.gate(tokens).softmax(-1).max(-1)
        out = torch.zeros_like(tokens)
        for number in chosen.unique():
            rows = (chosen == number).nonzero().squeeze(-1)
            out = out.index_add(0, rows, self.experts[int(number)](tokens[rows]) * weight[rows, None])
        return out.view_as(x)


KINDS: tuple[type[nn.Module], ...] = (
    ByWidth,
    FromExtents,
    MinusOneLast,
    Grouped,
    Merged,
    Biased,
    TorchsOwn,
    Functional,
)


# DTensor of torch 2.11 fails in the backward of a layer norm on shards, which the check says: see `NormedWide`
_WIDE_NORMS = () if torch.__version__.startswith("2.11.") else (NormedWide,)
OF_PACKAGES: tuple[type[nn.Module], ...] = (Sliced, Windowed, OtherWidths, *_WIDE_NORMS)


def _block(kind: type[nn.Module]) -> nn.Module:
    if kind is nn.TransformerEncoderLayer:
        return nn.TransformerEncoderLayer(D, HEADS, 3 * D, dropout=0.0, batch_first=True)
    return kind() if kind in (Written, Parallel) else Block(D, kind(), MLP(D, times=3))


def language(*kinds: type[nn.Module], dtype: torch.dtype = torch.float64) -> Language:
    """A block with each kind of attention, its parameters drawn by seed."""
    torch.manual_seed(0)
    return Language(D, VOCAB, (_block(kind) for kind in kinds)).to(dtype)


def train_case(device: str, kinds: tuple[type[nn.Module], ...], batch: Tensor, plan: str) -> dict[str, float]:
    """Relative errors of loss and gradients of a rank against one process.

    Args:
        batch: token ids [sequences, tokens + 1].
    """
    one, model, parallel = language(*kinds).to(device), language(*kinds).to(device), Plan.from_yaml(plan)
    ids, targets = batch[:, :-1].to(device), batch[:, 1:].to(device)
    want = cross_entropy(one(ids), targets)
    want.backward()
    mesh = tp_mesh(device, dist.get_world_size())
    parallelize(model, parallel, mesh)
    with loss_context(parallel, mesh):
        loss = model_loss(model, parallel, mesh, ids, targets)
        loss.backward()
    errors = {"loss": relative(full_tensor(loss.detach()), want.detach())}
    for name, param in model.named_parameters():
        got, expected = param.grad, one.get_parameter(name).grad
        assert got is not None
        assert expected is not None
        if not name.endswith(("k.bias", "k_norm.bias")):  # softmax does not see it: its gradient is rounding
            errors[name] = relative(full_tensor(got, packed_of(model, name)), expected)
    return errors
