"""The operators of `parallel_linear` with matmuls split by rank, so that one chunk is sent while another is computed.

all-gather, matmul       Y[q] = X[q] W^T for each rank q as its rows X[q] arrive, this rank's first
matmul, reduce-scatter   P[q] = X[q] W^T for each rank q, sent to q as soon as it is computed, this rank's last; then
                         y = the sum of the ranks' P for this rank, in rank order, in fp32 for low precision

The results equal those of `parallel_linear` up to rounding: rows are independent of each other, and a weight gradient
is one matmul over all tokens.

Legend: as in `parallel_linear`. Rows r t .. (r+1) t of all T belong to rank r.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from colrow.ops.collectives import Finish
from colrow.ops.exchange import Carrier, Exchange
from colrow.ops.kernels.slot_sum import sum_slots
from colrow.ops.linear_options import LinearOptions
from colrow.ops.products import (
    NARROW,
    add_product,
    sum_dtype,
    weight_gradient,
)
from colrow.ops.weights import prepared


def column_forward(x_tD: Tensor, weights: list[Tensor], carrier: Carrier, opts: LinearOptions) -> tuple[Tensor, Tensor]:
    """X = all_gather(x);  Y = X W^T. Returns Y_TF, and X_TD if it is kept."""
    (t, D), siblings = x_tD.shape, prepared(weights, opts.fp8)
    y_TF = x_tD.new_empty(t * carrier.size, sum(w.shape[0] for w in weights))
    X_TD = x_tD.new_empty(t * carrier.size if opts.keep_gathered else 0, D)

    def multiply(rows: slice, chunk_tD: Tensor) -> None:
        siblings.product(chunk_tD, y_TF[rows])
        if opts.keep_gathered:
            X_TD[rows].copy_(chunk_tD)  # a later exchange overwrites the slot

    exchange = carrier.open((t, D), x_tD.dtype)
    send_to_all(exchange, x_tD)
    receive_each(exchange, x_tD, multiply)
    exchange.close()
    return y_TF, X_TD


def column_backward(
    dy_TF: Tensor,
    x: Tensor,
    weights: list[Tensor],
    carrier: Carrier,
    opts: LinearOptions,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dx = reduce_scatter(dY W), finished after dW = dY^T X. x is X_TD if it was kept, else x_tD."""
    t, D = dy_TF.shape[0] // carrier.size, weights[0].shape[1]
    regather = dx_handle = None
    if need_dw and not opts.keep_gathered:
        regather = carrier.open((t, D), x.dtype)
        send_to_all(regather, x)
    if need_dx:  # sends its chunks here, and is awaited after wgrad: the sends overlap with it
        siblings = prepared(weights, opts.fp8)
        dx_handle = scatter_sum(
            carrier.open((t, D), dy_TF.dtype), lambda rows, out: siblings.input_gradient(dy_TF[rows], out)
        )
    dw_FD = dy_TF.new_empty(0)
    if need_dw:
        if regather is not None:
            regather.receive_all()
            x = regather.gathered(x)
        dw_FD = weight_gradient(dy_TF, x)
    dx_tD = dy_TF.new_empty(0) if dx_handle is None else dx_handle()
    # closed last: wgrad reads its slots
    if regather is not None:
        regather.close()
    return dx_tD, dw_FD


def row_forward(x_Tf: Tensor, w_Df: Tensor, carrier: Carrier, opts: LinearOptions) -> Tensor:
    """y = reduce_scatter(x W^T)."""
    weight = prepared([w_Df], opts.fp8)
    exchange = carrier.open((x_Tf.shape[0] // carrier.size, w_Df.shape[0]), x_Tf.dtype)
    return scatter_sum(exchange, lambda rows, out: weight.product(x_Tf[rows], out))()


def row_backward(
    dy_tD: Tensor,
    x_Tf: Tensor,
    w_Df: Tensor,
    carrier: Carrier,
    opts: LinearOptions,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    """dY = all_gather(dy);  dx = dY W;  dW = dY^T x.

    With few input features dgrad of a chunk is over before the next chunk is here: wgrad is computed by chunks there.
    """
    dx_Tf, weight = dy_tD.new_empty(x_Tf.shape if need_dx else 0), prepared([w_Df], opts.fp8)
    sum_Df = None
    if need_dw and x_Tf.shape[1] < NARROW:
        sum_Df = dy_tD.new_zeros(w_Df.shape, dtype=sum_dtype(dy_tD.dtype))

    def multiply(rows: slice, chunk_tD: Tensor) -> None:
        if need_dx:
            weight.input_gradient(chunk_tD, dx_Tf[rows])
        if sum_Df is not None:
            add_product(sum_Df, chunk_tD.t(), x_Tf[rows])

    exchange = carrier.open(tuple(dy_tD.shape), dy_tD.dtype)
    send_to_all(exchange, dy_tD)
    receive_each(exchange, dy_tD, multiply)
    if sum_Df is not None:
        dw_Df = sum_Df.to(dy_tD.dtype)
    else:
        dw_Df = weight_gradient(exchange.gathered(dy_tD), x_Tf) if need_dw else dy_tD.new_empty(0)
    exchange.close()
    return dx_Tf, dw_Df


def send_to_all(exchange: Exchange, chunk: Tensor) -> None:
    """The first half of an all-gather."""
    for i in range(1, exchange.size):
        exchange.send(i, chunk)


def receive_each(exchange: Exchange, own: Tensor, use: Callable[[slice, Tensor], None]) -> None:
    """The second half: `use(rows, chunk)` for each rank's rows of the gathered tensor, this rank's first."""
    t = own.shape[0]
    use(slice(exchange.rank * t, (exchange.rank + 1) * t), own)  # needs no transfer: the first chunks arrive meanwhile
    for i in range(1, exchange.size):
        source = exchange.before(i)
        use(slice(source * t, (source + 1) * t), exchange.receive(i))


def scatter_sum(exchange: Exchange, compute: Callable[[slice, Tensor], None]) -> Finish:
    """A reduce-scatter of rows that `compute(rows, out)` writes. Returns a function that waits for this rank's sum."""
    own = exchange.own
    t = own.shape[0]
    for i in range(1, exchange.size):
        target = exchange.after(i)
        chunk = own.new_empty(own.shape)  # a new one each time: the previous send still reads its own
        compute(slice(target * t, (target + 1) * t), chunk)
        exchange.send(i, chunk)
    # this rank's own chunk last, straight into its slot: the others' are sent meanwhile
    compute(slice(exchange.rank * t, (exchange.rank + 1) * t), own)

    def finish() -> Tensor:
        exchange.receive_all()
        total = sum_slots(exchange.slots)
        exchange.close()
        return total

    return finish
