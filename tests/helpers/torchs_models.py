"""Models like those of torch's tests of tensor parallelism, and the plans that those tests give them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

WIDTH, HEADS, WORDS, PLACES = 16, 4, 24, 16


class MLP(nn.Module):
    """Two linears; with `width` and `times`, from a width to a multiple of it and back."""

    def __init__(self, width: int = 12, times: int = 4) -> None:
        super().__init__()
        self.net1, self.net2 = nn.Linear(width, times * width), nn.Linear(times * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.net2(torch.relu(self.net1(x)))


class Stack(nn.Module):
    """MLPs one after the other."""

    def __init__(self, width: int = 12, times: tuple[int, ...] = (4, 4)) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MLP(width, n) for n in times)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Sum(nn.Module):
    """A linear layer whose result meets other arguments, by position or by name."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, y: Any = 0, *, z: Any = 0) -> Tensor:
        return self.linear(x) + y + z


class RMSNorm(nn.Module):
    """A norm of a user's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    """Attention by hand, which runs on DTensors as on local tensors: its number of heads follows from the features."""

    def __init__(self) -> None:
        super().__init__()
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (w(x).view(B, T, -1, WIDTH // HEADS).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        o = (q @ k.transpose(2, 3) / 2).softmax(-1) @ v
        return self.wo(o.transpose(1, 2).reshape(B, T, -1))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(WIDTH), Attention()
        self.ffn_norm, self.feed_forward = nn.LayerNorm(WIDTH), MLP(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """Learned positions, LayerNorms with biases, and a head that may be the embedding."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.tok_embeddings, self.pos_embeddings = nn.Embedding(WORDS, WIDTH), nn.Embedding(PLACES, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.output = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.output.weight = self.tok_embeddings.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tok_embeddings(ids) + self.pos_embeddings(torch.arange(ids.shape[1], device=ids.device))
        for layer in self.layers:
            x = layer(x)
        return self.output(self.norm(x))


def transformer_plan(sequence: bool, local_attention: bool = True) -> dict[str, Any]:
    """Blocks by columns and rows, embeddings and head over the vocabulary.

    Args:
        sequence: activations between the blocks are shards of the tokens.
        local_attention: it runs on local tensors, else on DTensors.
    """
    tokens: dict[str, Any] = {"output": "shard(1)"} if sequence else {}
    plan: dict[str, Any] = {
        "tok_embeddings": {"style": "rowwise", "input": "replicate", **tokens},
        "pos_embeddings": {"style": "rowwise", "input": "replicate", **({"output": "shard(0)"} if sequence else {})},
        "layers.*.attention.w[qkv]": {"style": "colwise", "use_local_output": local_attention},
        "layers.*.attention.wo": {"style": "rowwise", **tokens},
        "layers.*.feed_forward.net1": "colwise",
        "layers.*.feed_forward.net2": {"style": "rowwise", **tokens},
        "output": {"style": "colwise", "output": "replicate", **({"input": "shard(1)"} if sequence else {})},
    }
    if sequence:
        gather = {"style": "prepare_input", "input": "shard(1)", "desired": "replicate"}
        plan |= dict.fromkeys(("layers.*.attention", "layers.*.feed_forward"), gather)
        plan |= dict.fromkeys(("layers.*.attention_norm", "layers.*.ffn_norm", "norm"), "sequence")
    return plan


def built(build: Callable[[], nn.Module], device: str) -> tuple[nn.Module, nn.Module]:
    """Two equal models in fp64, no parameter of which is zero or one."""
    torch.manual_seed(0)
    model = build().to(device, torch.float64)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape).to(param) * 0.1)
    return model, copy.deepcopy(model)


def drawn(*shape: int, device: str, seed: int = 1) -> Tensor:
    """Random numbers, the same on every rank."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)


def collectives(seen: CommDebugMode) -> dict[str, int]:
    """How often each collective ran."""
    short = {"all_reduce": "all-reduce", "all_gather_into_tensor": "gather", "reduce_scatter_tensor": "scatter"}
    counts = {str(op).rpartition(".")[2]: n for op, n in seen.get_comm_counts().items() if n}
    return {short.get(name, name): n for name, n in counts.items()}
