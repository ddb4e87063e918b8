"""The unsharded run on record: what `paired_runs` judges the run of one rank beside; see [Note: values by number]."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from colrow.dryrun.numbered import NumberedRun, Operation
from colrow.sharding.local_call import Shape, TensorShape
from colrow.sharding.local_layout import REPLICATED


@dataclass(frozen=True)
class Recorded:
    """An operator of the unsharded run.

    Attributes:
        written: of one that writes into its input, the numbers of the other tensors in that memory.
    """

    leaves: tuple[Any, ...]
    numbers: tuple[int, ...]
    results: tuple[Shape, ...]
    written: frozenset[Any]

    @property
    def plain(self) -> list[Any]:
        return [leaf for leaf in self.leaves if not isinstance(leaf, TensorShape)]


class UnshardedRun(NumberedRun):
    """Every operator under its name and inputs, and what each module got and gave."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.operations: dict[Any, list[Recorded]] = defaultdict(list)
        self.boundaries: dict[Any, tuple[Any, Shape]] = {}
        self._next = 0

    def ran(self, operation: Operation, key: tuple[Any, ...]) -> None:
        self.call_site()
        numbers = tuple(range(self._next, self._next + len(operation.results)))
        self._next += len(numbers)
        for number, result in zip(numbers, operation.results, strict=True):
            self.set_value(result, number, REPLICATED)
        shapes = tuple(tuple(result.shape) for result in operation.results)
        self.operations[key].append(Recorded(operation.shapes, numbers, shapes, self.written(operation)))

    def boundary(self, key: tuple[Any, ...], tensor: Tensor) -> None:
        self.boundaries[key] = self.value(tensor).number, tuple(tensor.shape)
