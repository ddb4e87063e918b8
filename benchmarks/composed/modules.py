"""Modules that stand inside composed models: with parameters, with buffers that forward writes, with hooks. Each takes
a tensor [..., n] and gives one of the same shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.composed.backward import OF_GRADIENT


class Scale(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Shift(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Temperature(nn.Module):
    """One number for all."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.exp(self.weight)


class Mix(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.linear(x)


class Adapter(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(n, 2, bias=False), nn.Linear(2, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Average(nn.Module):
    """A moving average of a statistic, subtracted or only kept; written in place or assigned."""

    def __init__(self, statistic: Callable[[Tensor], Tensor], used: bool, assigned: bool, n: int = 0) -> None:
        super().__init__()
        self.statistic, self.used, self.assigned = statistic, used, assigned
        self.register_buffer("average", torch.zeros(n) if n else torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.average: Tensor
        seen = self.statistic(x.detach())
        if not self.training:
            pass
        elif self.assigned:
            self.average = 0.9 * self.average + 0.1 * seen
        else:
            self.average.mul_(0.9).add_(seen, alpha=0.1)
        return x - self.average if self.used else x * 1.0


def mean(x: Tensor) -> Tensor:
    return x.mean()


def largest(x: Tensor) -> Tensor:
    return x.abs().amax()


def over_rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2).mean(0)


class Largest(nn.Module):
    """Divides by the largest element ever seen."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("largest", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.largest: Tensor
        self.largest.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return x / self.largest


class Counter(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.steps: Tensor
        self.steps += 1
        return x * (1 + 0.1 / self.steps)


class TokensSeen(nn.Module):
    """Counts tokens."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.tokens: Tensor
        self.tokens += x.shape[1]
        return x * 1.0


class OfChannels(nn.Module):
    """A norm of [N, C, L] whose channels are the last dim."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.flatten(0, -3).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Convolution(nn.Module):
    """Causal and depthwise, over dim -2."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(n, n, 3, groups=n, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.flatten(0, -3).transpose(1, 2))[..., : x.shape[-2]]
        return x + y.transpose(1, 2).reshape(x.shape)


class Recurrent(nn.Module):
    def __init__(self, n: int) -> None:
        super().__init__()
        self.gru = nn.GRU(n, n, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gru(x.flatten(0, -3))[0].reshape(x.shape)


class Positions(nn.Module):
    """Learned positions of dim -2."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, n))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight[: x.shape[-2]]


class PositionTable(nn.Module):
    """Positions of dim -2 from a buffer."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(64.0)[:, None] * torch.linspace(0.1, 1, n))

    def forward(self, x: Tensor) -> Tensor:
        self.table: Tensor
        return x + self.table[: x.shape[-2]].sin()


class SelfAttention(nn.Module):
    """torch's own attention, over dim -2."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(n, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -3)
        return x + self.attention(rows, rows, rows, need_weights=False)[0].reshape(x.shape)


class Experts(nn.Module):
    """A mixture of experts, each computed for all tokens; `bias`: a buffer balances the load."""

    def __init__(self, n: int, top: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.top = top
        self.router = nn.Linear(n, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(n, n) for _ in range(4))
        self.register_buffer("bias", torch.zeros(4) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        chosen = (scores if self.bias is None else scores + self.bias).topk(self.top, -1).indices
        mask = F.one_hot(chosen, 4).sum(-2)
        weights = scores * mask
        if self.bias is not None and self.training:
            load = mask.flatten(0, -2).double().mean(0)
            with torch.no_grad():
                self.bias.add_(0.1 * (load.mean() - load))
        return x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class Capacity(nn.Module):
    """A router of which the first tokens up to a capacity are taken."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.router, self.expert = nn.Linear(n, 2, bias=False), nn.Linear(n, n)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        first = (scores.argmax(-1) == 0).to(x.dtype)
        kept = first * (first.cumsum(-1) <= 3)
        return x + (kept * scores[..., 0]).unsqueeze(-1) * self.expert(x)


class BackwardHook(nn.Module):
    """The identity, with a hook on the module that changes the gradient of its input."""

    def __init__(self, name: str, d: int) -> None:
        super().__init__()
        self.name, self.d = name, d
        self.register_full_backward_hook(self._change)

    def _change(self, module: nn.Module, given: Any, received: Any) -> Any:
        return (OF_GRADIENT[self.name](given[0], self.d),)

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


class WeightNorm(nn.Module):
    """A linear layer under torch's parametrization."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.linear = torch.nn.utils.parametrizations.weight_norm(nn.Linear(n, n))

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.linear(x)


MODULES: dict[str, Callable[[int], nn.Module]] = {
    "scale": Scale,
    "shift": Shift,
    "temperature": Temperature,
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": nn.RMSNorm,
    "LayerNorm without weights": lambda n: nn.LayerNorm(n, elementwise_affine=False),
    "linear": Mix,
    "adapter": Adapter,
    "weight_norm": WeightNorm,
    "average": lambda n: Average(mean, used=True, assigned=False),
    "average kept": lambda n: Average(mean, used=False, assigned=False),
    "average assigned": lambda n: Average(mean, used=True, assigned=True),
    "average of rows": lambda n: Average(over_rows, used=True, assigned=False, n=n),
    "average of the largest": lambda n: Average(largest, used=False, assigned=True),
    "largest": Largest,
    "counter": Counter,
    "tokens seen": TokensSeen,
    "BatchNorm1d": lambda n: OfChannels(nn.BatchNorm1d(n)),
    "BatchNorm1d of the batch": lambda n: OfChannels(nn.BatchNorm1d(n, affine=False, track_running_stats=False)),
    "BatchNorm1d in eval mode": lambda n: OfChannels(nn.BatchNorm1d(n).eval()),
    "GroupNorm": lambda n: OfChannels(nn.GroupNorm(2, n, affine=False)),
    "InstanceNorm1d": lambda n: OfChannels(nn.InstanceNorm1d(n)),
    "convolution": Convolution,
    "GRU": Recurrent,
    "learned positions": Positions,
    "table of positions": PositionTable,
    "MultiheadAttention": SelfAttention,
    "experts": Experts,
    "experts with a balanced load": lambda n: Experts(n, bias=True),
    "experts with a capacity": Capacity,
    "Dropout": lambda n: nn.Dropout(0.2),
    "PReLU": lambda n: nn.PReLU(),
    "GELU": lambda n: nn.GELU(),
    "Softmax": lambda n: nn.Softmax(-1),
}
