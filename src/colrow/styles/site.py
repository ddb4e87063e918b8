"""Where a style is applied, and whether a size divides there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from colrow.errors import PlanError


@dataclass(frozen=True)
class Site:
    """Where a style is applied: the model, the module's name in it, and the tensor-parallel degree."""

    model: nn.Module
    fqn: str
    tp: int

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.fqn)


def divide(extent: int, tp: int, what: str) -> int:
    """`extent / tp`, or a PlanError that names the degrees which divide."""
    if extent % tp:
        legal = [d for d in range(2, min(extent, 64) + 1) if extent % d == 0]
        choose = f"choose tp from {', '.join(map(str, [1, *legal[:8]]))}" if legal else "choose tp=1"
        raise PlanError(f"{what} is not divisible by tp={tp}: {choose}")
    return extent // tp
