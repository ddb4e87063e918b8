"""For each operator of the rule table a small function that uses it, on parameters whose axes may be sharded.

A function takes x [3, 7, 5] and the parameters; `w` is a multiple of tp, so that axes of extent w can be cut. Axes
that the operator acts along are other ones, or the rule must keep them whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import colrow.derive.trace  # noqa: F401  (defines the marker operator)
from helpers.channel_cases import Case, channels, windows

NO_AMINMAX = torch.__version__.startswith("2.11.")
"""There it has no derivative."""

aten: Any = torch.ops.aten
UNARY = """
    neg negative reciprocal square sqrt rsqrt abs sign exp exp2 expm1 log log1p log2 cos sin tan erf tanh sigmoid silu
    gelu relu relu6 leaky_relu elu celu selu softplus mish hardtanh hardswish hardsigmoid log_sigmoid logit clone
    contiguous detach alias lift_fresh_copy floor ceil round trunc isnan isinf isfinite nan_to_num atan sinh cosh
    logical_not zeros_like ones_like empty_like rand_like randn_like bernoulli softshrink hardshrink lgamma digamma erfc
    erfinv acos asin asinh atanh sinc frac sgn signbit angle i0 special_entr special_erfcx special_i0e special_i1
    special_i1e special_log_ndtr special_ndtr special_ndtri uniform exponential
""".split()  # noqa: SIM905
BINARY = """
    add sub subtract rsub mul multiply div divide true_divide maximum minimum pow remainder fmod floor_divide copy atan2
    xlogy ge le lt gt eq ne not_equal logical_and logical_or logical_xor fmin fmax hypot copysign logaddexp
    logaddexp2 isclose special_xlog1py
""".split()  # noqa: SIM905
BITS = "bitwise_and bitwise_or bitwise_xor __and__ __or__ __xor__".split()  # noqa: SIM905
RANDOM = (
    "rand_like",
    "randn_like",
    "bernoulli",
    "uniform",
    "exponential",
    "empty_like",
    "rand",
    "randn",
    "empty",
    "new_empty",
    "empty_strided",
    "new_empty_strided",
)


def cases(tp: int, w: int) -> dict[str, Case]:
    """A case for each name of the table, at degree `tp` with free axes of extent `w`."""
    found: dict[str, Case] = {}
    found |= {name: (_unary(name), ((w, 5),)) for name in UNARY}
    found |= {name: (_binary(name), ((w, 5), (w,))) for name in BINARY}
    found |= {name: (_bits(name), ((w, 5),)) for name in [*BITS, "bitwise_not"]}
    return (
        found
        | _pointwise(w)
        | _constants(w)
        | _reductions(w)
        | _views(tp, w)
        | _joins(w)
        | _products(tp, w)
        | _lookups(w)
        | channels(tp, w)
        | windows(w)
    )


def _y(x: Tensor, a: Tensor) -> Tensor:
    """[3, 7, w] between 0.2 and 0.8, where every function of the list is smooth."""
    return (x @ a.T).sigmoid() * 0.6 + 0.2


def _still(name: str, out: Tensor) -> Tensor:
    """Random numbers differ from rank to rank, as they may: only their shape is at stake."""
    return torch.nan_to_num(out) * 0 if name in RANDOM else out


def _unary(name: str) -> Callable[..., Tensor]:
    def function(x: Tensor, a: Tensor) -> Tensor:
        y = _y(x, a)
        return _still(name, getattr(aten, name)(y).to(y.dtype)) + y * y

    return function


def _binary(name: str) -> Callable[..., Tensor]:
    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y, c = _y(x, a), b.sigmoid() + 0.3
        left, right = (y.detach(), c.detach()) if name in ("floor_divide", "copy") else (y, c)  # no derivative
        return getattr(aten, name)(left, right).to(y.dtype) + y * c

    return function


def _bits(name: str) -> Callable[..., Tensor]:
    def function(x: Tensor, a: Tensor) -> Tensor:
        y = _y(x, a)
        one, other = y > 0.4, y < 0.6
        out = aten.bitwise_not(one) if name == "bitwise_not" else getattr(aten, name)(one, other)
        return out * y

    return function


def _pointwise(w: int) -> dict[str, Case]:
    one, two = ((w, 5),), ((w, 5), (w,))
    pair = lambda y: torch.view_as_complex(torch.stack([y, y * 2], -1))  # noqa: E731
    return {
        "clamp": (lambda x, a: aten.clamp(_y(x, a), 0.3, 0.6), one),
        "clamp_min": (lambda x, a: aten.clamp_min(_y(x, a), 0.4), one),
        "clamp_max": (lambda x, a: aten.clamp_max(_y(x, a), 0.4), one),
        "threshold": (lambda x, a: aten.threshold(_y(x, a), 0.4, 0.1), one),
        "fill": (lambda x, a: aten.fill(_y(x, a), 2.0) * _y(x, a), one),
        "full_like": (lambda x, a: torch.full_like(_y(x, a), 2.0) * _y(x, a), one),
        "dropout": (lambda x, a: aten.dropout(_y(x, a), 0.5, False), one),
        "where": (lambda x, a, b: torch.where(_y(x, a) > 0.5, _y(x, a), b), two),
        "masked_fill": (lambda x, a: _y(x, a).masked_fill(_y(x, a) > 0.5, 0.1), one),
        "lerp": (lambda x, a, b: aten.lerp(_y(x, a), b, _y(x, a)), two),
        "addcmul": (lambda x, a, b: aten.addcmul(_y(x, a), b, b), two),
        "addcdiv": (lambda x, a, b: aten.addcdiv(_y(x, a), b, b.exp()), two),
        "to": (lambda x, a: aten.to(_y(x, a), torch.float32).double(), one),
        "type_as": (lambda x, a: aten.type_as(_y(x, a), x.new_zeros(2)) * 2, one),
        "_to_copy": (lambda x, a: aten._to_copy(_y(x, a), dtype=torch.float32).double(), one),
        "boundary": (
            lambda x, a: torch.ops.colrow_plan.boundary(_y(x, a).detach(), "in|m|0", -1, 1, 1) * _y(x, a),
            one,
        ),
        "view_as_complex": (lambda x, a: torch.view_as_real(pair(_y(x, a))), one),
        "view_as_real": (lambda x, a: torch.view_as_real(pair(_y(x, a)) * 2), one),
        "_conj": (lambda x, a: torch.view_as_real(aten._conj(pair(_y(x, a))) * 1), one),
        "one_hot": (
            lambda x, a, b: _y(x, a) * (aten.one_hot(torch.arange(7) % 2, 4).double() @ b),
            ((w, 5), (4, w)),
        ),
        "acosh": (lambda x, a: aten.acosh(_y(x, a) + 1), one),
        "ldexp": (lambda x, a, b: aten.ldexp(_y(x, a), b.sign()), two),
        "rrelu": (lambda x, a: aten.rrelu(_y(x, a) - 0.5), one),
        "prelu": (lambda x, a, s: aten.prelu((_y(x, a) - 0.5).transpose(1, 2), s), two),
        "broadcast_tensors": (lambda x, a, b: torch.mul(*aten.broadcast_tensors([_y(x, a), b])), two),
        "real": (lambda x, a: aten.real(pair(_y(x, a))) * _y(x, a), one),
        "complex": (lambda x, a, b: torch.view_as_real(aten.complex(_y(x, a), _y(x, a) * b)), two),
        "polar": (lambda x, a, b: torch.view_as_real(aten.polar(_y(x, a), _y(x, a) * b)), two),
    }


def _constants(w: int) -> dict[str, Case]:
    def times(name: str, make: Callable[[Tensor], Tensor]) -> Case:
        return lambda x, a: _y(x, a) * (1 + _still(name, make(_y(x, a)).double())), ((w, 5),)

    makers: dict[str, Callable[[Tensor], Tensor]] = {
        "arange": lambda y: torch.arange(w),
        "full": lambda y: torch.full((w,), 2.0),
        "scalar_tensor": lambda y: aten.scalar_tensor(3.0),
        "zeros": lambda y: torch.zeros(w),
        "ones": lambda y: torch.ones(7, 1),
        "empty": lambda y: torch.empty(w),
        "new_ones": lambda y: y.new_ones(w),
        "new_zeros": lambda y: y.new_zeros(w),
        "new_empty": lambda y: y.new_empty(w),
        "empty_strided": lambda y: aten.empty_strided([w], [1]),
        "new_empty_strided": lambda y: aten.new_empty_strided(y, [w], [1]),
        "new_full": lambda y: y.new_full((w,), 2.0),
        "eye": lambda y: torch.eye(7, w),
        "linspace": lambda y: torch.linspace(0, 1, w),
        "fft_fftfreq": lambda y: aten.fft_fftfreq(w),
        "fft_rfftfreq": lambda y: aten.fft_rfftfreq(2 * w - 1),
        "rand": lambda y: torch.rand(w),
        "randn": lambda y: torch.randn(w),
        "tril_indices": lambda y: torch.tril_indices(1, 1).sum(0),
        "triu_indices": lambda y: torch.triu_indices(1, 1).sum(0),
    }
    return {name: times(name, make) for name, make in makers.items()}


def _norm_by_mean(y: Tensor) -> Tensor:
    out, mean, _ = aten.native_layer_norm(y, [7], None, None, 1e-5)
    return out * mean


def _reductions(w: int) -> dict[str, Case]:
    one = ((w, 5),)
    out: dict[str, Case] = {
        "sum": (lambda x, a: _y(x, a).sum(1), one),
        "mean": (lambda x, a, s: _y(x, a) * (_y(x, a).mean(-1, keepdim=True) + s), ((w, 5), (w,))),
        "any": (lambda x, a: aten.any(_y(x, a) > 0.5, 1) * _y(x, a)[:, 0], one),
        "all": (lambda x, a: aten.all(_y(x, a) > 0.5, 1) * _y(x, a)[:, 0], one),
        "prod": (lambda x, a: aten.prod(_y(x, a), 1), one),
        "logsumexp": (lambda x, a: aten.logsumexp(_y(x, a), [1]), one),
        "argmax": (lambda x, a: aten.argmax(_y(x, a), 1) * _y(x, a)[:, 0], one),
        "argmin": (lambda x, a: aten.argmin(_y(x, a), 1) * _y(x, a)[:, 0], one),
        "_softmax": (lambda x, a: aten._softmax(_y(x, a), 1, False), one),
        "_log_softmax": (lambda x, a: aten._log_softmax(_y(x, a), 1, False), one),
        "_safe_softmax": (lambda x, a: aten._safe_softmax(_y(x, a), 1), one),
        "roll": (lambda x, a: aten.roll(_y(x, a), [2], [1]), one),
        "flip": (lambda x, a: aten.flip(_y(x, a), [1]), one),
        "tril": (lambda x, a: aten.tril((x @ a.T).permute(2, 0, 1)), one),
        "triu": (lambda x, a: aten.triu((x @ a.T).permute(2, 0, 1)), one),
        "layer_norm": (lambda x, a, s, b: F.layer_norm(_y(x, a), (w,), s, b), ((w, 5), (w,), (w,))),
        "native_layer_norm": (lambda x, a: _norm_by_mean(_y(x, a).transpose(1, 2)), one),
        "rms_norm": (lambda x, a, s: F.rms_norm(_y(x, a), (w,), s, 1e-6), ((w, 5), (w,))),
        "constant_pad_nd": (lambda x, a: aten.constant_pad_nd(_y(x, a), [0, 0, 1, 2]), one),
        "pad": (lambda x, a: aten.pad(_y(x, a), [0, 0, 1, 2]), one),
        "diff": (lambda x, a: aten.diff(_y(x, a), 1, 1), one),
        "topk": (lambda x, a: aten.topk(_y(x, a), 2, 1)[0], one),
        "sort": (lambda x, a: aten.sort(_y(x, a), 1)[0], one),
        "argsort": (lambda x, a: aten.argsort(_y(x, a), 1) * _y(x, a), one),
        "max": (lambda x, a, b: aten.max(aten.max.dim(_y(x, a), 1)[0], b), ((w, 5), (w,))),
        "min": (lambda x, a, b: aten.min(aten.min.dim(_y(x, a), 1, True)[0], b), ((w, 5), (w,))),
        "var": (lambda x, a: _y(x, a) * aten.var.correction(_y(x, a), [1], correction=0, keepdim=True), one),
        "std": (lambda x, a: aten.std.dim(_y(x, a), [1]), one),
        "linalg_vector_norm": (lambda x, a: aten.linalg_vector_norm(_y(x, a), 2, [1]), one),
        "norm": (lambda x, a: aten.norm.ScalarOpt_dim(_y(x, a), 2, [1], True) * _y(x, a), one),
        "var_mean": (lambda x, a: torch.mul(*aten.var_mean.dim(_y(x, a), [1])), one),
        "std_mean": (lambda x, a: torch.mul(*aten.std_mean.dim(_y(x, a), [1])), one),
        **({} if NO_AMINMAX else {"aminmax": (lambda x, a: torch.mul(*aten.aminmax(_y(x, a), dim=1)), one)}),
        "kthvalue": (lambda x, a: aten.kthvalue(_y(x, a), 3, 1)[0], one),
        "cosine_similarity": (lambda x, a, b: aten.cosine_similarity(_y(x, a), _y(x, a) * b, 1), ((w, 5), (w,))),
        "pairwise_distance": (
            lambda x, a, b: aten.pairwise_distance(
                (_y(x, a) * b).transpose(1, 2), _y(x, a).transpose(1, 2), 2, 1e-6, True
            ),
            ((w, 5), (w,)),
        ),
        "linalg_vecdot": (lambda x, a, b: aten.linalg_vecdot(_y(x, a), _y(x, a) * b, dim=1), ((w, 5), (w,))),
        "cdist": (lambda x, a: aten.cdist(_y(x, a).transpose(1, 2), x[:, :, :4].transpose(1, 2)), one),
        "cross": (lambda x, a, b: aten.cross(_y(x, a)[:, :3], _y(x, a)[:, 4:] * b, 1), ((w, 5), (w,))),
        "linalg_cross": (
            lambda x, a, b: aten.linalg_cross(_y(x, a)[:, :3], _y(x, a)[:, 4:] * b, dim=1),
            ((w, 5), (w,)),
        ),
        "glu": (lambda x, a: aten.glu(_y(x, a), -1), ((2 * w, 5),)),
        "unfold": (lambda x, a: aten.unfold(_y(x, a), 1, 3, 2).square(), one),
        "histc": (lambda x, a, b: (aten.histc(_y(x, a), 5, 0.0, 1.0) * x) @ b.T, ((4, 5), (w, 5))),
        "bincount": (
            lambda x, a, b: (aten.bincount((_y(x, a) * 5).long().flatten(), None, 5) * x) @ b.T,
            ((4, 5), (w, 5)),
        ),
    }
    out |= {name: (_along(name, [1]), one) for name in ("amax", "amin", "nansum", "nanmean")}
    with_indices = ("median", "nanmedian", "mode", "cummax", "cummin")
    out |= {name: (_values(_along(name, 1)), one) for name in with_indices}
    for name in ("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft"):
        out |= {name: (_fourier(name, 1), one), f"{name}2": (_fourier(f"{name}2", [0, 1]), one)}
        out |= {f"{name}n": (_fourier(f"{name}n", [0, 1]), one)}
    out |= {name: (_fourier(name, 1), one) for name in ("fft_hfft", "fft_ihfft")}
    out |= {name: (_along(name, [1]), one) for name in ("fft_fftshift", "fft_ifftshift")}
    return out | {
        name: (_along(name, 1), one) for name in ("softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp")
    }


def _fourier(name: str, where: Any) -> Callable[..., Tensor]:
    def function(x: Tensor, a: Tensor) -> Tensor:
        y = getattr(aten, name)(_y(x, a), None, where)
        return torch.view_as_real(y * 1.0).sum(-1) if y.is_complex() else y

    return function


def _along(name: str, *where: Any) -> Callable[..., Tensor]:
    return lambda x, a: getattr(aten, name)(_y(x, a), *where)


def _values(with_indices: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda x, a: with_indices(x, a)[0]


def _halves(cut: Callable[[Tensor], Sequence[Tensor]]) -> Callable[..., Tensor]:
    """The product of the first and the last piece."""

    def function(x: Tensor, a: Tensor) -> Tensor:
        pieces = cut(_y(x, a))
        return pieces[0] * pieces[-1]

    return function


def _views(tp: int, w: int) -> dict[str, Case]:
    one, two = ((w, 5),), ((2 * w, 5),)
    out: dict[str, Case] = {
        "t": (lambda x, a: x @ aten.t(a), one),
        "numpy_T": (lambda x, a: x @ aten.numpy_T(a), one),
        "mT": (lambda x, a: x @ aten.mT(a), one),
        "permute": (lambda x, a: aten.permute(_y(x, a), [2, 0, 1]), one),
        "movedim": (lambda x, a: aten.movedim.int(_y(x, a), 0, 2), one),
        "unsqueeze": (lambda x, a: aten.unsqueeze(_y(x, a), -1), one),
        "squeeze": (lambda x, a: aten.squeeze.dim(_y(x, a).unsqueeze(1), 1), one),
        "view": (lambda x, a: aten.view((x @ a.T).contiguous(), [21, tp, w // tp]), one),
        "reshape": (lambda x, a: aten.reshape(_y(x, a), [21, tp, w // tp]), one),
        "_unsafe_view": (lambda x, a: aten._unsafe_view(_y(x, a), [21, tp, w // tp]), one),
        "flatten": (lambda x, a: aten.flatten(_y(x, a).unflatten(-1, (tp, -1)), 2, 3), one),
        "unflatten": (lambda x, a: aten.unflatten(_y(x, a), 2, [tp, w // tp]), one),
        "expand": (lambda x, a: aten.expand(_y(x, a), [2, 3, 7, w]), one),
        "broadcast_to": (lambda x, a: aten.broadcast_to(_y(x, a), [2, 3, 7, w]), one),
        "repeat": (lambda x, a: aten.repeat(_y(x, a), [2, 1, 2]), one),
        "tile": (lambda x, a: aten.tile(_y(x, a), [2, 2]), one),
        "diagonal": (lambda x, a: aten.diagonal(_y(x, a), 0, 0, 1) * _y(x, a)[0, 0, :, None], one),
        "repeat_interleave": (lambda x, a: aten.repeat_interleave.self_int(_y(x, a), 3, 2), one),
        "slice": (_halves(lambda y: (y[..., :w], y[..., w:])), two),
        "narrow": (lambda x, a: aten.narrow(_y(x, a), 1, 2, 3), one),
        "split": (_halves(lambda y: aten.split(y, w, -1)), two),
        "getitem": (lambda x, a: aten.split(_y(x, a), w, -1)[1], two),
        "chunk": (_halves(lambda y: aten.chunk(y, 2, -1)), two),
        "split_with_sizes": (lambda x, a: _unequal(_y(x, a), w), ((3 * w, 5),)),
        "select": (lambda x, a: aten.select(_y(x, a), 1, 2), one),
        "unbind": (_halves(lambda y: aten.unbind(y, 1)), one),
    }
    return out | {name: (_along(name, 1, 2), one) for name in ("transpose", "swapaxes", "swapdims")}


def _unequal(y: Tensor, w: int) -> Tensor:
    """Pieces of w and 2 w that meet again."""
    first, second = aten.split_with_sizes(y, [w, 2 * w], -1)
    return first * second.unflatten(-1, (2, w))[..., 1, :]


def _joins(w: int) -> dict[str, Case]:
    two = ((w, 5), (2 * w, 5))

    def joined(op: Any) -> Callable[..., Tensor]:
        def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
            y, z = _y(x, a), _y(x, b)
            return op([_unequal(op([y, z], -1), w), y], 1)

        return function

    out: dict[str, Case] = {name: (joined(getattr(aten, name)), two) for name in ("cat", "concat", "concatenate")}
    one = ((w, 5),)
    out |= {
        "hstack": (lambda x, a: aten.hstack([_y(x, a), _y(x, a) * 2]), one),
        "column_stack": (lambda x, a: aten.column_stack([_y(x, a), _y(x, a) * 2]), one),
        "vstack": (lambda x, a: aten.vstack([_y(x, a), _y(x, a) * 2]), one),
        "row_stack": (lambda x, a: aten.row_stack([_y(x, a), _y(x, a) * 2]), one),
        "dstack": (lambda x, a, b: _unequal(aten.dstack([_y(x, a), _y(x, b)]), w), two),
        "stack": (lambda x, a: aten.stack([_y(x, a), _y(x, a) * 2], 1), one),
        "meshgrid": (
            lambda x, a, b: _y(x, a) * aten.meshgrid.indexing([b, x[0, :, 0].detach()], indexing="xy")[0],
            ((w, 5), (w,)),
        ),
        "slice_scatter": (lambda x, a: aten.slice_scatter(_y(x, a), _y(x, a)[:, :2] * 3, 1, 2, 4), one),
        "select_scatter": (lambda x, a: aten.select_scatter(_y(x, a), _y(x, a)[:, 0] * 3, 1, 3), one),
    }
    return out


def _products(tp: int, w: int) -> dict[str, Case]:
    both = ((w, 5), (4, w))
    heads = 2 * tp

    def attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (F.linear(x, p).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (q, k, v))
        return aten.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)

    def heads_by_letters(x: Tensor, q: Tensor, v: Tensor, o: Tensor) -> Tensor:
        queries, values = torch.einsum("btd,dhe->bthe", x, q), torch.einsum("b t d, d h e -> b h t e", x, v)
        scores = torch.einsum("bqhe,bkhe->bhqk", queries, queries.tanh()).softmax(-1)
        return torch.einsum("...hqe,hed->...qd", scores @ values, o)

    ends: Callable[[], Tensor] = lambda: torch.arange(1, 3, dtype=torch.int32) * 16  # noqa: E731
    padded: Callable[[Tensor], Tensor] = lambda x: F.pad(x.flatten(0, 1), (0, 3, 0, 11))  # noqa: E731

    def grouped(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        rows, up, down = (t.bfloat16() for t in (padded(x), up * 0.1, down * 0.1))
        return aten._grouped_mm(aten._grouped_mm(rows, up, ends()).sigmoid(), down, ends()).double()

    def fallback(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        import transformers.integrations.moe  # noqa: F401  (defines the operator)

        op: Any = torch.ops.transformers.grouped_mm_fallback
        return op(op(padded(x), up, ends()).sigmoid(), down, ends())

    return {
        "linear": (lambda x, a, b: aten.linear(aten.linear(x, a).tanh(), b), both),
        "matmul": (lambda x, a, b: aten.matmul(aten.matmul(x, a.T).tanh(), b.T), both),
        "mm": (lambda x, a, b: aten.mm(aten.mm(x.flatten(0, 1), a.T).tanh(), b.T), both),
        "bmm": (lambda x, a, b: aten.bmm(aten.bmm(x, a).tanh(), b), ((3, 5, w), (3, w, 4))),
        "addmm": (
            lambda x, a, c, b, d: aten.addmm(d, aten.addmm(c, x.flatten(0, 1), a).tanh(), b),
            ((5, w), (w,), (w, 4), (4,)),
        ),
        "baddbmm": (
            lambda x, a, c, b, d: aten.baddbmm(d, aten.baddbmm(c, x, a).tanh(), b),
            ((3, 5, w), (3, 1, w), (3, w, 4), (3, 1, 4)),
        ),
        "einsum": (heads_by_letters, ((5, tp, 2), (5, tp, 2), (tp, 2, 4))),
        "tensordot": (
            lambda x, a, b: aten.tensordot(aten.tensordot(x, a, [2], [0]).tanh(), b, [1, 2], [0, 1]),
            ((5, w), (7, w, 4)),
        ),
        "bilinear": (lambda x, a, b, c, d: aten.bilinear(_y(x, a), _y(x, b), c, d), ((w, 5), (4, 5), (3, w, 4), (3,))),
        "kron": (lambda x, a, b: x @ aten.kron(a, b).T, ((w, 5), (2, 1))),
        "outer": (lambda x, a, b: x[..., :1] @ aten.outer(a, b).view(1, -1), ((w,), (2,))),
        "_grouped_mm": (grouped, ((2, 8, 8 * w), (2, 8 * w, 8 * w))),
        "grouped_mm_fallback": (fallback, ((2, 8, w), (2, w, 4))),
        "scaled_dot_product_attention": (attend, ((2 * heads, 5), (2 * tp, 5), (2 * tp, 5))),
    }


def _lookups(w: int) -> dict[str, Case]:
    one, table = ((w, 5),), ((w, 6),)
    rows: Callable[[], Tensor] = lambda: torch.arange(4)  # noqa: E731

    def written(op: Any) -> Callable[..., Tensor]:
        return lambda x, a: op(_y(x, a), 1, rows(), _y(x, a)[:, :4] * 3)

    def scattered(op: Any, *more: Any) -> Callable[..., Tensor]:
        def function(x: Tensor, a: Tensor) -> Tensor:
            y = _y(x, a)
            where = torch.zeros_like(y[:, :4]).long() + rows()[:, None]
            return op(y, 1, where, y[:, :4] * 3, *more)

        return function

    def put(op: Any) -> Callable[..., Tensor]:
        return lambda x, a: op(_y(x, a), [rows() % 3, rows()], _y(x, a)[0, :4] * 3)

    return {
        "embedding": (lambda x, a, b: aten.embedding(a, (x[..., 0].sigmoid() * w).long()) @ b.T, ((w, w), (4, w))),
        "embedding_bag": (
            lambda x, a, b: (
                aten.embedding_bag(a, (x[..., 0].sigmoid() * 4).long().flatten(), torch.tensor([0, 5, 9]))[0] @ b.T
            ),
            ((4, w), (4, w)),
        ),
        "index": (lambda x, a: aten.index(_y(x, a), [None, rows()]), one),
        "index_select": (lambda x, a: aten.index_select(_y(x, a), 1, rows()), one),
        "index_put": (put(aten.index_put), one),
        "_unsafe_index_put": (put(aten._unsafe_index_put), one),
        "index_add": (written(aten.index_add), one),
        "index_fill": (lambda x, a: aten.index_fill(_y(x, a), 1, rows(), 2.0) * _y(x, a), one),
        "take_along_dim": (lambda x, a: aten.take_along_dim(_y(x, a), rows()[None, :, None] % 3, 1), one),
        "index_copy": (written(aten.index_copy), one),
        "gather": (lambda x, a: aten.gather(a, 1, torch.zeros_like(a[:, :2]).long() + rows()[1:3]), table),
        "scatter": (scattered(aten.scatter), one),
        "scatter_add": (scattered(aten.scatter_add), one),
        "scatter_reduce": (scattered(aten.scatter_reduce, "sum"), one),
    }
