"""Where a style is applied, and whether a size divides there.

[Note: uneven vocabulary]
A vocabulary of V rows that tp does not divide is sharded as DTensor does: ceil(V / tp) rows on the first ranks, what is
left on the last. The parameter stays [V, D]: no row of padding exists that initial values, gradient norm, weight decay,
checkpoints or exports would have to leave out, and no class that a loss would have to mask. Collectives need shards of
one size; those that see vocabulary shards are DTensor's, which pad what they send and cut what they receive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from colrow.errors import PlanError
from colrow.sharding.layout import chunk_sizes

PARAMETRIZATIONS = "parametrizations"
"""The child in which torch keeps what a computed weight is made of."""


@dataclass(frozen=True)
class Site:
    """The place that a style is applied at: the model, the module's name in it, and the tensor-parallel degree."""

    model: nn.Module
    fqn: str
    tp: int

    @property
    def module(self) -> nn.Module:
        return self.model.get_submodule(self.fqn)

    def parameter(self, name: str) -> nn.Parameter:
        """The module's parameter `name`, or that of a module in it, as it is registered: where an earlier call left the
        module out, its attribute is a local tensor.

        Raises:
            PlanError: there is none.
        """
        owner, _, leaf = name.rpartition(".")
        module = self.module.get_submodule(owner)
        param = module._parameters.get(leaf)
        if param is None:
            message = f"{name} of this {type(module).__name__} is no parameter: it is computed (weight_norm, prune)"
            fix = "torch.nn.utils.remove_weight_norm or prune.remove makes it one; or leave the module out of the plan"
            raise PlanError("CR206", self.fqn, message, fix)
        return param

    def require(self, style: str, *module_classes: type[nn.Module]) -> Any:
        """The module. Raises PlanError when it is of none of the classes, or has no parameter `weight`."""
        module = self.module
        if not isinstance(module, module_classes):
            names = " or ".join(f"nn.{cls.__name__}" for cls in module_classes)
            raise self.wrong_class(f"style {style} is for {names}, not for {type(module).__name__}")
        if all(name == PARAMETRIZATIONS for name, _ in module.named_children()):
            self.parameter("weight")
        return module

    def wrong_class(self, message: str) -> PlanError:
        """The error of a style on a module that it is not made for."""
        return PlanError("CR206", self.fqn, message, "use a style made for this class")

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

    def vocabulary_shards(self, extent: int, what: str) -> list[int]:
        """Rows of a vocabulary on each rank ([Note: uneven vocabulary]). Raises a PlanError that names `what` where a
        rank gets none: DTensor's embedding and loss cannot run on an empty shard."""
        sizes = chunk_sizes(extent, self.tp)
        if not sizes[-1]:
            fits = [d for d in range(2, self.tp) if chunk_sizes(extent, d)[-1]]
            message = f"{what} in {self.tp} shards of {sizes[0]} rows leaves a rank without rows"
            raise PlanError("CR204", self.fqn, message, f"choose tp from {', '.join(map(str, [1, *fits][-8:]))}")
        return sizes


def split_rows(what: str, sizes: list[int]) -> str:
    """The reason of a layout that gives the ranks `sizes` rows: it says where the last rank has fewer."""
    return f"{what} split" + (f"; the last rank has {sizes[-1]} rows" if sizes[-1] < sizes[0] else "")
