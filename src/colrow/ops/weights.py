"""The weights of sibling linears, as the two matmuls that read them take them: in their dtype, or in 8 bits with
scales of rows or blocks.

    forward  Y = X W^T        dgrad  dX = dY W

The recipe `rowwise` rounds with a scale for each row of both operands: of a token, and of an output feature in forward,
an input feature in dgrad. All numbers are e4m3, gradients too: one row needs no range. The scales of rows come out of a
sum over columns, and wgrad sums over tokens: it multiplies what is not rounded, and collectives send that.

`blockwise` is the recipe of DeepSeek-V3 (arXiv:2412.19437, 3.3): a scale for each 128 numbers of a token, and for each
128 x 128 of a weight, all e4m3. There wgrad is in 8 bits too, which needs blocks of 128 tokens: a second rounding of X
and of dY. Here it multiplies what is not rounded, as with `rowwise`, so that a weight's gradient loses nothing.

Legend: as in `products`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from colrow.ops.execution_record import record
from colrow.ops.float8 import Float8Operand, require, require_blocks, scaled_mm
from colrow.ops.kernels.block_rounding import round_blocks
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


def _by_rows(x_MK: Tensor) -> Float8Operand:
    require(x_MK.device, x_MK.shape[1])
    return Float8Operand(*round_rows(x_MK))


def _by_blocks(x_MK: Tensor) -> Float8Operand:
    require(x_MK.device, x_MK.shape[0])
    require_blocks(x_MK.device, x_MK.shape[1])
    return Float8Operand(*round_blocks(x_MK))


def _by_squares(w_MK: Tensor) -> Float8Operand:
    require_blocks(w_MK.device, *w_MK.shape)
    return Float8Operand(*round_blocks(w_MK, square=True))


@dataclass(frozen=True)
class Roundings:
    """How a recipe rounds activations and gradients, [tokens, features], and weights."""

    of_tokens: Callable[[Tensor], Float8Operand]
    of_weight: Callable[[Tensor], Float8Operand]


ROUNDINGS = {"rowwise": Roundings(_by_rows, _by_rows), "blockwise": Roundings(_by_blocks, _by_squares)}


class RoundedWeights(Weights):
    """Multiplied in 8 bits."""

    def __init__(self, weights: Sequence[Tensor], recipe: str) -> None:
        self._weight, self._roundings = concatenated(list(weights)), ROUNDINGS[recipe]

    def product(self, x_TD: Tensor, out: Tensor) -> None:
        scaled_mm(self._roundings.of_tokens(x_TD), self._rows, out)

    def input_gradient(self, dy_TF: Tensor, out: Tensor) -> None:
        scaled_mm(self._roundings.of_tokens(dy_TF), self._columns, out, gradient=True)

    @cached_property
    def _rows(self) -> Float8Operand:
        return self._roundings.of_weight(self._weight)

    @cached_property
    def _columns(self) -> Float8Operand:
        return self._roundings.of_weight(self._weight.t())


def prepared(weights: Sequence[Tensor], fp8: str) -> Weights:
    """The weights for `LinearOptions.fp8`, which is not `per_tensor`: see `float8_linear`."""
    if not fp8:
        return Weights(weights)
    record("fp8", fp8)
    return RoundedWeights(weights, fp8)
