"""Which operator gives other bits for the same inputs: every operator of a step, with hashes of its tensors.

Left out is memory that nothing has written yet: what an operator overwrites, views, new tensors that are not set, and
what collectives return before they have finished.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from colrow.sharding.layout import waited_local
from colrow.torch_compat import TorchDispatchMode, tree_leaves
from colrow.train.fingerprint import fingerprints

Operation = tuple[str, tuple[Any, ...], tuple[int, ...]]
"""An operator's name, numbers and hashes of what it reads, hashes of what it returns."""


class OperatorTrace(TorchDispatchMode):
    """Collects an entry for each operator that runs within, in forward and in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.entries: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        collective = func.namespace in ("c10d", "_c10d_functional")
        # before the call: an operator may write in place what it has read
        read = () if collective else _hashes(list(_read(func, args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.entries.append((func.name(), read, () if collective or "empty" in func.name() else _hashes(result)))
        return result


def first_nondeterministic(first: Sequence[Operation], second: Sequence[Operation]) -> str | None:
    """What makes two runs of one step differ: the first operator that reads the same and returns other bits, or code
    before the first that reads other bits; None where all entries agree."""
    for (name, read, returned), (other_name, other_read, other_returned) in zip(first, second, strict=False):
        if name != other_name or read != other_read:
            return f"what is no operator of torch, before {name}"
        if returned != other_returned:
            return name
    return None


def _read(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[Any]:
    for position, declared in enumerate(func._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            continue
        if position < len(args):
            yield args[position]
        elif declared.name in kwargs:
            yield kwargs[declared.name]


def _hashes(tree: Any) -> tuple[Any, ...]:
    leaves = tree_leaves(tree)
    numbers = tuple(x for x in leaves if isinstance(x, int | float | str))
    tensors = [waited_local(x) for x in leaves if isinstance(x, Tensor)]
    # FSDP2 frees the storage of gathered parameters, of which an operator may still ask the shape
    return (*numbers, *fingerprints(x for x in tensors if x.untyped_storage().size()).tolist())
