"""Every value that a model's code can keep from one forward to the next, wherever it keeps it.

[Note: kept values]
Beside attributes and buffers, code keeps values outside of the model: in globals of its file, in cells that functions
close over, in attributes of functions and classes, in default arguments, in the environment, and in objects, lists and
dicts that any of these hold. A deep copy of the model shares them. So each step begins with those of the caller, who
gets them back; and they are reached from the model's code, so that other processes find them by the same path.
Code of torch, of Python and of the libraries in `_LIBRARIES` is not followed.
"""

from __future__ import annotations

import dis
import functools
import math
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from torch import Tensor, nn

from colrow.dryrun.block_kinds import code_set_on
from colrow.dryrun.code_caches import classes_and_files
from colrow.sharding.replayed_iterators import ReplayedIterator, is_iterator

Path = tuple[str, ...]
"""How a value is reached: a module's name, then an attribute or key at each step."""
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy", "transformers", "colrow"}
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_MOST_ENTRIES = 1024
"""Longer containers are histories or data; what they hold is not followed."""
_MOST_ELEMENTS = 1 << 20
"""Larger tensors outside of a model are tables and data, which no forward writes: they are not copied."""
_DEEPEST = 12
_CALLED = ("__call__", "__getattr__", "__torch_function__")
"""Special methods whose code a forward may run."""
_HOLDERS = ("collections", "queue", "argparse", "types", "_thread")
"""Files of Python whose objects hold what code puts there."""
_CACHED_FUNCTION = type(functools.cache(lambda: None))
_NOT_FOLLOWED = (bool, str, bytes, Tensor, ReplayedIterator)


@dataclass(frozen=True)
class KeptValue:
    """A value and where it is kept.

    Attributes:
        put: gives its place another value.
        outside: of the model.
    """

    path: Path
    value: Any
    put: Callable[[Any], None]
    outside: bool


def kept_values(model: nn.Module) -> Iterator[KeptValue]:
    """All of them, each place once."""
    walk = _Walk()
    for name, module in model.named_modules():
        yield from walk.module((name,), module, False)
        for key, code in code_set_on(module):
            yield from walk.value((name, key), code, _unsettable, False)


def numbers_in_code(model: nn.Module) -> list[int | float]:
    """Those that stand in the model's code, or that it keeps."""
    found = set[Any]()
    for kept in kept_values(model):
        if is_number(kept.value):
            found.add(kept.value)
        elif isinstance(kept.value, types.FunctionType) and _is_own(kept.value.__module__ or ""):
            found |= set(_constants(kept.value.__code__))
    return sorted(number for number in found if math.isfinite(number))


def set_names(model: nn.Module) -> set[str]:
    """The names of attributes, globals and keys that code of the model's files sets, other than where objects are made;
    and of buffers, which anybody may fill."""
    own, files = classes_and_files(model, _is_own)
    held = [value for names in (*own, *files) for value in vars(names).values()]
    held += [each for cls in held if isinstance(cls, type) and _is_own(cls.__module__) for each in vars(cls).values()]
    code = {function.__code__ for value in held for function in (value, *_code_in(value)) if _is_function(function)}
    found = {name for each in code if each.co_name != "__init__" for name in _names_set(each)}
    return found | {name.rpartition(".")[2] for name, _ in model.named_buffers()}


def is_number(value: Any) -> bool:
    """Whether a counter could be such a value."""
    return type(value) in (int, float) or isinstance(value, np.integer | np.floating)


@contextmanager
def kept_values_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards the values outside of the model are those of before."""
    environment = dict(os.environ)
    before = [kept for kept in kept_values(model) if kept.outside]
    contents = [(kept, _copy(kept.value)) for kept in before]
    try:
        yield
    finally:
        for kept, content in contents:
            _give_back(kept, content)
        # a forward may have bound another object to the place
        bound = {kept.path: kept.value for kept in kept_values(model)}
        for kept in before:
            if bound.get(kept.path) is not kept.value:
                kept.put(kept.value)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]


def replay_all_iterators(model: nn.Module) -> None:
    """Those outside of the model's modules too."""
    for kept in list(kept_values(model)):
        if is_iterator(kept.value):
            kept.put(ReplayedIterator(kept.value))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone() if value.numel() <= _MOST_ELEMENTS else None
    if isinstance(value, ReplayedIterator):
        return value.place
    return value.copy() if isinstance(value, list | deque | set | dict | np.ndarray) else None


def _give_back(kept: KeptValue, content: Any) -> None:
    value = kept.value
    if isinstance(value, Tensor):
        if content is not None and value.shape == content.shape:
            value.detach().copy_(content)
    elif isinstance(value, ReplayedIterator):
        value.go_to(content)
    elif isinstance(value, np.ndarray):
        value[...] = content
    elif content is not None and not _is_as_before(value, content):  # a frozen one refuses to be cleared
        value.clear()
        value.extend(content) if isinstance(value, list | deque) else value.update(content)


def _is_as_before(value: Any, content: Any) -> bool:
    """Whether a container holds the same objects in the same order."""
    if len(value) != len(content):
        return False
    if isinstance(value, dict):
        value, content = [*value, *value.values()], [*content, *content.values()]
    return all(a is b for a, b in zip(value, content, strict=True))


def _nothing(_: Any) -> None:
    """Of a setter that returns something."""


def _unsettable(value: Any) -> None:
    """Of what cannot be changed in its place, such as an element of a tuple."""


class _Walk:
    def __init__(self) -> None:
        self._entered: dict[int, Any] = {}  # by identity; held so that none is used again
        self._globals: set[tuple[int, str]] = set()

    def module(self, path: Path, module: nn.Module, outside: bool) -> Iterator[KeptValue]:
        if not self._enter(module):
            return
        attributes = {k: v for k, v in vars(module).items() if k not in _OF_EVERY_MODULE}
        cls: Any = type(module)
        if cls.__module__.startswith("torch.nn."):  # what a user has set on it
            attributes = {k: v for k, v in attributes.items() if k not in _sizes_of(cls)}
        else:
            attributes |= module._buffers
        yield from self.attributes(path, module, attributes, outside)

    def attributes(self, path: Path, holder: Any, held: dict[str, Any], outside: bool) -> Iterator[KeptValue]:
        """Those of an object, and of its classes: `self.calls += 1` makes an attribute of a class's one."""
        own = [cls for cls in type(holder).__mro__ if _is_own(cls.__module__)]
        of_classes = {k: v for cls in reversed(own) for k, v in vars(cls).items() if is_number(v) or _is_iterator(v)}
        for key, value in {**of_classes, **held}.items():
            yield from self.value((*path, key), value, functools.partial(setattr, holder, key), outside)
        for cls in own:
            yield from self.value((*path, cls.__qualname__), cls, _unsettable, True)

    def value(self, path: Path, value: Any, put: Callable[[Any], None], outside: bool) -> Iterator[KeptValue]:
        """One value, and what is reached from it."""
        yield KeptValue(path, value, put, outside)
        if value is None or isinstance(value, _NOT_FOLLOWED) or is_number(value):
            return
        if len(path) < _DEEPEST and self._enter(value):
            yield from self._inside(path, value, put, outside)

    def _inside(self, path: Path, value: Any, put: Callable[[Any], None], outside: bool) -> Iterator[KeptValue]:
        found: Iterable[tuple[str, Any, Callable[[Any], None]]] = ()
        if isinstance(value, types.FunctionType):
            yield from self.function(path, value)
        elif isinstance(value, type):
            if _is_own(value.__module__):
                items = [(k, v) for k, v in vars(value).items() if not k.startswith("__") or k in _CALLED]
                found, outside = [(k, v, functools.partial(setattr, value, k)) for k, v in items], True
        elif isinstance(value, nn.Module):
            yield from self.module(path, value, outside)
        elif isinstance(value, dict):
            if len(value) <= _MOST_ENTRIES:
                found = [(str(k), v, functools.partial(value.__setitem__, k)) for k, v in list(value.items())]
        elif isinstance(value, list | deque):
            if len(value) <= _MOST_ENTRIES:
                found = [(str(i), v, functools.partial(value.__setitem__, i)) for i, v in enumerate(list(value))]
        elif isinstance(value, tuple):
            elements = list(value)
            found = [
                (str(i), v, functools.partial(_put_element, put, type(value), elements, i)) for i, v in enumerate(value)
            ]
        elif code := _code_in(value):
            found = [(str(i), v, _unsettable) for i, v in enumerate(code)]
        elif isinstance(value, ContextVar):
            with suppress(LookupError):  # it has no value yet
                found, outside = [("value", value.get(), lambda content: _nothing(value.set(content)))], True
        elif _is_own(type(value).__module__) or type(value).__module__ in _HOLDERS:
            yield from self.attributes(path, value, _attributes(value), outside)
        for key, inner, put_inner in found:
            yield from self.value((*path, key), inner, put_inner, outside)

    def function(self, path: Path, function: types.FunctionType) -> Iterator[KeptValue]:
        if not _is_own(function.__module__ or ""):
            return
        names = sorted(_names(function.__code__))
        namespace: Any = function.__globals__
        for name in names:
            if name in namespace and self._is_new(namespace, name):
                yield from self.value((*path, "global", name), namespace[name], _setter(namespace, name), True)
                imported = namespace[name]  # such as `counters`, where the code says `counters.calls += 1`
                if isinstance(imported, types.ModuleType) and _is_own(imported.__name__):
                    for key in names:
                        if key in vars(imported) and self._is_new(vars(imported), key):
                            put = functools.partial(setattr, imported, key)
                            yield from self.value((*path, "global", name, key), vars(imported)[key], put, True)
        for name in sorted(_texts(function.__code__) & os.environ.keys()):
            if self._is_new(vars(os.environ), name):
                put = functools.partial(_set_environment, name)
                yield from self.value(("environment", name), _number_in(os.environ[name]), put, True)
        for i, cell in enumerate(function.__closure__ or ()):
            if self._enter(cell) and cell != types.CellType():  # an empty one is of a name that is not bound yet
                put = functools.partial(setattr, cell, "cell_contents")
                yield from self.value((*path, "closure", str(i)), cell.cell_contents, put, True)
        yield from self.value((*path, "attributes"), vars(function), _unsettable, True)
        for i, default in enumerate((*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())):
            yield from self.value((*path, "default", str(i)), default, _unsettable, True)

    def _enter(self, value: Any) -> bool:
        is_new = id(value) not in self._entered
        self._entered[id(value)] = value
        return is_new

    def _is_new(self, namespace: dict[str, Any], name: str) -> bool:
        # by name, not by value: two globals that are 0 are one object
        place = id(namespace), name
        is_new = place not in self._globals
        self._globals.add(place)
        return is_new


def _number_in(text: str) -> int | float | str:
    """The number that stands there, if that is all."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _set_environment(name: str, value: Any) -> None:
    os.environ[name] = str(value)


def _setter(namespace: dict[str, Any], name: str) -> Callable[[Any], None]:
    return functools.partial(namespace.__setitem__, name)


@functools.cache
def _sizes_of(cls: Any) -> frozenset[str]:
    """Names of attributes that a class of torch sets."""
    return frozenset(name for each in cls.__mro__ for name in getattr(each, "__constants__", ())) | {"__constants__"}


def _attributes(value: Any) -> dict[str, Any]:
    slots = [name for cls in type(value).__mro__ for name in _slots(cls) if hasattr(value, name)]
    return {**{name: getattr(value, name) for name in slots}, **getattr(value, "__dict__", {})}


def _slots(cls: type) -> Iterable[str]:
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else (name for name in slots if not name.startswith("__"))


def _put_element(put: Callable[[Any], None], kind: type, elements: list[Any], i: int, element: Any) -> None:
    elements[i] = element
    put(kind(elements) if kind is tuple else kind(*elements))


def _is_iterator(value: Any) -> bool:
    return isinstance(value, ReplayedIterator) or is_iterator(value)


def _is_own(module: str) -> bool:
    """Whether code of this file is a user's."""
    return bool(module) and module.partition(".")[0] not in _LIBRARIES


def _code_in(value: Any) -> tuple[Any, ...]:
    """What is reached from callables and tuples."""
    if isinstance(value, tuple):
        return value
    if isinstance(value, types.MethodType):
        return value.__func__, value.__self__
    if isinstance(value, types.BuiltinMethodType):  # of a generator, say
        return (value.__self__,)
    if isinstance(value, functools.partial):
        return value.func, *value.args, *value.keywords.values()
    if isinstance(value, property):
        return tuple(f for f in (value.fget, value.fset) if f is not None)
    if isinstance(value, staticmethod | classmethod):
        return (value.__func__,)
    if isinstance(value, _CACHED_FUNCTION):
        return (vars(value).get("__wrapped__"),)
    return (value.func,) if isinstance(value, functools.cached_property) else ()


def _is_function(value: Any) -> TypeGuard[types.FunctionType]:
    return isinstance(value, types.FunctionType)


def _names_set(code: types.CodeType) -> Iterator[str]:
    before: Any = None
    for each in dis.get_instructions(code):
        if each.opname in ("STORE_ATTR", "STORE_GLOBAL"):
            yield each.argval
        elif each.opname == "STORE_SUBSCR" and isinstance(before, str):  # of a dict
            yield before
        before = each.argval


def _constants(code: types.CodeType) -> Iterator[Any]:
    """The numbers in it, those of tuples and of functions inside it too."""
    left: list[Any] = list(code.co_consts)
    while left:
        const = left.pop()
        if isinstance(const, types.CodeType):
            left += const.co_consts
        elif isinstance(const, tuple | frozenset):
            left += const
        elif is_number(const):
            yield const


def _texts(code: types.CodeType) -> set[str]:
    """The texts in it, and in functions inside it."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return {const for const in code.co_consts if isinstance(const, str)}.union(*map(_texts, inner))


def _names(code: types.CodeType) -> set[str]:
    """The globals and attributes that code names, that of functions inside it too."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))
