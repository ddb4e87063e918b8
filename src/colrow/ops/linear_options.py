"""How the linears of `ops.parallel_linear` are computed: one frozen object, passed to operators as one string."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields

import torch

from colrow.ops.carriers import Overlap, carrier
from colrow.ops.exchange import Carrier
from colrow.ops.float8 import PER_TENSOR

CHUNK_ROWS = 2048  # measured on H200s: with fewer rows, splitting a matmul costs more than the collective it hides


@dataclass(frozen=True)
class LinearOptions:
    """What a parallel linear's operators need to know, the same on all ranks of the group.

    Attributes:
        overlap: what runs at the same time as matmuls, see `carriers.Overlap`. NCCL takes multiprocessors from a
            matmul, so that `none` may be as fast as `collectives`: measure.
        chunk_rows: a rank with fewer tokens than this does not split its matmuls, and runs as with `collectives`.
        fp8: `tensorwise` or `delayed` for matmuls in 8-bit floats (`ops.float8`), `rowwise` or `blockwise` for those
            but wgrad's (`ops.weights`); empty for matmuls in the operands' dtype.
        keep_gathered: `column_linear` keeps the gathered input for the weight gradient. Else it keeps this rank's
            tokens, and gathers again in backward: less memory, one all-gather more.
    """

    overlap: Overlap = "collectives"
    chunk_rows: int = CHUNK_ROWS
    fp8: str = ""
    keep_gathered: bool = True
    text: str = field(init=False, repr=False, compare=False)
    """The options as the operators take them: a custom operator's schema knows str, and no classes."""

    def __post_init__(self) -> None:
        # made here and not in forward, where torch.compile would trace it
        object.__setattr__(self, "text", json.dumps({name: getattr(self, name) for name in option_names()}))

    @staticmethod
    @functools.cache
    def parse(text: str) -> LinearOptions:
        """The options whose `text` this is."""
        return LinearOptions(**json.loads(text))

    @property
    def per_tensor(self) -> bool:
        """Whether the operators are those of `ops.float8_linear`."""
        return self.fp8 in PER_TENSOR

    @property
    def overlaps(self) -> bool:
        return self.overlap != "none"

    def carrier(self, rows: int, group: str, device: torch.device) -> Carrier | None:
        """What sends chunks of `rows` rows; None if the operator is not split into chunks."""
        return None if rows < self.chunk_rows else carrier(self.overlap, group, device)


@functools.cache
def option_names() -> tuple[str, ...]:
    """The options' names: a style's fields of these names are the options of its linears."""
    return tuple(f.name for f in fields(LinearOptions) if f.init)
