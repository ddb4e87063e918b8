"""Weights that the flat data engine gathers in 8 bits.

[Note: quantized shards]
Every rank would round the gathered weights of an 8-bit linear, all ranks the same numbers, in forward and once more in
backward. With `fsdp.gather_fp8` the rank that has a shard rounds it, once a step, and the bytes are what is gathered:

    peaks    max |shard| of each weight; the maximum over the weights that one matmul takes side by side, and over ranks
    round    shard / scale(peaks) -> e4m3, into what the rank sends
    gather   half the bytes; forward's matmuls read the buffer, backward's a transpose of it

The scale is that of all rows, and shards are rounded from the compute dtype: numbers and scale are, bit for bit, what
`ops.float8.quantize` makes of the gathered weights. What a weight's place in the model holds is a stand-in of NaN that
only gets the gradient, so code that reads it beside the matmul is seen in the first loss.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.errors import ConfigError
from colrow.ops.execution_record import record
from colrow.ops.float8 import quantize_weight_into
from colrow.ops.kernels.rounding import peak_of
from colrow.sharding.local_view import VIEWS
from colrow.sharding.parameter_state import holders_of
from colrow.styles.fast.linear import QUANTIZED, multiplied
from colrow.styles.packed import is_transposed
from colrow.styles.rank_tensors import same_on_all_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from colrow.parallel.flat_unit import FlatParameter, FlatUnit

GATHERED_IN_8_BITS = "weights gathered in 8 bits"
"""What the record of a step says."""


@dataclass(frozen=True)
class QuantizedMatmul:
    """A module that multiplies in 8 bits, and the weights that it takes, side by side."""

    module: nn.Module
    weights: tuple[nn.Parameter, ...]


def quantized_matmuls(model: nn.Module, blocks: Iterable[nn.Module]) -> list[QuantizedMatmul]:
    """Those whose weights can be gathered in 8 bits: inside a block, [out, in], read by no other module, and each
    rank's rows of them used as they are."""
    holders, found = holders_of(model), []
    for block in blocks:
        for module, each in multiplied(block).items():
            if not each.options.per_tensor:
                continue
            linears = each.linears
            weights = [linear._parameters["weight"] for linear in linears]
            alone = all(weight is not None and holders[weight] == 1 for weight in weights)
            as_they_are = all(
                linear.__dict__.get(VIEWS, {}).get("weight", same_on_all_ranks) is same_on_all_ranks
                for linear in linears
            )
            if alone and as_they_are and not any(map(is_transposed, linears)):
                found.append(QuantizedMatmul(module, tuple(weight for weight in weights if weight is not None)))
    return found


class QuantizedShards:
    """Rounds the shards of `matmuls`, and lets these read what was gathered.

    Args:
        units: that have allocated their memory, with these weights in 8 bits.
        group: of dp_shard.
    """

    def __init__(self, matmuls: Sequence[QuantizedMatmul], units: Sequence[FlatUnit], group: dist.ProcessGroup) -> None:
        if not matmuls:
            raise ConfigError(
                "fsdp.gather_fp8 gathers weights of 8-bit matmuls in 8 bits, and the plan has none whose weights are "
                "[out, in] and its own",
                {"fsdp.gather_fp8": False},
            )
        self._matmuls, self._group = matmuls, group
        index = {param: at for at, matmul in enumerate(matmuls) for param in matmul.weights}
        self._of_units = {
            unit: [(index[each.param], each) for each in unit.params if each.param in index] for unit in units
        }
        by_param = {each.param: each for rows in self._of_units.values() for _, each in rows}
        device = by_param[matmuls[0].weights[0]].copy.device
        # 16 bytes for each scale: inductor copies an input that is less aligned than the one it compiled for
        scales = torch.zeros(len(matmuls), 4, device=device)
        self._scales = [row[0] for row in scales.unbind()]
        self._placed = [
            (*(_as_bytes(by_param[weight]) for weight in matmul.weights), scale)
            for matmul, scale in zip(matmuls, self._scales, strict=True)
        ]
        self._indices: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def quantize(self, units: Collection[FlatUnit]) -> None:
        """Round the shards of these units, from their copies in the compute dtype. Collective."""
        rows = [row for unit in units for row in self._of_units[unit]]
        if not rows:
            return
        held = [(index, each) for index, each in rows if each.copy.numel()]
        peaks = torch.zeros(len(self._matmuls), dtype=torch.int32, device=self._scales[0].device)
        if held:
            largest = peak_of([each.copy.view(-1) for _, each in held]).view(torch.int32)
            peaks.scatter_reduce_(0, self._indices_of(held), largest, "amax")
        of_matmul = self._largest_of_ranks(peaks).view(torch.float32).split(1)
        # Every rank needs every scale, also of weights of which it has no row.
        for index, each in rows:
            assert each.numbers is not None
            quantize_weight_into(each.numbers, each.copy, of_matmul[index], self._scales[index])
        record("data", GATHERED_IN_8_BITS)

    @contextmanager
    def placed(self) -> Iterator[None]:
        """Within, the matmuls read what the units have gathered."""
        for matmul, tensors in zip(self._matmuls, self._placed, strict=True):
            matmul.module.__dict__[QUANTIZED] = tensors
        try:
            yield
        finally:
            for matmul in self._matmuls:
                matmul.module.__dict__[QUANTIZED] = ()

    def _largest_of_ranks(self, peaks: Tensor) -> Tensor:
        """The maximum over ranks of the peaks' bits, which are ordered as the floats are: not every backend's maximum
        of floats keeps a NaN."""
        dist.all_reduce(peaks, dist.ReduceOp.MAX, self._group)
        return peaks

    def _indices_of(self, held: Sequence[tuple[int, FlatParameter]]) -> Tensor:
        """The indices in `_matmuls` on the device, which are uploaded once."""
        indices = tuple(index for index, _ in held)
        if indices not in self._indices:
            self._indices[indices] = torch.tensor(indices, device=self._scales[0].device)
        return self._indices[indices]


def _as_bytes(each: FlatParameter) -> Tensor:
    assert each.all_numbers is not None
    return each.all_numbers.view(torch.uint8)
