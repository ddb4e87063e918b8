"""What of a sharded run is not proven: an operator's result counts once something reads it."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Unproven:
    """An operator, a declared layout or a gradient of which nothing says that it is right.

    Attributes:
        operator: its ATen name, or `layout`, `input`, `output`, `gradient`, `loss`.
        where: the module's or parameter's name.
        line: `file.py:12` of the code that called it, or empty.
        dim: the sharded dim, where one is at fault.
    """

    operator: str
    where: str
    line: str
    reason: str
    dim: int | None = None


class Reports:
    """Attributes:
    found: what is not proven, in order.
    """

    def __init__(self) -> None:
        self.found: list[Unproven] = []
        self._unread: dict[Hashable, tuple[Unproven, Sequence[weakref.ref[Tensor]]]] = {}

    def add_when_read(self, found: Unproven, results: dict[Hashable, Tensor]) -> None:
        """An operator's results, by their keys. torch makes tensors that nothing reads: vmap takes an element of a
        batch for its dtype alone."""
        references = [weakref.ref(result) for result in results.values()]
        self._unread.update(dict.fromkeys(results, (found, references)))

    def read(self, key: Hashable) -> None:
        """Something asks what the tensor with this key is."""
        if key in self._unread:
            self._add(self._unread[key])

    def add_kept(self) -> None:
        """The step is over: what is not proven and still alive stands in an attribute, for the next forward perhaps."""
        for unread in list(self._unread.values()):
            if any(result() is not None for result in unread[1]):
                self._add(unread)

    def _add(self, unread: tuple[Unproven, Sequence[weakref.ref[Tensor]]]) -> None:
        left = {key: other for key, other in self._unread.items() if other is not unread}
        if len(left) < len(self._unread):
            self.found.append(unread[0])
        self._unread = left
