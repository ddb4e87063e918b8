"""For each operator over channels or windows a small function that uses it: part of `rule_cases.cases`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import colrow.derive.trace  # noqa: F401  (defines the marker operator)

aten: Any = torch.ops.aten
Case = tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]


def convolutions(n: int, w: int) -> dict[str, Case]:
    """Over output channels; groups, of which each channel is one; groups of two; input channels."""
    conv, back, window, more = getattr(F, f"conv{n}d"), getattr(F, f"conv_transpose{n}d"), (3,) * n, (1,) * (n - 1)

    def convolve(x: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Tensor:
        y = conv(x.view(3, 7, 5, *more), a, b, 1, 1).tanh()
        y = conv(conv(y, c, None, 1, 1, 1, w), d, None, 1, 1, 1, w // 2)
        return conv(y.tanh(), e)

    def transpose(x: Tensor, a: Tensor, c: Tensor, d: Tensor, e: Tensor) -> Tensor:
        y = back(x.view(3, 7, 5, *more), a, None, 2).tanh()
        return back(back(back(y, c, None, 1, 0, 0, w), d, None, 1, 0, 0, w // 2).tanh(), e)

    return {
        f"conv{n}d": (convolve, ((w, 7, *window), (w,), (w, 1, *window), (w, 2, *window), (4, w, 1, *more))),
        f"conv_transpose{n}d": (transpose, ((7, w, *window), (w, 1, *window), (w, 2, *window), (w, 4, 1, *more))),
    }


def channels(tp: int, w: int) -> dict[str, Case]:
    """x [3, 7, 5] stands for 7 channels of 5 positions."""

    def normed(x: Tensor, a: Tensor, s: Tensor, b: Tensor, c: Tensor) -> Tensor:
        y = aten.group_norm(aten.conv1d(x, a), tp * 2, s, b)
        return aten.conv1d(y.tanh(), c)

    def batches(op: Any, *more: Any) -> Callable[..., Tensor]:
        def function(x: Tensor, a: Tensor, s: Tensor, b: Tensor) -> Tensor:
            y = aten.conv1d(x, a)
            found = op(y, s, b, s.detach() * 0, s.detach().square() + 1, *more)
            return found if isinstance(found, Tensor) else found[0]

        return function

    def recurrent(name: str, gates: int) -> Case:
        """Sharded is what stands beside it."""

        def function(x: Tensor, a: Tensor, i: Tensor, h: Tensor) -> Tensor:
            states = [x.new_zeros(1, 3, 2) for _ in range(2)]
            state: Any = states if name == "lstm" else states[0]
            y = getattr(aten, name).input(x, state, [i, h], False, 1, 0.0, False, False, True)[0]
            return (y.sum(-1, keepdim=True) + x) @ a.T

        return function, ((w, 5), (gates * 2, 5), (gates * 2, 2))

    def cell(name: str, gates: int) -> Case:
        def function(x: Tensor, a: Tensor, i: Tensor, h: Tensor) -> Tensor:
            state: Any = [x.new_zeros(3, 2) for _ in range(2)]
            found = getattr(aten, name)(x[:, 0], state if name == "lstm_cell" else state[0], i, h)
            return (found[0] if name == "lstm_cell" else found).sum(-1, keepdim=True) + x[:, 1] @ a.T

        return function, ((w, 5), (gates * 2, 5), (gates * 2, 2))

    def instances(x: Tensor, a: Tensor, s: Tensor, b: Tensor) -> Tensor:
        return aten.instance_norm(aten.conv1d(x, a), s, b, None, None, True, 0.1, 1e-5, False)

    scales = ((w, 7, 1), (w,), (w,))
    return (
        convolutions(1, w)
        | convolutions(2, w)
        | convolutions(3, w)
        | {
            "group_norm": (normed, (*scales, (4, w, 1))),
            "batch_norm": (batches(aten.batch_norm, False, 0.1, 1e-5, False), scales),
            "_native_batch_norm_legit_no_training": (
                batches(aten._native_batch_norm_legit_no_training, 0.1, 1e-5),
                scales,
            ),
            "_weight_norm": (lambda x, v, g: aten.conv1d(x, aten._weight_norm(v, g, 0)), ((w, 7, 3), (w, 1, 1))),
            "im2col": (
                lambda x, a, b: (
                    aten.im2col(aten.conv1d(x, a)[..., None], [3, 1], [1, 1], [0, 0], [1, 1]).transpose(1, 2) @ b
                ),
                ((w, 7, 1), (w * 3, 4)),
            ),
            "lstm": recurrent("lstm", 4),
            "gru": recurrent("gru", 3),
            "rnn_tanh": recurrent("rnn_tanh", 1),
            "rnn_relu": recurrent("rnn_relu", 1),
            "lstm_cell": cell("lstm_cell", 4),
            "gru_cell": cell("gru_cell", 3),
            "rnn_tanh_cell": cell("rnn_tanh_cell", 1),
            "rnn_relu_cell": cell("rnn_relu_cell", 1),
            "instance_norm": (instances, scales),
        }
    )


def windows(w: int) -> dict[str, Case]:
    def over(n: int, op: Callable[[Tensor], Any]) -> Case:
        """Of [3, w, 5, 5, 5], as many positions as the operator has."""

        def function(x: Tensor, a: Tensor) -> Tensor:
            y = torch.einsum("bcl,oc->bol", x, a).tanh()
            found = op(y[(..., *[None] * (n - 1))].expand(3, w, *[5] * n))
            return found if isinstance(found, Tensor) else found[0]

        return function, ((w, 7),)

    out: dict[str, Case] = {}
    for n in (1, 2, 3):
        sizes = [4] * n
        out[f"avg_pool{n}d"] = over(n, lambda y, n=n: getattr(aten, f"avg_pool{n}d")(y, [3] * n, [2] * n))
        out[f"max_pool{n}d"] = over(n, lambda y, n=n: getattr(aten, f"max_pool{n}d")(y, [3] * n, [2] * n))
        out[f"adaptive_avg_pool{n}d"] = over(n, lambda y, n=n: getattr(aten, f"adaptive_avg_pool{n}d")(y, [2] * n))
        out[f"adaptive_max_pool{n}d"] = over(n, lambda y, n=n: getattr(aten, f"adaptive_max_pool{n}d")(y, [2] * n))
        if n < 3:
            for name in ("upsample_nearest", "_upsample_nearest_exact"):
                out[f"{name}{n}d"] = over(n, lambda y, n=n, name=name, s=sizes: getattr(aten, f"{name}{n}d")(y, s))
            for name in ("replication", "reflection"):
                out[f"{name}_pad{n}d"] = over(
                    n, lambda y, n=n, name=name: getattr(aten, f"{name}_pad{n}d")(y, [1] * 2 * n)
                )
    return out | {
        "upsample_linear1d": over(1, lambda y: aten.upsample_linear1d(y, [7], False)),
        "upsample_bilinear2d": over(2, lambda y: aten.upsample_bilinear2d(y, [7, 7], False)),
        "upsample_bicubic2d": over(2, lambda y: aten.upsample_bicubic2d(y, [7, 7], False)),
    }
