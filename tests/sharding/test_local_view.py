"""The classes of modules whose parameters are views."""

from __future__ import annotations

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
