"""The weights of sibling linears, as the two matmuls that read them take them: in their dtype, or in 8 bits by rows.

    forward  Y = X W^T        dgrad  dX = dY W

The recipe `rowwise` rounds with a scale for each row of both operands: of a token, and of an output feature in forward,
an input feature in dgrad. All numbers are e4m3, gradients too: one row needs no range. The scales of rows come out of a
sum over columns, and wgrad sums over tokens: it multiplies what is not rounded, and collectives send that.

Legend: as in `products`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from torch import Tensor

from colrow.ops.execution_record import record
from colrow.ops.float8 import Float8Operand, require, scaled_mm
from colrow.ops.kernels.row_rounding import round_rows
from colrow.ops.products import column_product, concatenated, input_gradient, joined_weights


class Weights:
    """The weights of sibling linears, side by side. What both matmuls need is made once for all chunks."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._parts = joined_weights(list(weights))

    def product(self, x_TD: Tensor, out: Tensor) -> None:
        """out [T, F] = x W^T."""
        column_product(x_TD, self._parts, out)

    def input_gradient(self, dy_TF: Tensor, out: Tensor) -> None:
        """out [T, D] = dY W."""
        input_gradient(dy_TF, self._parts, out)


class RoundedWeights(Weights):
    """Multiplied in 8 bits, by rows."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self._weight = concatenated(list(weights))

    def product(self, x_TD: Tensor, out: Tensor) -> None:
        scaled_mm(_rounded(x_TD), self._rows, out)

    def input_gradient(self, dy_TF: Tensor, out: Tensor) -> None:
        scaled_mm(_rounded(dy_TF), self._columns, out, gradient=True)

    @cached_property
    def _rows(self) -> Float8Operand:
        return _rounded(self._weight)

    @cached_property
    def _columns(self) -> Float8Operand:
        return _rounded(self._weight.t())


def prepared(weights: Sequence[Tensor], fp8: str) -> Weights:
    """The weights for `LinearOptions.fp8`, which is not `per_tensor`: see `float8_linear`."""
    if not fp8:
        return Weights(weights)
    record("fp8", fp8)
    return RoundedWeights(weights)


def _rounded(x_MK: Tensor) -> Float8Operand:
    require(x_MK.device, x_MK.shape[1])
    return Float8Operand(*round_rows(x_MK))
