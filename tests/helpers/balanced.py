"""A mixture of experts that returns its routers' losses beside the logits, in any form."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, D, E, EXPERTS = 65, 16, 32, 3
WEIGHTS = {"balance": 0.5, "router_z": 0.03}


class Experts(nn.Module):
    """Every expert on every token, their matrices stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(EXPERTS, E, D) * 0.2)
        self.down = nn.Parameter(torch.randn(EXPERTS, D, E) * 0.2)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for i in range(EXPERTS):
            y = y + shares[..., i : i + 1] * F.linear(F.gelu(F.linear(x, self.up[i])), self.down[i])
        return y


class Mixture(nn.Module):
    """The router's logits are the second output."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(D, EXPERTS, bias=False), Experts()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.gate(x)
        return self.experts(x, logits.softmax(-1)), logits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(D), Mixture()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, logits = self.moe(self.norm(x))
        return x + y, logits


@dataclass
class Output:
    logits: Tensor
    balance: Tensor
    router_z: Tensor
    loss: Tensor | None = None


class Balanced(nn.Module):
    """Losses that are no sum over tokens: the square of each expert's mean share, and a mean of z squared."""

    def __init__(self, form: str = "mapping") -> None:
        super().__init__()
        self.form, self.config = form, SimpleNamespace(vocab_size=V)
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, ids: Tensor) -> Any:
        x, routers = self.embed(ids), []
        for block in self.blocks:
            x, logits = block(x)
            routers.append(logits.flatten(0, 1))
        router = torch.cat(routers)
        balance = EXPERTS * router.softmax(-1).mean(0).square().sum()
        z = router.logsumexp(-1).square().mean()
        logits = self.head(self.norm(x))
        if self.form == "tuple":
            return logits, balance, z
        if self.form == "dataclass":
            return Output(logits, balance, z)
        return {"logits": logits, "balance": balance, "router_z": z}


class Labelled(Balanced):
    """Its own loss, with labels, as a class of transformers computes it; `smoothing` is an option that changes it."""

    def __init__(self, smoothing: float = 0.0) -> None:
        super().__init__("dataclass")
        self.smoothing = smoothing

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        out = super().forward(input_ids)
        if labels is not None:
            logits, targets = out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            out.loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
            out.loss = out.loss + 0.5 * out.balance + 0.03 * out.router_z
        return out


def build(form: str = "mapping", dtype: torch.dtype = torch.float64) -> Balanced:
    torch.manual_seed(0)
    model = Balanced(form).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.2)
    return model
