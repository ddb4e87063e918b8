"""What a model's code counts, and the numbers at which it may compute something else.

[Note: counters]
Code may count its calls and compute something else after a number of them: a warm-up, a schedule, every seventh step.
The first two forwards do not show that. A counter is a number, in a module's attribute, in a dict that is one, or in a
buffer of one element, that two forwards in a row change by the same step or, a temperature, by the same factor. One
more forward of the unsharded model shows which numbers its counters meet: those that they are compared with, divided by
or multiplied with. The sharded model is compared with it where counters reach each of these numbers, and far behind.
What grows instead, such as a history, decides by its length, which meets no number that could be recorded. Where two
forwards in a row make something longer, the models are compared after more forwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Counter = tuple[str, str, str]
"""A module's name, its attribute or buffer, and the key in it, where that is a dict."""
Counts = dict[Counter, int | float]
FAR = 1_000_000
Sizes = dict[tuple[str, str], int]
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


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
        return (number - third) * (third - start) > 0 and self.far(start) != number

    def far(self, start: int | float) -> int | float:
        """A number at which it arrives late."""
        if self.is_factor:
            return start * (FAR if abs(self.by) > 1 else 1 / FAR)
        return FAR if self.by > 0 else -FAR


def counts_of(model: nn.Module) -> Counts:
    """The numbers that modules keep; not those of torch's own modules."""
    found: Counts = {}
    for name, module in _own_modules(model):
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.numel() == 1 and _is_number(value := buffer.item()):
                found[name, key, ""] = value
        of_classes = {k: v for cls in reversed(type(module).__mro__) for k, v in vars(cls).items() if _is_number(v)}
        for key, value in {**of_classes, **vars(module)}.items():  # `self.calls += 1` makes an attribute of a class's
            if _is_number(value):
                found[name, key, ""] = value
            elif isinstance(value, dict) and not key.startswith("_"):
                found |= {(name, key, k): v for k, v in value.items() if isinstance(k, str) and _is_number(v)}
    return found


def _own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those whose code is not torch's."""
    for name, module in model.named_modules():
        if not type(module).__module__.startswith("torch.nn."):
            yield name, module


def courses(first: Counts, second: Counts, third: Counts) -> dict[Counter, Course]:
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


def sizes_of(model: nn.Module) -> Sizes:
    """The lengths of lists and of other containers that modules keep, and the elements of tensors."""
    found = {}
    for name, module in _own_modules(model):
        for key, value in {**vars(module), **module._buffers}.items():
            if key not in _OF_EVERY_MODULE and isinstance(value, Sized):
                found[name, key] = value.numel() if isinstance(value, Tensor) else len(value)
    return found


def grows(first: Sizes, second: Sizes, third: Sizes) -> bool:
    """Whether anything became longer in both of two forwards."""
    return any(third.get(key, 0) > size > first.get(key, 0) for key, size in second.items())


def set_counts(model: nn.Module, counts: Mapping[Counter, int | float]) -> nn.Module:
    """Give counters other numbers."""
    for (name, key, entry), number in counts.items():
        module = model.get_submodule(name)
        if entry:
            vars(module)[key][entry] = number
        elif (buffer := module._buffers.get(key)) is not None:
            buffer.fill_(number)
        else:
            setattr(module, key, number)
    return model


@contextmanager
def numbers_met(model: nn.Module, counters: Mapping[Counter, Course]) -> Iterator[set[float]]:
    """Collects the numbers that the model's counters meet within; they record them from then on."""
    met = set[float]()
    counts = counts_of(model)
    held = {c: counts[c] for c in counters if model.get_submodule(c[0])._buffers.get(c[1]) is None}
    set_counts(model, {counter: _recording(number, met) for counter, number in held.items()})
    with _BuffersRecord(met):
        yield met


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


class _Integer(int):
    """A number that records the numbers it meets."""

    met: set[float]
    __hash__ = int.__hash__


class _Float(float):
    met: set[float]
    __hash__ = float.__hash__


def _recording(number: Any, met: set[float]) -> Any:
    if not _is_number(number):
        return number
    counted = _Integer(number) if type(number) is int else _Float(number)
    counted.met = met
    return counted


def _operation(name: str, plain: type) -> Callable[[Any, Any], Any]:
    def run(self: Any, other: Any) -> Any:
        _record(self.met, other)
        return _recording(getattr(plain, name)(self, other), self.met)

    return run


_ARITHMETIC = ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "truediv", "mod", "pow")
for _name in (*_ARITHMETIC, "lt", "le", "gt", "ge", "eq", "ne"):
    for _counted, _plain in ((_Integer, int), (_Float, float)):
        setattr(_counted, f"__{_name}__", _operation(f"__{_name}__", _plain))


class _BuffersRecord(TorchFunctionMode):
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
                return _recording(result, self.met)
        return result


def _record(met: set[float], other: Any) -> None:
    if isinstance(other, int | float) and not isinstance(other, bool) and math.isfinite(other):
        met.add(int(other) if other == int(other) else float(other))
        if 0 < abs(other) < 1:
            met.add(round(1 / other))  # n * 0.001 reaches one at 1000
