"""The operators of `parallel_linear` with matmuls of 8-bit floats, in chunks or not.

A gather sends 8-bit numbers with their scale, half the bytes: an activation or its gradient is rounded once, by the
rank that has it, and the transpose that wgrad sums over is made of the rounded numbers. Backward keeps that transpose
in place of the input, and the weight's scale. Reduce-scatters send what products give, in the input's dtype.

    column  forward   Q = all_gather(round(x));  Y = Q W^T           kept: Q^T, or round(x) where it is gathered again
            backward  dx = reduce_scatter(dY W);  dW = dY^T Q        dY and its transpose are rounded in one pass
    row     forward   y = reduce_scatter(round(x) W^T)               kept: round(x)^T
            backward  G = all_gather(round(dy));  dx = G W;  dW = G^T round(x)

Legend: as in `parallel_linear`, whose [Note: peaks] says what `peaks` is; in `ops.float8` are [Note: peak history], of
`history`, and [Note: packed operands]: `kept` and `memory` are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.distributed as dist
from torch import Tensor

from colrow.errors import ConfigError
from colrow.ops.chunked import scatter_sum, send_to_all
from colrow.ops.collectives import Finish, start_all_gather, start_reduce_scatter
from colrow.ops.exchange import Carrier, Exchange
from colrow.ops.execution_record import record
from colrow.ops.float8 import (
    ACTIVATION,
    GRADIENT,
    Float8Operand,
    joined,
    joined_transpose,
    packed_shape,
    quantize,
    quantize_both,
    quantize_packed,
    quantized_weight,
    scaled_mm,
    unpacked,
    weight_scale,
)
from colrow.ops.linear_options import LinearOptions


def keeps_transpose(opts: LinearOptions, n: int) -> bool:
    """Whether a column keeps the gathered input's transpose. One rank has nothing to gather again."""
    return opts.keep_gathered or n == 1


def kept_by_column(t: int, D: int, opts: LinearOptions, n: int) -> tuple[int, int]:
    """The shape of what its forward keeps."""
    return packed_shape(D, t * n) if keeps_transpose(opts, n) else packed_shape(t, D)


def column_forward(
    x_tD: Tensor,
    weights: list[Tensor],
    ranks: dist.ProcessGroup,
    carrier: Carrier | None,
    opts: LinearOptions,
    peaks: Tensor | None = None,
    quantized: Sequence[Tensor] = (),
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Y_TF, and what backward needs."""
    _record(history)
    n = ranks.size()
    y_TF = x_tD.new_empty(x_tD.shape[0] * n, sum(w.shape[0] for w in weights))
    transpose = keeps_transpose(opts, n)

    def weight() -> Float8Operand:
        return quantized_weight(quantized) if quantized else quantize(weights)

    kept, w = _gathered_product(x_tD, weight, y_TF, ranks, carrier, transpose=transpose, peaks=peaks, history=history)
    weight_scale(kept).copy_(w.scale)
    return y_TF, kept


def column_backward(
    dy_TF: Tensor,
    kept: Tensor,
    weights: list[Tensor],
    ranks: dist.ProcessGroup,
    carrier: Carrier | None,
    opts: LinearOptions,
    need_dx: bool,
    need_dw: bool,
    quantized: Sequence[Tensor] = (),
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = reduce_scatter(dY W), finished after dW = dY^T Q."""
    _require_history(opts, history)
    F, D, n = dy_TF.shape[1], weights[0].shape[1], ranks.size()
    exchange = regather = finish = None
    # Forward kept this rank's numbers alone: they are gathered once more, while dgrad runs.
    if need_dw and not keeps_transpose(opts, n):
        if carrier is not None:
            exchange = _send(kept, carrier)
        else:
            regather = start_all_gather(kept, ranks)
            if not opts.overlaps:
                regather()
    # dgrad sums over F and wgrad over T, and the summed dim must be contiguous: one rounding, two layouts.
    dy, dy_FT = quantize_both(dy_TF, gradient=True, history=history)
    if need_dx:
        w_DF = _transposed(weights, kept, quantized)
        finish = _scattered_product(dy, w_DF, dy_TF.new_empty(0), ranks, carrier, gradient=True)
        if not opts.overlaps:
            finish()
    dw_FD = dy_TF.new_empty(F if need_dw else 0, D)
    if need_dw:
        transposed = kept
        if exchange is not None:
            exchange.receive_all()
            transposed = joined_transpose(_chunks(exchange, kept))
        elif regather is not None:
            transposed = joined_transpose(regather().chunk(n))
        scaled_mm(unpacked(dy_FT, GRADIENT), unpacked(transposed, ACTIVATION), dw_FD, gradient=True)
    dx_tD = dy_TF.new_empty(0) if finish is None else finish()
    if exchange is not None:
        exchange.close()
    return dx_tD, dw_FD


def row_forward(
    x_Tf: Tensor,
    w_Df: Tensor,
    ranks: dist.ProcessGroup,
    carrier: Carrier | None,
    peaks: Tensor | None = None,
    quantized: Sequence[Tensor] = (),
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_tD, and what backward needs."""
    _record(history)
    x, kept = quantize_both(x_Tf, peaks=peaks, history=history)
    w = quantized_weight(quantized) if quantized else quantize([w_Df])
    weight_scale(kept).copy_(w.scale)
    return _scattered_product(x, w, x_Tf.new_empty(0), ranks, carrier)(), kept


def row_backward(
    dy_tD: Tensor,
    kept: Tensor,
    w_Df: Tensor,
    ranks: dist.ProcessGroup,
    carrier: Carrier | None,
    opts: LinearOptions,
    need_dx: bool,
    need_dw: bool,
    quantized: Sequence[Tensor] = (),
    history: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx = G W;  dW = G^T round(x)."""
    _require_history(opts, history)
    (t, D), f = dy_tD.shape, w_Df.shape[1]
    dx_Tf = dy_tD.new_empty(t * ranks.size() if need_dx else 0, f)
    dw_Df = dy_tD.new_empty(D if need_dw else 0, f)

    def weight() -> Float8Operand:
        return _transposed([w_Df], kept, quantized)

    out_Tf = dx_Tf if need_dx else None
    transposed, _ = _gathered_product(dy_tD, weight, out_Tf, ranks, carrier, gradient=True, history=history)
    if need_dw:
        scaled_mm(unpacked(transposed, GRADIENT), unpacked(kept, ACTIVATION), dw_Df, gradient=True)
    return dx_Tf, dw_Df


def _record(history: Tensor | None) -> None:
    record("fp8", "tensorwise" if history is None else "delayed")


def _require_history(opts: LinearOptions, history: Tensor | None) -> None:
    """Raise a ConfigError where nobody turns the steps of `delayed`, which would round as `tensorwise` does."""
    if opts.fp8 == "delayed" and history is None:
        raise ConfigError(
            "fp8: delayed takes scales from the last step, and nobody says where a step ends: run forward and backward "
            "of a step under colrow.PeakHistory([model]).step(), or set fp8: tensorwise"
        )


def _transposed(weights: Sequence[Tensor], kept: Tensor, quantized: Sequence[Tensor]) -> Float8Operand:
    """The weights' transpose [D, F]. They have not changed since forward, which left their scale."""
    if quantized:
        return quantized_weight(quantized, transposed=True)
    return quantize([w.t() for w in weights], dim=1, scale=weight_scale(kept))


def _gathered_product(
    x_tK: Tensor,
    weight: Callable[[], Float8Operand],
    out_TN: Tensor | None,
    ranks: dist.ProcessGroup,
    carrier: Carrier | None,
    *,
    gradient: bool = False,
    transpose: bool = True,
    peaks: Tensor | None = None,
    history: Tensor | None = None,
) -> tuple[Tensor, Float8Operand]:
    """out = all_gather(round(x)) W. Returns packed memory, of the gathered numbers' transpose or, without `transpose`,
    of this rank's numbers; and the weight, which is quantized while the first numbers are under way."""
    t, n, dtype = x_tK.shape[0], ranks.size(), GRADIENT if gradient else ACTIVATION

    def multiply(x: Float8Operand, w: Float8Operand, out: Tensor | None) -> None:
        if out is not None:
            scaled_mm(x, w, out, gradient=gradient)

    if n == 1:
        x, memory = quantize_both(x_tK, gradient=gradient, peaks=peaks, history=history)
        multiply(x, w := weight(), out_TN)
        return memory, w
    record("fp8", "gathers")
    # Numbers and scale in one piece, which one message sends: no collective for the scale.
    own = quantize_packed(x_tK, gradient=gradient, peaks=peaks, history=history)
    if carrier is None:
        finish = start_all_gather(own, ranks)
        w = weight()
        x, memory = joined(finish().chunk(n), gradient=gradient)
        multiply(x, w, out_TN)
        return memory if transpose else own, w
    exchange = _send(own, carrier)
    w = weight()
    for i in range(n):
        # this rank's own chunk first, then the others in the order in which they come, each under its own scale
        q, chunk = (exchange.before(i), exchange.receive(i)) if i else (exchange.rank, own)
        multiply(unpacked(chunk, dtype), w, None if out_TN is None else out_TN[q * t : (q + 1) * t])
    memory = joined_transpose(_chunks(exchange, own), gradient=gradient) if transpose else own
    exchange.close()
    return memory, w


def _scattered_product(
    x: Float8Operand,
    w: Float8Operand,
    like: Tensor,
    ranks: dist.ProcessGroup,
    carrier: Carrier | None,
    *,
    gradient: bool = False,
) -> Finish:
    """Start reduce_scatter(x W), computed in the dtype of `like`. Returns a function that waits for this rank's sum."""
    T, N = x.values.shape[0], w.values.shape[0]
    if carrier is not None:
        exchange = carrier.open((T // ranks.size(), N), like.dtype)
        return scatter_sum(exchange, lambda rows, out: scaled_mm(x[rows], w, out, gradient=gradient))
    out_TN = like.new_empty(T, N)
    scaled_mm(x, w, out_TN, gradient=gradient)
    return start_reduce_scatter(out_TN, ranks)


def _send(memory: Tensor, carrier: Carrier) -> Exchange:
    """Start an exchange in which every rank gets every rank's memory."""
    exchange = carrier.open(tuple(memory.shape), memory.dtype)
    send_to_all(exchange, memory)
    return exchange


def _chunks(exchange: Exchange, own: Tensor) -> list[Tensor]:
    """Every rank's memory, by rank."""
    return [own if q == exchange.rank else slot for q, slot in enumerate(exchange.slots)]
