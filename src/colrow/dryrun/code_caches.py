"""Caches in a model's code, outside of the model: what a run on fake tensors leaves there must not reach a real run.

A function that makes a mask or a table of positions is often cached by its sizes (`functools.lru_cache`, a dict of the
module). Run on fake tensors it keeps a tensor without values, and the next run of the process would compute with it.
"""

from __future__ import annotations

import gc
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from colrow.torch_compat import is_fake, tree_leaves

_LIBRARIES = ("torch", "colrow")


@contextmanager
def caches_forgotten(model: nn.Module) -> Iterator[None]:
    """Afterwards no cache in the files of the model's classes holds a fake tensor."""
    try:
        yield
    finally:
        for names in _namespaces(model):
            for value in list(names.values()):
                _forget(value)


def _namespaces(model: nn.Module) -> list[Any]:
    """The names in the classes of the model's modules, and in the files that define them."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    own = {cls for cls in classes if cls.__module__.partition(".")[0] not in (*_LIBRARIES, "builtins")}
    files = {sys.modules[cls.__module__] for cls in own if cls.__module__ in sys.modules}
    return [vars(names) for names in (*own, *files)]


def _forget(value: Any) -> None:
    value = getattr(value, "__func__", value)  # of a static method
    if hasattr(value, "cache_clear") and hasattr(value, "cache_info"):
        if any(map(_has_fake, gc.get_referents(value))):  # the results, or a dict that holds them
            value.cache_clear()
    elif type(value) in (dict, OrderedDict, defaultdict):
        for key in [key for key, kept in value.items() if _has_fake(kept)]:
            del value[key]


def _has_fake(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) and is_fake(leaf) for leaf in tree_leaves(value))
