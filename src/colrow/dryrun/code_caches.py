"""Caches in a model's code, outside of the model: what a run on fake tensors leaves there must not reach a real run.

A function that makes a mask or a table of positions is often cached by its sizes (`functools.lru_cache`, a dict of the
module). Run on fake tensors it keeps a tensor without values, and the next run of the process would compute with it.
"""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType, NoneType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from colrow.torch_compat import is_fake

_LIBRARIES = ("torch", "colrow")
_DICTS = (dict, OrderedDict, defaultdict)
_WITHOUT_TENSORS = frozenset((str, bytes, int, float, bool, complex, NoneType, type, FunctionType, ModuleType))
"""What most dicts of a file hold; a trace looks at each before every call of a module."""


@contextmanager
def caches_forgotten(model: nn.Module) -> Iterator[None]:
    """Afterwards no cache in the files of the model's classes holds a fake tensor."""
    caches = _Caches(model)
    try:
        yield
    finally:
        caches.forget()


@contextmanager
def caches_of_one_call(model: nn.Module) -> Iterator[None]:
    """Within, every module finds the caches without fake tensors: in a trace, what one module's code has made and
    another's takes from a cache would be a tensor that enters the other by no argument. Afterwards as
    `caches_forgotten`."""
    caches = _Caches(model)

    def forget(module: nn.Module, args: tuple[Any, ...]) -> None:
        if _package(type(module).__module__) != "torch":  # whose code takes nothing from another file's caches
            caches.forget()

    hook = register_module_forward_pre_hook(forget)
    try:
        yield
    finally:
        hook.remove()
        caches.forget()


class _Caches:
    """Cached functions, dicts, and names that stand for nothing yet, or tensors, in the model's classes and files."""

    def __init__(self, model: nn.Module) -> None:
        names = [(owner, *item) for owner in _owners(model) for item in vars(owner).items() if item[0][:2] != "__"]
        self._caches = [cache for _, _, value in names if _is_cache(cache := _function(value))]
        self._names = [
            (owner, name, None if _has_fake(value) else value)
            for owner, name, value in names
            if value is None or isinstance(value, (Tensor, tuple))
        ]

    def forget(self) -> None:
        """Forget the fake tensors."""
        for cache in self._caches:
            _forget(cache)
        for owner, name, value in self._names:
            if (now := vars(owner).get(name)) is not value and _has_fake(now):
                setattr(owner, name, value)


def _owners(model: nn.Module) -> list[Any]:
    """The classes of the model's modules, the files that define them, and those of a user's files whose functions these
    use."""
    own, files = classes_and_files(model, lambda name: _package(name) not in (*_LIBRARIES, "builtins"))
    used = {_file_of(value) for file in files for value in list(vars(file).values())}
    near = {sys.modules[name] for name in used if name in sys.modules and _is_users(sys.modules[name])}
    return [*own, *(files | near)]


def classes_and_files(model: nn.Module, is_own: Callable[[str], bool]) -> tuple[set[type], set[ModuleType]]:
    """The classes of the model's modules, with their bases, and the files that define them; those alone of which the
    name of the file is `is_own`."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if is_own(cls.__module__)}
    return classes, {sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules}


def _package(name: str) -> str:
    return name.partition(".")[0]


def _file_of(value: Any) -> str | None:
    """The name of the module that a name in a file stands for, or that defines the function that it stands for."""
    if isinstance(value, ModuleType):
        return value.__name__
    return value.__module__ if callable(value) and isinstance(getattr(value, "__module__", None), str) else None


def _is_users(module: ModuleType) -> bool:
    """Whether it is no installed package, whose files hold hundreds of dicts, and nothing of Python's own."""
    file, base = getattr(module, "__file__", None), _package(module.__name__)
    installed = {"site-packages", "dist-packages"} & set(Path(str(file)).parts)
    return bool(file) and base not in (*_LIBRARIES, *sys.stdlib_module_names) and not installed


def _function(value: Any) -> Any:
    return getattr(value, "__func__", value)  # of a static method


def _is_cache(value: Any) -> bool:
    return (hasattr(value, "cache_clear") and hasattr(value, "cache_info")) or type(value) in _DICTS


def _forget(cache: Any) -> None:
    if type(cache) in _DICTS:
        if not _WITHOUT_TENSORS.issuperset(map(type, cache.values())):
            for key in [key for key, kept in cache.items() if _has_fake(kept)]:
                del cache[key]
    # what a cached function refers to are the results, or a dict that holds them
    elif cache.cache_info().currsize and any(map(_has_fake, gc.get_referents(cache))):
        cache.cache_clear()


def _has_fake(value: Any) -> bool:
    if isinstance(value, Tensor):
        return is_fake(value)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list, set, frozenset, deque)):
        return False
    return not _WITHOUT_TENSORS.issuperset(map(type, value)) and any(map(_has_fake, value))
