"""Small models whose training step is easy to get wrong on several ranks, each with a plan for tp.

Shapes: ids [B, T]; x [B, T, D]; logits [B, T, V].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.models.llama import Llama, LlamaConfig
from colrow.plans.plan import Plan

V, D, LAYERS, EXPERTS = 32, 16, 3, 6
SIZES = LlamaConfig(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=2 * D,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=D // 4,
    max_position_embeddings=16,
)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D, bias=False), nn.Linear(2 * D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.gelu(self.up(x)))
        return out


class BareMlp(nn.Module):
    """Its matrices stand in no module of their own, and one is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.empty(D, 2 * D)), nn.Parameter(torch.empty(D, 2 * D))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.gelu(x @ self.up) @ self.down.mT + x @ self.down @ self.down.mT
        return out


class SparseExperts(nn.Module):
    """The first expert by token; those that no token of the micro-batch chose do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp() for _ in range(EXPERTS))
        self.gate = nn.Linear(D, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight, index = self.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for expert in index.unique().tolist():
            chosen = index == expert
            y[chosen] = weight[chosen][:, None] * self.experts[expert](x[chosen])
        return y


class HardExperts(SparseExperts):
    """One expert for all tokens of a micro-batch."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.gate(x.mean((0, 1))).softmax(-1)
        expert = int(weight.argmax())
        out: Tensor = weight[expert] * self.experts[expert](x)
        return out


class BalancedExperts(SparseExperts):
    """Keeps its router's logits [B, T, experts], for a loss on them."""

    def forward(self, x: Tensor) -> Tensor:
        self.router = self.gate(x)
        return super().forward(x)


class RunningExperts(HardExperts):
    """Its experts keep a moving average, which their output depends on, and a count of their micro-batches."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(RunningMlp() for _ in range(EXPERTS))


class RunningMlp(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("usage", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.usage.mul_(0.5).add_(x.abs().mean())
                self.seen += 1
        out: Tensor = super().forward(x) * (1 + self.usage.mean())
        return out


class NormalisedMlp(Mlp):
    """Batch norm over the tokens of a micro-batch; its running statistics are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_norm = nn.BatchNorm1d(D)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.batch_norm(super().forward(x).flatten(0, 1)).view_as(x)
        return out


class DropoutMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(F.gelu(self.up(x)), 0.2, self.training)
        return F.dropout(self.down(hidden), 0.2, self.training)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), mlp

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.mlp(self.norm(x))
        return out


class Model(nn.Module):
    """Takes the names and the arguments that a pipeline needs of a model."""

    def __init__(self, mlp: Callable[[], nn.Module] = Mlp) -> None:
        super().__init__()
        self.config = SIZES
        self.embed_tokens = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block(mlp()) for _ in range(LAYERS))
        self.norm, self.lm_head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        for layer in self.layers:
            if layer is not None:
                x = layer(x)
        return x if self.lm_head is None else self.lm_head(self.norm(x))


class Dropout(Model):
    """Dropout of the embedding's output, of activations inside blocks, and of what blocks add."""

    def __init__(self) -> None:
        super().__init__(DropoutMlp)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        x = self.dropout(self.embed_tokens(x))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


@dataclass
class Output:
    logits: Tensor
    balance: Tensor
    """A loss: the squares of each expert's mean share, which are no sum over tokens."""


class Balanced(Model):
    """Experts with an auxiliary loss."""

    def __init__(self) -> None:
        super().__init__(BalancedExperts)

    def forward(self, x: Tensor, seq_len: int | None = None) -> Output:  # type: ignore[override]
        logits = super().forward(x)
        shares = [layer.mlp.router.softmax(-1).mean((0, 1)) for layer in self.layers]
        return Output(logits, torch.stack(shares).square().sum())


class LayerDrop(Model):
    """Leaves layers out: the first, the last, two in a row, all, as the micro-batch says; `unused`
    never runs."""

    KEPT = ((0, 1, 2), (1, 2), (0, 2), (0, 1), (2,), (0,), ())

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(D, D)

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        kept = self.KEPT[int(x.sum()) % len(self.KEPT)] if self.training else range(LAYERS)
        x = self.embed_tokens(x)
        for i in kept:
            x = self.layers[i](x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


class EarlyExit(Model):
    """Leaves out the last layers, as the micro-batch says; its norm and head have other names, so no unit follows."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_f, self.out = self.norm, self.lm_head
        del self.norm, self.lm_head

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        kept = int(x.sum()) % (LAYERS + 1) if self.training else LAYERS
        x = self.embed_tokens(x)
        for layer in self.layers[:kept]:
            x = layer(x)
        logits: Tensor = self.out(self.ln_f(x))
        return logits


class FrozenInput(Model):
    """Detaches what its first layer gets, as the micro-batch says: then the embedding is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(D, D)

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        detaches = int(x.sum()) % 2 == 0
        x = self.embed_tokens(x)
        x = x.detach() if detaches else x
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.lm_head(self.norm(x))
        return logits


class Detached(Model):
    """Leaves out its second layer or runs it without gradients, detaches what its last layer or its norm gets, as the
    micro-batch says."""

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor:
        way = (int(x.sum()) + 1) % 5  # all five in the first steps, and a step without the first
        first, second, last = self.layers
        x = first(self.embed_tokens(x))
        with torch.set_grad_enabled(way != 1):
            x = x if way == 4 else second(x)
        x = last(x.detach() if way in (2, 4) else x)
        logits: Tensor = self.lm_head(self.norm(x.detach() if way == 3 else x))
        return logits


@dataclass
class Logits:
    """An output that torch's trees take for one leaf."""

    logits: Tensor


class TwoHeads(Model):
    """Ends in norm and head, in the head alone, or in another head, whose logits are in a dataclass, as the micro-batch
    says."""

    def __init__(self) -> None:
        super().__init__()
        self.other_head = nn.Linear(D, V, bias=False)

    def forward(self, x: Tensor, seq_len: int | None = None) -> Tensor | Logits:  # type: ignore[override]
        way = int(x.sum()) % 3
        x = self.embed_tokens(x)
        for layer in self.layers:
            x = layer(x)
        if way == 0:
            x = self.norm(x)
        logits: Tensor = self.other_head(x) if way == 2 else self.lm_head(x)
        return Logits(logits) if way == 2 else logits


@dataclass(frozen=True)
class SmallModel:
    """A row of the table.

    Attributes:
        plan: styles for tp, by name patterns.
        auxiliary: the weights of losses in its output.
        pipelines: whether it can be split into stages.
    """

    build: Callable[[], nn.Module]
    plan: dict[str, Any] = field(default_factory=dict)
    loss: Any = "replicated"
    preset: str | None = None
    auxiliary: dict[str, float] = field(default_factory=dict)
    pipelines: bool = False

    def model(self) -> nn.Module:
        """In fp64, every parameter drawn at random: no weight of one hides a missing factor."""
        torch.manual_seed(0)
        model = self.build().double().train()
        with torch.no_grad():
            for param in model.parameters():
                param.copy_(torch.randn(param.shape) * 0.3 + (1.0 if param.ndim == 1 else 0.0))
        return model

    def plan_of(self) -> Plan:
        if self.preset is not None:
            return Plan.preset(self.preset, self.loss)
        return Plan(self.plan, name="small", loss=self.loss)


_COLUMN_ROW = {"layers.*.mlp.up": "colwise", "layers.*.mlp.down": "rowwise"}
_GATHERED = {"layers.*.mlp": {"style": "gathered_parameters", "shards": {"up": 1, "down": 0}}}
_EXPERTS = {"layers.*.mlp.experts.*.up": "colwise", "layers.*.mlp.experts.*.down": "rowwise"}

MODELS: dict[str, SmallModel] = {
    "llama": SmallModel(lambda: Llama(SIZES), loss="vocab_parallel", preset="llama", pipelines=True),
    "llama, tied, odd vocabulary": SmallModel(
        lambda: Llama(replace(SIZES, vocab_size=V + 1, tie_word_embeddings=True)),
        loss="vocab_parallel",
        preset="llama",
        pipelines=True,
    ),
    "plain": SmallModel(Model, _COLUMN_ROW, pipelines=True),
    "bare matrices": SmallModel(lambda: Model(BareMlp), _GATHERED, pipelines=True),
    "sparse": SmallModel(lambda: Model(SparseExperts), _EXPERTS, pipelines=True),
    "sparse, auxiliary loss": SmallModel(Balanced, _EXPERTS, auxiliary={"balance": 0.5}),
    "hard": SmallModel(lambda: Model(HardExperts), _EXPERTS, pipelines=True),
    "dropout": SmallModel(Dropout, _COLUMN_ROW),
    "running experts": SmallModel(lambda: Model(RunningExperts), _EXPERTS),
    "batch norm": SmallModel(lambda: Model(NormalisedMlp), _COLUMN_ROW),
    "layer drop": SmallModel(LayerDrop, _COLUMN_ROW),
    "early exit": SmallModel(EarlyExit, _COLUMN_ROW),
    "frozen input": SmallModel(FrozenInput, _COLUMN_ROW),
    "detached": SmallModel(Detached, _COLUMN_ROW),
    "two heads": SmallModel(TwoHeads, _COLUMN_ROW),
}
