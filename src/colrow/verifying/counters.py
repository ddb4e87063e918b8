"""What a model's code counts, and the numbers at which it may compute something else.

[Note: counters]
Code may count its calls and compute something else after a number of them: a warm-up, a schedule, every seventh step.
The first two forwards do not show that. A counter is a number, an element of a short tensor or array, or an iterator's
next item, wherever code keeps it ([Note: kept values]), that two forwards in a row, or their backwards, change by the
same step or, a temperature, by the same factor. One more step of the unsharded model shows which numbers they meet:
those that they are compared with, divided by or multiplied with. The sharded model is compared with it where counters
reach one of these numbers and other operators run ([Note: other ways]), and far behind in any case.
What grows instead, such as a history, decides by its length, which meets no number that could be recorded. Where two
forwards in a row make something longer, the models are compared after as many forwards as make it run other operators.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.overrides import TorchFunctionMode

from colrow.sharding.layout import full_tensor
from colrow.sharding.replayed_iterators import ReplayedIterator
from colrow.torch_compat import is_fake
from colrow.verifying.kept_values import KeptValue, Path, is_number, kept_values

Counts = dict[Path, int | float]
Sizes = dict[Path, int]
FAR = 1_000_000
_SHORT = 64
"""Most elements of tensors and arrays of which each may count."""
_CONTAINERS = (list, tuple, set, dict, deque)


@dataclass(frozen=True)
class Kept:
    """What a model keeps at one moment.

    Attributes:
        counts: the numbers.
        outside: those of them that are kept outside of the model.
        sizes: the lengths of lists and of other containers, and the elements of tensors.
    """

    counts: Counts
    outside: Counts
    sizes: Sizes

    @classmethod
    def of(cls, model: nn.Module) -> Kept:
        """What it keeps now."""
        found = cls({}, {}, {})
        for kept in kept_values(model):
            for path, number in _numbers(kept):
                found.counts[path] = number
                if kept.outside and _is_known_by(number, kept.value):
                    found.outside[path] = number
            if isinstance(kept.value, Tensor):
                found.sizes[kept.path] = kept.value.numel()
            elif isinstance(kept.value, np.ndarray):
                found.sizes[kept.path] = kept.value.size
            elif isinstance(kept.value, _CONTAINERS):  # other code with a length may raise, or take long
                found.sizes[kept.path] = len(kept.value)
        return found


def _is_known_by(number: int | float, value: Any) -> bool:
    """Whether other processes that are told the number have the value: of an iterator, if it counts."""
    if not isinstance(value, ReplayedIterator):
        return True
    coming = value.coming(4)
    return all(is_number(item) and item == number + i for i, item in enumerate(coming)) and len(coming) == 4


def _numbers(kept: KeptValue) -> Iterator[tuple[Path, int | float]]:
    """The number that it is, or those of a short tensor or array."""
    value = kept.value
    if (number := _number(value)) is not None:
        yield kept.path, number
    elif _is_short(value):
        numbers = enumerate(value.flatten().tolist())
        yield from ((_element(kept.path, i), n) for i, n in numbers if is_number(n) and math.isfinite(n))


def _is_short(value: Any) -> bool:
    if isinstance(value, Tensor):
        return 1 < value.numel() <= _SHORT and not (
            value.is_meta or value.layout is not torch.strided or is_fake(value)
        )
    return isinstance(value, np.ndarray) and 1 < value.size <= _SHORT


def _element(path: Path, i: int) -> Path:
    return (*path, f"[{i}]")


def _number(value: Any) -> int | float | None:
    if isinstance(value, ReplayedIterator):
        (value,) = value.coming(1) or (None,)
    elif isinstance(value, np.ndarray):
        value = value.item() if value.size == 1 else None
    elif isinstance(value, Tensor) and value.numel() == 1 and not (value.is_meta or is_fake(value)):
        value = value.item()
    return value if is_number(value) and math.isfinite(value) else None


@dataclass(frozen=True)
class Course:
    """How a forward changes a counter: by a step that it adds, or by a factor."""

    by: float
    is_factor: bool = False

    def back(self, number: int | float) -> int | float:
        """The number one forward before."""
        return number / self.by if self.is_factor else number - self.by

    def leads_to(self, number: float, start: float) -> bool:
        """Whether it comes to `number` after more than two forwards from `start`."""
        third = start * self.by**2 if self.is_factor else start + 2 * self.by
        # the far number is tried in any case
        return (number - third) * (third - start) > 0 and self.far(start) != number

    def far(self, start: int | float) -> int | float:
        """A number at which it arrives late."""
        if self.is_factor:
            return start * (FAR if abs(self.by) > 1 else 1 / FAR)
        return FAR if self.by > 0 else -FAR


def courses(first: Counts, second: Counts, third: Counts) -> dict[Path, Course]:
    """The counters, by the numbers before and after each of two forwards."""
    found = {}
    for counter, a in first.items():
        b, c = second.get(counter, a), third.get(counter, a)
        if a == b or b == c:
            continue
        if math.isclose(b - a, c - b):
            found[counter] = Course(b - a)
        elif a and b and math.isclose(b / a, c / b):
            found[counter] = Course(b / a, is_factor=True)
    return found


def grows(first: Sizes, second: Sizes, third: Sizes) -> bool:
    """Whether anything became longer in both of two forwards."""
    return any(third.get(key, 0) > size > first.get(key, 0) for key, size in second.items())


def set_counts(model: nn.Module, counts: Mapping[Path, int | float]) -> None:
    """Give what `model` counts other numbers, wherever it keeps them."""
    for kept in list(kept_values(model)) if counts else ():
        if kept.path in counts:
            _set(kept, counts[kept.path])
        elif _is_short(kept.value):
            elements = {i: counts[path] for i in range(_SHORT) if (path := _element(kept.path, i)) in counts}
            _set_elements(kept.value, elements)


def _set(kept: KeptValue, number: Any) -> None:
    value = kept.value
    if isinstance(value, Tensor):
        value.detach().fill_(number)
    elif isinstance(value, np.ndarray):
        value.fill(number)
    elif isinstance(value, ReplayedIterator):
        if isinstance(number, Ahead):
            value.ahead(number)
        else:
            value.restart(_counting_from(number))
    else:
        kept.put(number)


def _set_elements(value: Any, elements: Mapping[int, int | float]) -> None:
    if not elements:
        return
    plain = full_tensor(value.detach()).clone() if isinstance(value, DTensor) else value
    for i, number in elements.items():
        place = tuple(map(int, np.unravel_index(i, tuple(value.shape))))
        (plain.detach() if isinstance(plain, Tensor) else plain)[place] = number
    if isinstance(value, DTensor):
        replicated = DTensor.from_local(
            plain, value.device_mesh, [Replicate()] * value.device_mesh.ndim, run_check=False
        )
        value.detach().copy_(replicated.redistribute(placements=value.placements))


def _counting_from(number: Any) -> Iterator[Any]:
    while True:
        yield number  # an itertools.count would make a number plain that records
        number = number + 1


class Ahead(int):
    """How many items later an iterator is to go on."""


class _Integer(int):
    """A number that records the numbers it meets."""

    met: set[float]
    __hash__ = int.__hash__


class _Float(float):
    met: set[float]
    __hash__ = float.__hash__


def recording(number: Any, met: set[float]) -> Any:
    """A number that adds to `met` those that it meets, as do the results of what it is added to or multiplied with."""
    if not is_number(number) or not math.isfinite(number):
        return number
    counted = _Float(number) if isinstance(number, float) else _Integer(number)
    counted.met = met
    return counted


def _operation(name: str, plain: type) -> Callable[[Any, Any], Any]:
    def run(self: Any, other: Any) -> Any:
        _record(self.met, other)
        return recording(getattr(plain, name)(self, other), self.met)

    return run


_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "truediv", "mod", "pow")
for _name in (*_ARITHMETIC, "lt", "le", "gt", "ge", "eq", "ne"):
    for _counted, _plain in ((_Integer, int), (_Float, float)):
        setattr(_counted, f"__{_name}__", _operation(f"__{_name}__", _plain))


class TensorsRecord(TorchFunctionMode):
    """Records the numbers that tensors of one element meet, and makes what is read from them record too."""

    def __init__(self, met: set[float]) -> None:
        super().__init__()
        self.met = met

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.numel() == 1:
            for other in args[1:]:
                _record(self.met, other)
            if func in (Tensor.item, Tensor.__int__, Tensor.__float__):
                return recording(result, self.met)
        return result


def _record(met: set[float], other: Any) -> None:
    if isinstance(other, int | float) and not isinstance(other, bool) and math.isfinite(other):
        met.add(int(other) if other == int(other) else float(other))
        if 0 < abs(other) < 1:
            met.add(round(1 / other))  # n * 0.001 reaches one at 1000
