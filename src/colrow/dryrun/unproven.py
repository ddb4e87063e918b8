"""What of a sharded run is not proven: an operator's result counts once something needs it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class Unproven:
    """An operator, a declared layout or a gradient of which nothing says that it is right.

    Attributes:
        operator: its ATen name, or `layout`, `input`, `output`, `gradient`, `loss`.
        where: the module's or parameter's name.
        line: `file.py:12` of the code that called it, or empty.
        dim: the sharded dim, where one is at fault.
        is_used: a module, the loss or a gradient got it; else it only stands in an attribute when the step is over.
        code: of the finding: CR305 for a log-softmax of split logits, CR413 for a sum that DTensor does not make.
    """

    operator: str
    where: str
    line: str
    reason: str
    dim: int | None = None
    is_used: bool = True
    code: str = "CR414"


@dataclass(eq=False)
class _Pending:
    """Attributes:
    results: all tensors that were computed with it.
    """

    unproven: Unproven
    results: list[weakref.ref[Tensor]]

    @property
    def is_alive(self) -> bool:
        return any(result() is not None for result in self.results)


class Reports:
    """Attributes:
    found: what is not proven, in order.
    """

    def __init__(self) -> None:
        self.found: list[Unproven] = []
        self._pending: dict[Hashable, tuple[_Pending, ...]] = {}
        self._reported: set[_Pending] = set()

    def add_when_read(self, found: Unproven, results: Mapping[Hashable, Tensor]) -> None:
        """An operator's results, by their keys. Code computes tensors that nothing needs: vmap takes an element of a
        batch for its dtype alone, a logged statistic is dropped."""
        self._hold((_Pending(found, []),), results)

    def pass_on(self, keys: Iterable[Hashable], results: Mapping[Hashable, Tensor]) -> None:
        """Results were computed with the tensors of these keys, and nothing more is known of them."""
        self._hold(dict.fromkeys(p for key in keys for p in self._pending.get(key, ())), results)

    def read(self, key: Hashable) -> None:
        """A module, the loss, a gradient or a write takes the tensor with this key."""
        for pending in self._pending.pop(key, ()):
            self._report(pending, is_used=True)

    def forget(self, results: Mapping[Hashable, Tensor]) -> None:
        """Tensors that were written are something else now."""
        for key, result in results.items():
            for pending in self._pending.pop(key, ()):
                pending.results = [each for each in pending.results if each() is not result]

    def add_kept(self) -> None:
        """The step is over: what is not proven and still alive stands in an attribute, for the next forward perhaps."""
        kept = [p for p in dict.fromkeys(p for held in self._pending.values() for p in held) if p.is_alive]
        if kept:
            gc.collect()  # hooks and autograd nodes are in cycles: what these alone hold is dead, and still there
        for pending in kept:
            if pending.is_alive:
                self._report(pending, is_used=False)

    def _hold(self, pending: Iterable[_Pending], results: Mapping[Hashable, Tensor]) -> None:
        for each in (pending := tuple(pending)):
            each.results += map(weakref.ref, results.values())
        if pending:
            self._pending |= {key: self._pending.get(key, ()) + pending for key in results}

    def _report(self, pending: _Pending, is_used: bool) -> None:
        if pending not in self._reported:
            self._reported.add(pending)
            self.found.append(replace(pending.unproven, is_used=is_used))
