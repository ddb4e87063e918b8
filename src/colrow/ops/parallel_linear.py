"""Column- and row-parallel products on local tensors, with their collectives inside.

Tokens stand in a row, [tokens, features], so that every collective works on dimension 0 and nothing is copied into
place before or after it. Each is an operator of its own (`torch.library`): torch.compile keeps it as one node in the
graph of a block and never looks inside, and what is inside may start a collective, compute, and wait. With `overlap`
point_to_point or copy_engine each is cut by rank instead, and chunks travel beside products (`ops.chunked`).

Legend: T tokens, t = T/n this rank's tokens, D hidden size, F this rank's output features of all siblings together,
f this rank's input features, n ranks. Weights are [out, in] as in nn.Linear.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from colrow.ops import chunked
from colrow.ops.carriers import Carrier, Overlap, carrier
from colrow.ops.collectives import (
    all_gather,
    group_named,
    reduce_scatter,
    start_all_gather,
    start_reduce_scatter,
)
from colrow.ops.products import column_product, for_gradients, for_outputs, input_gradient, weight_gradient
from colrow.ops.ran import note

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef

CHUNK_ROWS = 2048  # fewer rows: on H200s a cut product and its sends cost more than the collective they hide


def column_linear(
    x_tD: Tensor,
    weights: list[Tensor],
    group: str,
    keep_gathered: bool = True,
    overlap: Overlap = "collectives",
    chunk_rows: int = CHUNK_ROWS,
    fp8: str = "",
) -> Tensor:
    """[t, D] on each rank -> [T, F]: the products with all of `weights` beside each other, out of one all-gather.

    y = x W^T, W split by column.

    forward   X = all_gather(x);  Y = X W^T
    dgrad     dx = reduce_scatter(dY W)
    wgrad     dW = dY^T X                 beside the reduce-scatter

    Args:
        keep_gathered: keep X for wgrad. Else x is kept, and gathered again in backward beside dgrad.
        overlap: what runs beside products, see `carriers.Overlap`. NCCL takes multiprocessors from a product, so that
            `none` may be as fast as `collectives`: measure.
        chunk_rows: where t is less, the products are too small to be cut, and run as with `collectives`.
        fp8: the products' precision, `tensorwise` or `rowwise` (`ops.float8`); the factors' own unless given.
    """
    y: Tensor = torch.ops.colrow.column_forward(x_tD, weights, group, keep_gathered, overlap, chunk_rows, fp8)[0]
    return y


def row_linear(
    x_Tf: Tensor,
    weight: Tensor,
    group: str,
    overlap: Overlap = "collectives",
    chunk_rows: int = CHUNK_ROWS,
    fp8: str = "",
) -> Tensor:
    """[T, f] on each rank -> [t, D]: the sum over ranks of their products.

    y = x W^T, W split by row.

    forward   y = reduce_scatter(x W^T)
    backward  dY = all_gather(dy);  dx = dY W;  dW = dY^T x

    Args:
        overlap, chunk_rows, fp8: as in `column_linear`. Whole collectives have nothing here to run beside.
    """
    y: Tensor = torch.ops.colrow.row_forward(x_Tf, weight, group, overlap, chunk_rows, fp8)
    return y


def scatter_sum(x_TD: Tensor, group: str) -> Tensor:
    """[T, D], a part of a sum on each rank -> [t, D] of the sum. The dual is an all-gather."""
    y: Tensor = torch.ops.colrow.scatter_sum(x_TD, group)
    return y


def gather(x_tD: Tensor, group: str) -> Tensor:
    """[t, D] on each rank -> [T, D], for use that differs between ranks. The dual is `scatter_sum`."""
    y: Tensor = torch.ops.colrow.gather(x_tD, group)
    return y


OPERATORS: dict[str, Callable[..., Any]] = {}
"""What is inside each operator, by its full name: for those who simulate ranks."""


def operator(name: str, schema: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Make a function the operator `colrow::name`."""

    def define(inside: Callable[..., Any]) -> CustomOpDef:
        OPERATORS[f"colrow::{name}"] = inside
        return torch.library.custom_op(f"colrow::{name}", inside, mutates_args=(), schema=schema)

    return define


def _carrier(overlap: str, chunk_rows: int, t: int, group: str, device: torch.device) -> Carrier | None:
    """What carries chunks of t rows; None where the operator is not cut."""
    return None if t < chunk_rows else carrier(overlap, group, device)


@operator(
    "column_forward",
    "(Tensor x, Tensor[] weights, str group, bool keep_gathered, str overlap, int chunk_rows, str fp8)"
    " -> (Tensor, Tensor)",
)
def _column_forward(
    x: Tensor, weights: list[Tensor], group: str, keep_gathered: bool, overlap: str, chunk_rows: int, fp8: str
) -> tuple[Tensor, Tensor]:
    by = _carrier(overlap, chunk_rows, x.shape[0], group, x.device)
    note("columns", len(weights))
    if by is not None:
        return chunked.column_forward(x.contiguous(), weights, by, keep_gathered, fp8)
    gathered = all_gather(x, group_named(group))
    y = gathered.new_empty(gathered.shape[0], sum(w.shape[0] for w in weights))
    column_product(gathered, for_outputs(weights, fp8), y, fp8)
    return y, gathered if keep_gathered else gathered.new_empty(0)


@_column_forward.register_fake
def _(x: Tensor, weights: list[Tensor], group: str, keep_gathered: bool, *_: Any) -> tuple[Tensor, Tensor]:
    T = x.shape[0] * group_named(group).size()
    gathered = x.new_empty(T, x.shape[1]) if keep_gathered else x.new_empty(0)
    return x.new_empty(T, sum(w.shape[0] for w in weights)), gathered


@operator(
    "column_backward",
    "(Tensor dy, Tensor x, Tensor[] weights, str group, bool gathered, str overlap, bool want_x,"
    " bool want_w, int chunk_rows, str fp8) -> (Tensor, Tensor)",
)
def _column_backward(
    dy: Tensor,
    x: Tensor,
    weights: list[Tensor],
    group: str,
    gathered: bool,
    overlap: str,
    want_x: bool,
    want_w: bool,
    chunk_rows: int,
    fp8: str,
) -> tuple[Tensor, Tensor]:
    ranks = group_named(group)
    by = _carrier(overlap, chunk_rows, dy.shape[0] // ranks.size(), group, dy.device)
    note("beside", overlap if by is not None or overlap == "none" else "collectives")
    if by is not None:
        return chunked.column_backward(dy, x.contiguous(), weights, by, gathered, want_x, want_w, fp8)
    again = start_all_gather(x, ranks) if want_w and not gathered else None
    if again is not None and overlap == "none":
        again()
    arrival = None
    if want_x:
        dx = dy.new_empty(dy.shape[0], weights[0].shape[1])
        input_gradient(dy, for_gradients(weights, fp8), dx, fp8)
        arrival = start_reduce_scatter(dx, ranks)
        if overlap == "none":
            arrival()
    inputs = x if again is None else again()
    dw = weight_gradient(dy, inputs, fp8) if want_w else dy.new_empty(0)
    return dy.new_empty(0) if arrival is None else arrival(), dw


@_column_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weights: list[Tensor], group: str, gathered: bool, overlap: str, *options: Any
) -> tuple[Tensor, Tensor]:
    want_x, want_w, *_ = options
    D = weights[0].shape[1]
    dx = dy.new_empty(dy.shape[0] // group_named(group).size(), D) if want_x else dy.new_empty(0)
    return dx, dy.new_empty(dy.shape[1], D) if want_w else dy.new_empty(0)


def _save_column(ctx: Any, inputs: Any, output: Any) -> None:
    x, weights, ctx.group, ctx.keep_gathered, ctx.overlap, ctx.chunk_rows, ctx.fp8 = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if ctx.keep_gathered else x, *weights)


def _differentiate_column(ctx: Any, dy: Tensor | None, _: Any) -> Any:
    x, *weights = ctx.saved_tensors
    if dy is None:
        return None, [None] * len(weights), None, None, None, None, None
    want_x, want_w = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    dx, dw = torch.ops.colrow.column_backward(
        dy.contiguous(),
        x,
        weights,
        ctx.group,
        ctx.keep_gathered,
        ctx.overlap,
        want_x,
        any(want_w),
        ctx.chunk_rows,
        ctx.fp8,
    )
    parts = dw.split([w.shape[0] for w in weights], 0) if any(want_w) else [None] * len(weights)
    return dx if want_x else None, list(parts), None, None, None, None, None


torch.library.register_autograd("colrow::column_forward", _differentiate_column, setup_context=_save_column)


@operator(
    "row_forward",
    "(Tensor x, Tensor weight, str group, str overlap, int chunk_rows, str fp8) -> Tensor",
)
def _row_forward(x: Tensor, weight: Tensor, group: str, overlap: str, chunk_rows: int, fp8: str) -> Tensor:
    ranks = group_named(group)
    by = _carrier(overlap, chunk_rows, x.shape[0] // ranks.size(), group, x.device)
    if by is not None:
        return chunked.row_forward(x, weight, by, fp8)
    y = x.new_empty(x.shape[0], weight.shape[0])
    column_product(x, for_outputs([weight], fp8), y, fp8)
    return reduce_scatter(y, ranks)


@_row_forward.register_fake
def _(x: Tensor, weight: Tensor, group: str, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0] // group_named(group).size(), weight.shape[0])


@operator(
    "row_backward",
    "(Tensor dy, Tensor x, Tensor weight, str group, str overlap, bool want_x, bool want_w, int chunk_rows,"
    " str fp8) -> (Tensor, Tensor)",
)
def _row_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    group: str,
    overlap: str,
    want_x: bool,
    want_w: bool,
    chunk_rows: int,
    fp8: str,
) -> tuple[Tensor, Tensor]:
    by = _carrier(overlap, chunk_rows, dy.shape[0], group, dy.device)
    if by is not None:
        return chunked.row_backward(dy, x, weight, by, want_x, want_w, fp8)
    gathered = all_gather(dy, group_named(group))
    dx = x.new_empty(x.shape if want_x else 0)
    if want_x:
        input_gradient(gathered, for_gradients([weight], fp8), dx, fp8)
    return dx, weight_gradient(gathered, x, fp8) if want_w else dy.new_empty(0)


@_row_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, group: str, overlap: str, *options: Any) -> tuple[Tensor, Tensor]:
    want_x, want_w, *_ = options
    dx = x.new_empty(x.shape) if want_x else dy.new_empty(0)
    return dx, weight.new_empty(weight.shape) if want_w else dy.new_empty(0)


def _save_row(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, ctx.group, ctx.overlap, ctx.chunk_rows, ctx.fp8 = inputs
    ctx.save_for_backward(x, weight)


def _differentiate_row(ctx: Any, dy: Tensor) -> Any:
    x, weight = ctx.saved_tensors
    want_x, want_w, *_ = ctx.needs_input_grad
    dx, dw = torch.ops.colrow.row_backward(
        dy.contiguous(), x, weight, ctx.group, ctx.overlap, want_x, want_w, ctx.chunk_rows, ctx.fp8
    )
    return dx if want_x else None, dw if want_w else None, None, None, None, None


torch.library.register_autograd("colrow::row_forward", _differentiate_row, setup_context=_save_row)


@operator("scatter_sum", "(Tensor x, str group) -> Tensor")
def _scatter_sum(x: Tensor, group: str) -> Tensor:
    return reduce_scatter(x, group_named(group))


@_scatter_sum.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0] // group_named(group).size(), *x.shape[1:])


@operator("gather", "(Tensor x, str group) -> Tensor")
def _gather(x: Tensor, group: str) -> Tensor:
    return all_gather(x, group_named(group))


@_gather.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0] * group_named(group).size(), *x.shape[1:])


def _save_group(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.group = inputs[1]


def _differentiate_scatter(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.colrow.gather(dy, ctx.group), None


def _differentiate_gather(ctx: Any, dy: Tensor) -> Any:
    return torch.ops.colrow.scatter_sum(dy, ctx.group), None


torch.library.register_autograd("colrow::scatter_sum", _differentiate_scatter, setup_context=_save_group)
torch.library.register_autograd("colrow::gather", _differentiate_gather, setup_context=_save_group)


def traffic(operator: str, args: tuple[Any, ...], outputs: list[Tensor]) -> list[tuple[str, Tensor, int]]:
    """The collectives inside an operator's call: kind, what is sent, bytes of the larger side. For dry runs, which see
    the operator and not what is inside; empty for other operators. A gather is one whoever carries its chunks."""

    def one(kind: str, part: Tensor, group: str) -> tuple[str, Tensor, int]:
        return kind, part, part.numel() * part.element_size() * group_named(group).size()

    match operator:
        case "column_forward":
            return [one("all_gather", args[0], args[2])]
        case "column_backward":
            dx, _ = outputs
            _, x, _, group, gathered, _, want_x, want_w, *_ = args
            again = [] if gathered or not want_w else [one("all_gather", x, group)]
            return [*again, *([one("reduce_scatter", dx, group)] if want_x else [])]
        case "row_forward":
            return [one("reduce_scatter", outputs[0], args[2])]
        case "row_backward":
            return [one("all_gather", args[0], args[3])]
        case "scatter_sum":
            return [one("reduce_scatter", outputs[0], args[1])]
        case "gather" | "whole":
            return [one("all_gather", args[0], args[-1])]
    return []
