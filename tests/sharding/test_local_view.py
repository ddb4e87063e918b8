"""The classes of modules whose parameters are views."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from colrow.sharding.local_view import remove_views, view_parameters

NAMES: dict[str, type] = {}


class Registered(nn.Linear):
    """Of a package that keeps its classes by name, and asks each for one."""

    def __init_subclass__(cls, name: str) -> None:
        NAMES[name] = cls


class Dense(Registered, name="dense"):
    pass


def test_a_class_that_registers_its_subclasses_is_not_told_of_a_view() -> None:
    module = Dense(2, 2)
    view_parameters(module, {"weight": lambda param: param})
    assert type(module) is not Dense
    assert isinstance(module, Dense)
    assert module.weight is module._parameters["weight"]
    remove_views(module)
    assert type(module) is Dense
    assert {"dense": Dense} == NAMES


class Complex(nn.Module):
    """It keeps a complex parameter as pairs of numbers, and says so when it is asked for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return torch.view_as_complex(value) if name == "weight" else value


def test_what_a_class_makes_of_its_parameter_it_makes_of_the_view() -> None:
    module = Complex()
    pairs = module._parameters["weight"]
    view_parameters(module, {"weight": lambda param: param})
    assert module.weight.is_complex()
    assert module._parameters["weight"] is pairs
    remove_views(module)
    assert module.weight.is_complex()
