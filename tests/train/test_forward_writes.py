"""A parameter that forward writes is refused where forward gets a copy of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from colrow.errors import ConfigError
from colrow.train.forward_writes import refuse_forward_writes

D = 4


class Block(nn.Module):
    """Writes its child's parameter by `way`, if at all."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.child, self.way = nn.Linear(D, D), way
        self.average = nn.Parameter(torch.ones(D), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            match self.way:
                case "in place":
                    self.average.mul_(0.9)
                case "data":
                    self.child.weight.data.clamp_(-1e-3, 1e-3)
                case "another tensor":
                    self.child.bias.data = self.child.bias + 1
        out: Tensor = self.child(x) * self.average
        return out


class Model(nn.Module):
    def __init__(self, way: str = "", max_norm: float | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, D, max_norm=max_norm)
        self.layers = nn.ModuleList([Block(""), Block(way)])

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Model("in place"), "layers.1.average"),
        (Model("data"), "layers.1.child.weight"),
        (Model("another tensor"), "layers.1.child.bias"),
        (Model(max_norm=1e-3), "embed.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_first_forward_names_the_parameter_that_it_writes(model: Model, name: str) -> None:
    refuse_forward_writes(model, model.layers)
    with pytest.raises(ConfigError, match=rf"forward writes the parameter {name}, which is lost"):
        model(torch.tensor([[1, 2]]))


def test_later_forwards_are_left_alone() -> None:
    model = Model()
    refuse_forward_writes(model, model.layers)
    assert any(module._forward_hooks for module in model.modules())
    model(torch.tensor([[1, 2]]))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
