"""Column- and row-parallel linears on local tensors, with their collectives inside.

Tokens are flattened, [tokens, features], so that every collective works on dim 0 and nothing is copied into place
before or after it. Each linear is an operator of its own (`torch.library`): torch.compile keeps it as one node of the
graph and never looks inside, so that it may start a collective, compute, and wait. With `overlap` point_to_point or
copy_engine, matmuls are split by rank, and chunks are sent at the same time (`ops.chunked`).

Legend: T tokens, t = T/n this rank's tokens, D hidden size, F this rank's output features of all siblings together,
f this rank's input features, n ranks. Weights are [out, in] as in nn.Linear. x without a suffix is X_TD or x_tD.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from colrow.ops import chunked, float8_linear
from colrow.ops.collectives import (
    all_gather,
    reduce_scatter,
    start_all_gather,
    start_reduce_scatter,
)
from colrow.ops.execution_record import record
from colrow.ops.float8 import packed_shape, require_sizes
from colrow.ops.linear_options import LinearOptions
from colrow.ops.products import weight_gradient
from colrow.ops.weights import prepared
from colrow.torch_compat import Operator, group_named

DEFAULTS = LinearOptions()


def column_linear(
    x_tD: Tensor,
    weights: list[Tensor],
    group: str,
    options: LinearOptions = DEFAULTS,
    quantized: Sequence[Tensor] = (),
    history: Tensor | None = None,
) -> Tensor:
    """[t, D] on each rank -> [T, F]: one all-gather, then the matmuls with all of `weights`, side by side.

    y = x W^T, W sharded on its output features.

    forward   X = all_gather(x);  Y = X W^T
    dgrad     dx = reduce_scatter(dY W)
    wgrad     dW = dY^T X                 while the reduce-scatter runs

    Args:
        quantized: see [Note: quantized weights].
        history: with `fp8: delayed`, see [Note: peak history] in `ops.float8`.
    """
    y_TF, _ = torch.ops.colrow.column_forward(x_tD, weights, group, options.text, None, list(quantized), history)
    return y_TF


def row_linear(
    x_Tf: Tensor,
    w_Df: Tensor,
    group: str,
    options: LinearOptions = DEFAULTS,
    quantized: Sequence[Tensor] = (),
    history: Tensor | None = None,
) -> Tensor:
    """[T, f] on each rank -> [t, D]: the sum of all ranks' matmuls.

    y = x W^T, W sharded on its input features.

    forward   y = reduce_scatter(x W^T)
    backward  dY = all_gather(dy);  dx = dY W;  dW = dY^T x

    With `overlap: collectives` nothing overlaps here: each collective waits for the matmul before it, or the matmul
    after it waits for the collective.
    """
    y_tD, _ = torch.ops.colrow.row_forward(x_Tf, w_Df, group, options.text, None, list(quantized), history)
    return y_tD


def scatter_sum(x_TD: Tensor, group: str) -> Tensor:
    """[T, D], a partial sum on each rank -> [t, D] of the sum. Its backward is `gather`."""
    y_tD: Tensor = torch.ops.colrow.scatter_sum(x_TD, group)
    return y_tD


def gather(x_tD: Tensor, group: str) -> Tensor:
    """[t, D] on each rank -> [T, D], which each rank uses in its own way. Its backward is `scatter_sum`."""
    x_TD: Tensor = torch.ops.colrow.gather(x_tD, group)
    return x_TD


OPERATORS: dict[str, Callable[..., Any]] = {}
"""The implementation of each operator, by its qualified name: simulated ranks call these."""


def define_operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Operator]:
    """Register a function as the operator `colrow::name`. Its parameters have the names of the schema's arguments."""

    def define(implementation: Callable[..., Any]) -> Operator:
        OPERATORS[f"colrow::{name}"] = implementation
        return Operator(name, schema, implementation)

    return define


# [Note: peaks] The largest |number| of each row of what an 8-bit linear rounds in its forward, where the kernel that
# makes the numbers has found it (`parallel.fused_graph`). Without it, the operator looks for it.

# [Note: quantized weights] The weights of an 8-bit linear in 8 bits, where somebody has quantized them already
# (`parallel.quantized_shards`): e4m3 numbers of each weight as bytes [out, in], and behind them their common scale,
# fp32 []. The operator then reads no number of `weights`, which get the gradient. Empty: the operator quantizes them.


@define_operator(
    "column_forward",
    "(Tensor x_tD, Tensor[] weights, str group, str options, Tensor? peaks, Tensor[] quantized, Tensor? history)"
    " -> (Tensor, Tensor)",
)
def _column_forward(
    x_tD: Tensor,
    weights: list[Tensor],
    group: str,
    options: str,
    peaks: Tensor | None,
    quantized: list[Tensor],
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """X = all_gather(x);  Y = X W^T. Returns Y_TF, and X_TD if it is kept; with fp8 what `float8_linear` keeps."""
    opts, ranks = LinearOptions.parse(options), group_named(group)
    record("columns", len(weights))
    carrier = opts.carrier(x_tD.shape[0], group, x_tD.device)
    if opts.per_tensor:
        return float8_linear.column_forward(x_tD, weights, ranks, carrier, opts, peaks, quantized, history)
    if carrier is not None:
        return chunked.column_forward(x_tD.contiguous(), weights, carrier, opts)
    X_TD = all_gather(x_tD, ranks)
    y_TF = X_TD.new_empty(X_TD.shape[0], sum(w.shape[0] for w in weights))
    prepared(weights, opts.fp8).product(X_TD, y_TF)
    # An operator's output may not alias an input or stay undefined: what is not kept is an empty tensor. On one rank X
    # is x itself, so there options keep nothing (`linear_state`).
    return y_TF, X_TD if opts.keep_gathered else X_TD.new_empty(0)


@_column_forward.register_fake
def _(
    x_tD: Tensor,
    weights: list[Tensor],
    group: str,
    options: str,
    peaks: Tensor | None,
    quantized: list[Tensor],
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (t, D), n, opts = x_tD.shape, group_named(group).size(), LinearOptions.parse(options)
    if opts.fp8:
        require_sizes(opts.fp8, t * n, D, sum(w.shape[0] for w in weights))  # a dry run finds it before a rank does
    if opts.per_tensor:
        kept = x_tD.new_empty(float8_linear.kept_by_column(t, D, opts, n), dtype=torch.uint8)
    else:
        kept = x_tD.new_empty(t * n, D) if opts.keep_gathered else x_tD.new_empty(0)
    return x_tD.new_empty(t * n, sum(w.shape[0] for w in weights)), kept


@define_operator(
    "column_backward",
    "(Tensor dy_TF, Tensor x, Tensor[] weights, str group, str options, bool need_dx, bool need_dw,"
    " Tensor[] quantized, Tensor? history) -> (Tensor, Tensor)",
)
def _column_backward(
    dy_TF: Tensor,
    x: Tensor,
    weights: list[Tensor],
    group: str,
    options: str,
    need_dx: bool,
    need_dw: bool,
    quantized: list[Tensor],
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dx = reduce_scatter(dY W);  dW = dY^T X, while the reduce-scatter runs.

    x is X_TD if forward kept the gathered input, else x_tD: then it is gathered again, while dY W is computed. With fp8
    it is what forward kept.
    """
    opts, ranks = LinearOptions.parse(options), group_named(group)
    carrier = opts.carrier(dy_TF.shape[0] // ranks.size(), group, dy_TF.device)
    if ranks.size() > 1:
        record("beside", opts.overlap if carrier is not None or not opts.overlaps else "collectives")
    if opts.per_tensor:
        return float8_linear.column_backward(
            dy_TF, x, weights, ranks, carrier, opts, need_dx, need_dw, quantized, history
        )
    if carrier is not None:
        return chunked.column_backward(dy_TF, x.contiguous(), weights, carrier, opts, need_dx, need_dw)

    # A handle waits for its collective and returns the result. With overlap none it is called right away, so that no
    # matmul starts before the collective has finished; the second call, where the result is used, only returns it.
    regather = start_all_gather(x, ranks) if need_dw and not opts.keep_gathered else None
    if regather is not None and not opts.overlaps:
        regather()
    dx_handle = None
    if need_dx:
        dx_TD = dy_TF.new_empty(dy_TF.shape[0], weights[0].shape[1])
        prepared(weights, opts.fp8).input_gradient(dy_TF, dx_TD)
        dx_handle = start_reduce_scatter(dx_TD, ranks)
        if not opts.overlaps:
            dx_handle()
    X_TD = x if regather is None else regather()
    dw_FD = weight_gradient(dy_TF, X_TD) if need_dw else dy_TF.new_empty(0)
    return dy_TF.new_empty(0) if dx_handle is None else dx_handle(), dw_FD


@_column_backward.register_fake
def _(
    dy_TF: Tensor,
    x: Tensor,
    weights: list[Tensor],
    group: str,
    options: str,
    need_dx: bool,
    need_dw: bool,
    quantized: list[Tensor],
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (T, F), D = dy_TF.shape, weights[0].shape[1]
    dx_tD = dy_TF.new_empty(T // group_named(group).size(), D) if need_dx else dy_TF.new_empty(0)
    return dx_tD, dy_TF.new_empty(F, D) if need_dw else dy_TF.new_empty(0)


def _save_column(ctx: Any, inputs: Any, output: Any) -> None:
    x_tD, weights, ctx.group, ctx.options, _, quantized, ctx.history = inputs
    _, kept = output
    ctx.columns = len(weights)
    ctx.set_materialize_grads(False)  # else autograd fills a gradient of X, which nothing uses, with zeros
    opts = LinearOptions.parse(ctx.options)
    ctx.save_for_backward(kept if opts.keep_gathered or opts.per_tensor else x_tD, *weights, *quantized)


def _differentiate_column(ctx: Any, dy_TF: Tensor | None, _: Any) -> Any:
    x, *saved = ctx.saved_tensors
    weights, quantized = saved[: ctx.columns], saved[ctx.columns :]
    # group, options, peaks, quantized numbers and history have no gradient
    others = None, None, None, [None] * len(quantized), None
    if dy_TF is None:
        return None, [None] * len(weights), *others
    need_dx, need_each_dw = ctx.needs_input_grad[:2]
    need_dw = any(need_each_dw)
    # contiguous: the gradient of a sum is an expanded scalar (stride 0), which no collective takes
    dx_tD, dw_FD = torch.ops.colrow.column_backward(
        dy_TF.contiguous(), x, weights, ctx.group, ctx.options, need_dx, need_dw, quantized, ctx.history
    )
    dws = list(dw_FD.split([w.shape[0] for w in weights], 0)) if need_dw else [None] * len(weights)
    return dx_tD if need_dx else None, dws, *others


_column_forward.register_autograd(_differentiate_column, _save_column)


@define_operator(
    "row_forward",
    "(Tensor x_Tf, Tensor w_Df, str group, str options, Tensor? peaks, Tensor[] quantized, Tensor? history)"
    " -> (Tensor, Tensor)",
)
def _row_forward(
    x_Tf: Tensor,
    w_Df: Tensor,
    group: str,
    options: str,
    peaks: Tensor | None,
    quantized: list[Tensor],
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y = reduce_scatter(x W^T). Returns y_tD, and with fp8 what `float8_linear` keeps."""
    opts, ranks = LinearOptions.parse(options), group_named(group)
    carrier = opts.carrier(x_Tf.shape[0] // ranks.size(), group, x_Tf.device)
    if opts.per_tensor:
        return float8_linear.row_forward(x_Tf, w_Df, ranks, carrier, peaks, quantized, history)
    if carrier is not None:
        return chunked.row_forward(x_Tf, w_Df, carrier, opts), x_Tf.new_empty(0)
    y_TD = x_Tf.new_empty(x_Tf.shape[0], w_Df.shape[0])
    prepared([w_Df], opts.fp8).product(x_Tf, y_TD)
    return reduce_scatter(y_TD, ranks), x_Tf.new_empty(0)


@_row_forward.register_fake
def _(
    x_Tf: Tensor,
    w_Df: Tensor,
    group: str,
    options: str,
    peaks: Tensor | None,
    quantized: list[Tensor],
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    T, f = x_Tf.shape
    kept = x_Tf.new_empty(0)
    opts = LinearOptions.parse(options)
    if opts.fp8:
        require_sizes(opts.fp8, T, f, w_Df.shape[0])
    if opts.per_tensor:
        kept = x_Tf.new_empty(packed_shape(f, T), dtype=torch.uint8)
    return x_Tf.new_empty(T // group_named(group).size(), w_Df.shape[0]), kept


@define_operator(
    "row_backward",
    "(Tensor dy_tD, Tensor x, Tensor w_Df, str group, str options, bool need_dx, bool need_dw, Tensor[] quantized,"
    " Tensor? history) -> (Tensor, Tensor)",
)
def _row_backward(
    dy_tD: Tensor,
    x: Tensor,
    w_Df: Tensor,
    group: str,
    options: str,
    need_dx: bool,
    need_dw: bool,
    quantized: list[Tensor],
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dY = all_gather(dy);  dx = dY W;  dW = dY^T x. x is x_Tf; with fp8 it is what forward kept."""
    opts, ranks = LinearOptions.parse(options), group_named(group)
    carrier = opts.carrier(dy_tD.shape[0], group, dy_tD.device)
    if opts.per_tensor:
        return float8_linear.row_backward(dy_tD, x, w_Df, ranks, carrier, opts, need_dx, need_dw, quantized, history)
    if carrier is not None:
        return chunked.row_backward(dy_tD, x, w_Df, carrier, opts, need_dx, need_dw)
    dy_TD = all_gather(dy_tD, ranks)
    dx_Tf = x.new_empty(x.shape if need_dx else 0)
    if need_dx:
        prepared([w_Df], opts.fp8).input_gradient(dy_TD, dx_Tf)
    return dx_Tf, weight_gradient(dy_TD, x) if need_dw else dy_tD.new_empty(0)


@_row_backward.register_fake
def _(
    dy_tD: Tensor,
    x: Tensor,
    w_Df: Tensor,
    group: str,
    options: str,
    need_dx: bool,
    need_dw: bool,
    quantized: list[Tensor],
    history: Tensor | None,
) -> tuple[Tensor, Tensor]:
    T = dy_tD.shape[0] * group_named(group).size()
    dx_Tf = dy_tD.new_empty(T, w_Df.shape[1]) if need_dx else dy_tD.new_empty(0)
    return dx_Tf, w_Df.new_empty(w_Df.shape) if need_dw else dy_tD.new_empty(0)


def _save_row(ctx: Any, inputs: Any, output: Any) -> None:
    x_Tf, w_Df, ctx.group, ctx.options, _, quantized, ctx.history = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1] if LinearOptions.parse(ctx.options).per_tensor else x_Tf, w_Df, *quantized)


def _differentiate_row(ctx: Any, dy_tD: Tensor | None, _: Any) -> Any:
    x, w_Df, *quantized = ctx.saved_tensors
    others = None, None, None, [None] * len(quantized), None
    if dy_tD is None:
        return None, None, *others
    need_dx, need_dw = ctx.needs_input_grad[:2]
    dx_Tf, dw_Df = torch.ops.colrow.row_backward(
        dy_tD.contiguous(), x, w_Df, ctx.group, ctx.options, need_dx, need_dw, quantized, ctx.history
    )
    return dx_Tf if need_dx else None, dw_Df if need_dw else None, *others


_row_forward.register_autograd(_differentiate_row, _save_row)


@define_operator("scatter_sum", "(Tensor x_TD, str group) -> Tensor")
def _scatter_sum(x_TD: Tensor, group: str) -> Tensor:
    return reduce_scatter(x_TD, group_named(group))


@_scatter_sum.register_fake
def _(x_TD: Tensor, group: str) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0] // group_named(group).size(), *x_TD.shape[1:])


@define_operator("gather", "(Tensor x_tD, str group) -> Tensor")
def _gather(x_tD: Tensor, group: str) -> Tensor:
    return all_gather(x_tD, group_named(group))


@_gather.register_fake
def _(x_tD: Tensor, group: str) -> Tensor:
    return x_tD.new_empty(x_tD.shape[0] * group_named(group).size(), *x_tD.shape[1:])


def _save_group(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.group = inputs[1]


def _differentiate_scatter(ctx: Any, dy_tD: Tensor) -> Any:
    return torch.ops.colrow.gather(dy_tD, ctx.group), None


def _differentiate_gather(ctx: Any, dy_TD: Tensor) -> Any:
    return torch.ops.colrow.scatter_sum(dy_TD, ctx.group), None


_scatter_sum.register_autograd(_differentiate_scatter, _save_group)
_gather.register_autograd(_differentiate_gather, _save_group)


def traffic(operator: str, args: tuple[Any, ...], outputs: list[Tensor]) -> list[tuple[str, Tensor, int]]:
    """The collectives inside an operator's call: name, the tensor sent, bytes of the larger side. For dry runs, which
    see the operator and not its inside; empty for other operators. A gather counts as one whatever sends its chunks."""
    if (implementation := OPERATORS.get(f"colrow::{operator}")) is None:
        return []
    # by name: a new argument in the middle of a schema must not shift what is read here
    arguments = inspect.signature(implementation).bind(*args).arguments
    ranks = group_named(arguments["group"]).size()

    opts = LinearOptions.parse(arguments.get("options", DEFAULTS.text))

    def event(collective: str, shard: Tensor) -> tuple[str, Tensor, int]:
        return collective, shard, shard.numel() * shard.element_size() * ranks

    def gathered(shard: Tensor) -> tuple[str, Tensor, int]:
        packed = math.prod(packed_shape(*shard.shape)) * ranks
        return ("all_gather", shard, packed) if opts.per_tensor else event("all_gather", shard)

    match operator:
        case "column_forward":
            return [gathered(arguments["x_tD"])]
        case "column_backward":
            events = []
            if arguments["need_dw"] and not opts.keep_gathered:
                events.append(event("all_gather", arguments["x"]))
            if arguments["need_dx"]:
                events.append(event("reduce_scatter", outputs[0]))
            return events
        case "row_forward" | "scatter_sum":
            return [event("reduce_scatter", outputs[0])]
        case "row_backward":
            return [gathered(arguments["dy_tD"])]
        case "gather" | "all_tokens":
            return [event("all_gather", arguments["x_tD"])]
    return []
