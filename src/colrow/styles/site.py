"""Where a style is applied, and whether a size divides there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def require(self, style: str, *module_classes: type[nn.Module]) -> Any:
        """The module. Raises PlanError when it is of none of the classes."""
        if not isinstance(self.module, module_classes):
            names = " or ".join(f"nn.{cls.__name__}" for cls in module_classes)
            raise self.wrong_class(f"style {style} is for {names}, not for {type(self.module).__name__}")
        return self.module

    def wrong_class(self, message: str) -> PlanError:
        """The error of a style on a module that it is not made for."""
        return PlanError("CR206", self.fqn, message, "use a style made for this class, or leave the module out")

    def wrong_options(self, message: str, fix: str) -> PlanError:
        """The error of options that do not fit the module."""
        return PlanError("CR211", self.fqn, message, fix)

    def divide(self, extent: int, code: str, what: str) -> int:
        """`extent / tp`. Raises a PlanError of this code that names `what` and the degrees which divide."""
        if extent % self.tp:
            legal = [d for d in range(2, min(extent, 64) + 1) if extent % d == 0]
            choose = f"choose tp from {', '.join(map(str, [1, *legal[:8]]))}" if legal else "choose tp=1"
            raise PlanError(code, self.fqn, f"{what} is not divisible by tp={self.tp}", choose)
        return extent // self.tp
