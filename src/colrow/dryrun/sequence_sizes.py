"""Sizes that code writes for a rank's complete sequences, in the second view of flattened tokens.

On real ranks a tensor of a rank's tokens is [B, T/n, ...]: code writes B as in the unsharded model, and what it writes
for T is made a rank's by a rule ([Note: sizes in code]). In the second view it is [B/n, T, ...]: T is right as it is
written, and B is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from colrow.dryrun.numbered import NumberedRun
from colrow.sharding.local_layout import sharded
from colrow.styles.fast.unflatten import complete_sequences_in
from colrow.styles.local_sizes import CALLS, CodeMode, Sizes, sizes_written, with_sizes

_SHAPES = ("view", "reshape", "expand", "broadcast_to", "new_zeros", "new_ones", "new_empty", "new_full")


class _OfRank(CodeMode):
    def __init__(self, run: NumberedRun, sequences: tuple[int, int], length: int) -> None:
        super().__init__()
        self._run, self._length = run, length
        self._local, self._all = sequences

    def holds(self, x: Tensor) -> bool:
        """Whether dim 0 is a rank's sequences, or their tokens."""
        if not x.dim() or x.shape[0] not in (self._local, self._local * self._length):
            return False
        value = self._run.known(x)
        return value is not None and value.layout == sharded(0)

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        call = CALLS.get(func)
        if call is None or call.name not in _SHAPES or not isinstance(args[0], Tensor) or not self.holds(args[0]):
            return func(*args, **kwargs)
        written = sizes_written(func, args, kwargs)
        return func(*args, **kwargs) if not written else with_sizes(func, args, kwargs, self._sizes(args[0], written))

    def _sizes(self, x: Tensor, written: Sizes) -> Sizes:
        first, *rest = written
        ranks = self._all // self._local
        if first == self._all or (first % ranks == 0 and math.prod(written) == ranks * x.numel()):
            return first // ranks, *rest
        return written


@contextmanager
def sizes_of_sequences(run: NumberedRun, sequences: tuple[int, int], length: int) -> Iterator[None]:
    """Within, code writes a rank's sizes for its complete sequences.

    Args:
        sequences: how many a rank has, and how many all.
        length: of each.
    """
    mode = _OfRank(run, sequences, length)
    with complete_sequences_in(mode.holds), mode:
        yield
