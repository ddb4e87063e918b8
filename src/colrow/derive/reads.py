"""Which integer attributes a module's forward reads, of its own or of its config."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from colrow.styles.packed import is_transposed


def reads(model: nn.Module, owners: Collection[str], run: Callable[[nn.Module], None]) -> list[tuple[str, str, int]]:
    """Module, attribute and value of each integer that a module reads in forward which is one of the owners of sharded
    weights, or holds some.

    Args:
        model: a copy, to be thrown away.
        run: calls it.
    """
    found: dict[tuple[str, str], int] = {}
    for name, module in model.named_modules():
        # a module without parameters may hold the heads for those beside it: einops' layers do
        scope = name if next(module.parameters(), None) is not None else name.rpartition(".")[0]
        parents = any(o.startswith(f"{scope}.") and o.count(".") - scope.count(".") <= 2 for o in owners)
        if (
            name
            and (parents or name in owners)
            and not isinstance(module, (nn.Linear, nn.ModuleList))
            and not is_transposed(module)
        ):
            record_reads(name, module, found)
    with contextlib.suppress(Exception):
        run(model)
    return [(name, key, value) for (name, key), value in found.items()]


class _Reads:
    """Stands for a config and notes which of its integers are read."""

    def __init__(self, target: Any, note: Any) -> None:
        object.__setattr__(self, "_target", target)
        object.__setattr__(self, "_note", note)

    def __getattr__(self, key: str) -> Any:
        value = getattr(self._target, key)
        if type(value) is int:
            self._note(f"config.{key}", value)
        return value

    def __setattr__(self, key: str, value: Any) -> None:
        setattr(self._target, key, value)


def record_reads(name: str, module: nn.Module, found: dict[tuple[str, str], int]) -> None:
    """From now on note in `found` what `module`, called `name`, reads. The module is a copy to be thrown away."""

    def note(key: str, value: int) -> None:
        if value > 1:
            found[(name, key)] = value

    def read(self: nn.Module, key: str) -> Any:
        value = base.__getattribute__(self, key)
        computed = isinstance(getattr(base, key, None), property)  # nothing can be put in its place
        if type(value) is int and not key.startswith("__") and not computed:
            note(key, value)
        return value

    lengths = vars(module).get("axes_lengths")
    if isinstance(lengths, dict):  # of einops' layers
        for axis, length in lengths.items():
            note(f"axes_lengths.{axis}", length)
    base = type(module)
    recording_cls = type(base.__name__, (base,), {"__getattribute__": read})
    if "config" in vars(module):
        vars(module)["config"] = _Reads(vars(module)["config"], note)
    module.__class__ = recording_cls
