"""Every answer about an operator, on numbers: functions of a tensor run on it and on its shards, forward and backward,
and each operator's results on the ranks are what the rules say of its unsharded result."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_flatten, tree_leaves

from benchmarks.composed.along_dim import ALONG
from benchmarks.composed.backward import FUNCTIONS, OF_GRADIENT, changed
from benchmarks.composed.of_all import ELEMENTWISE, OF_ALL
from colrow.dryrun.fake_world import fake_tp_mesh
from colrow.dryrun.numbered import shape_of
from colrow.sharding.local_call import LocalCall, UnprovenError
from colrow.sharding.local_layout import PARTIAL, REPLICATED, Layout, sharded
from colrow.sharding.operator_rules import RULES
from colrow.sharding.shard_rules import proven_layouts
from colrow.torch_compat import TorchDispatchMode
from helpers.shards import RANKS, agrees, parts

Function = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    with fake_tp_mesh(RANKS) as mesh:
        yield mesh


class Ran(NamedTuple):
    """An operator that has run: its arguments flat, each tensor by what identifies it, and its results' values."""

    func: Any
    tree: Any
    leaves: tuple[Any, ...]
    shapes: tuple[Any, ...]
    results: list[Tensor]
    keys: list[Any]


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ran: list[Ran] = []
        self._alive: list[Any] = []

    def key(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        self._alive.append(storage)
        return storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        flat, tree = tree_flatten((args, kwargs or {}))
        leaves = tuple(self.key(leaf) if isinstance(leaf, Tensor) else None for leaf in flat)
        shapes = tuple(shape_of(leaf) for leaf in flat)
        out = func(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.ran.append(Ran(func, tree, leaves, shapes, [t.clone() for t in results], [self.key(t) for t in results]))
        return out


def record(function: Function, x: Tensor, gradient: Tensor) -> tuple[Recorder, Any, Any]:
    x = x.clone().requires_grad_()
    recorder = Recorder()
    with recorder:
        y = function(x)
        y.backward(gradient)
    return recorder, recorder.key(x), recorder.key(gradient)


def walk(function: Function, x: Tensor, gradient: Tensor, layout: Layout, mesh: DeviceMesh) -> set[str]:
    """Compare every answer with numbers; the names of the operators that were proven on a shard."""
    of_gradient = REPLICATED if layout == PARTIAL else layout
    unsharded, key, key_of_gradient = record(function, x, gradient)
    given = zip(parts(x, layout), parts(gradient, of_gradient), strict=True)
    try:
        ranks = [record(function, one.contiguous(), other.contiguous())[0] for one, other in given]
    except (RuntimeError, ValueError):  # shapes that do not fit
        return set()
    layouts: dict[Any, Layout | None] = {key: layout, key_of_gradient: of_gradient}
    proven = set()
    for i, there in enumerate(unsharded.ran):
        here = [rank.ran[i] for rank in ranks if i < len(rank.ran)]
        if len(here) < RANKS or any(ran.func != there.func for ran in here):
            break
        placed = tuple(
            None if key is None else layouts.get(key, REPLICATED if shape == local else None)
            for key, shape, local in zip(there.leaves, there.shapes, here[0].shapes, strict=True)
        )
        unknown = any(key is not None and layout is None for key, layout in zip(there.leaves, placed, strict=True))
        call = LocalCall(
            there.func,
            there.tree,
            here[0].shapes,
            there.shapes,
            placed,
            tuple(tuple(t.shape) for t in here[0].results),
            tuple(tuple(t.shape) for t in there.results),
            RANKS,
        )
        found: list[Layout | None] = [None] * len(there.results)
        if not unknown and "empty" not in call.name:
            try:
                found = list(proven_layouts(call, mesh))
            except UnprovenError:
                pass
            else:
                for j, answer in enumerate(found):
                    results = [ran.results[j] for ran in here]
                    assert answer is not None
                    assert agrees(results, there.results[j], answer), f"{call.func} of {call.layouts_text}: {answer}"
                if any(layout != REPLICATED for layout, _ in call.tensors):
                    proven.add(call.name)
        if None in found and call.func._schema.is_mutable:  # what else lies in that memory has changed
            layouts |= {key: None for key in layouts if key[0] == there.keys[0][0]}
        layouts.update(zip(there.keys, found, strict=True))
    return proven


Along = Callable[[Tensor, int], Tensor]


def square(x: Tensor) -> Tensor:
    """Well-conditioned matrices."""
    return x @ x.transpose(-1, -2) + 3 * torch.eye(x.shape[-2], dtype=x.dtype)


UNARY = """acos acosh asin asinh atan atanh angle celu cosh sinh digamma erfc erfinv exp2 expm1 floor ceil trunc frac i0
lgamma log2 signbit sinc tan isinf isnan logit sgn conj_physical"""
BINARY = """fmax fmin heaviside logaddexp2 nextafter xlogy polar bitwise_or bitwise_xor __and__ __or__ __xor__
logical_xor"""
_BOOLS = {"bitwise_or", "bitwise_xor", "__and__", "__or__", "__xor__"}


def unary(name: str) -> Along:
    return lambda x, d: x + getattr(torch, name)(x.sigmoid() + (1 if name in ("acosh",) else 0)).to(x.dtype)


def binary(name: str) -> Along:
    def run(x: Tensor, d: int) -> Tensor:
        a, b = (x > 0, x > 0.5) if name in _BOOLS else (x.detach().abs(), x.detach() + 1)
        found = getattr(torch.ops.aten, name)(a, b)
        return x * (1 + (found.abs() if found.is_complex() else found).to(x.dtype))

    return run


MORE: dict[str, Along] = {
    **{name: unary(name) for name in UNARY.split()},
    **{name: binary(name) for name in BINARY.split()},
    "clamp_max": lambda x, d: torch.ops.aten.clamp_max(x, 0.3),
    "hardshrink": lambda x, d: F.hardshrink(x),
    "hardsigmoid": lambda x, d: F.hardsigmoid(x),
    "threshold": lambda x, d: F.threshold(x, 0.1, 0.2),
    "real": lambda x, d: torch.view_as_real(torch.complex(x, x.sin()) * 1j).mean(-1),
    "imag and angle": lambda x, d: torch.complex(x, x.sin()).angle() + x,
    "conjugate": lambda x, d: torch.conj_physical(torch.complex(x, x.sin())).imag + torch.complex(x, x).conj().imag,
    "aminmax": lambda x, d: x * sum(torch.aminmax(x, dim=d, keepdim=True)),
    "cummin": lambda x, d: x.cummin(d).values,
    "glu": lambda x, d: torch.cat([F.glu(x, d)] * 2, d),
    "mode": lambda x, d: x - x.mode(d, keepdim=True).values,
    "nanmedian": lambda x, d: x - x.nanmedian(d, keepdim=True).values,
    "std_mean": lambda x, d: x * sum(torch.std_mean(x, d, keepdim=True)),
    "var_mean": lambda x, d: x * sum(torch.var_mean(x, d, keepdim=True)),
    "logsumexp": lambda x, d: x - x.logsumexp(d).unsqueeze(d),
    "index_copy": lambda x, d: x.index_copy(d, torch.tensor([1]), x.narrow(d, 0, 1)),
    "scatter_reduce": lambda x, d: x.scatter_reduce(d, x.argsort(d) // 2, x, "amax"),
    "cross": lambda x, d: torch.linalg.cross(x[..., :3].contiguous(), x[..., 1:4].contiguous()),
    "renorm": lambda x, d: x.renorm(2, d, 1.0),
    "safe softmax": lambda x, d: torch.ops.aten._safe_softmax(x, d),
    "tril": lambda x, d: x.tril() + x.triu(1) * 2,
    "split sizes": lambda x, d: torch.cat(x.split([x.shape[d] // 2, x.shape[d] - x.shape[d] // 2], d), d),
    "attention": lambda x, d: F.scaled_dot_product_attention(*[x if x.ndim == 4 else x.unsqueeze(1)] * 3).view(x.shape),
    "group_norm": lambda x, d: F.group_norm(x, 2),
    "prelu": lambda x, d: F.prelu(x, x.detach().new_full((1,), 0.3).requires_grad_()),
    "cdist": lambda x, d: torch.cdist(x, x + 0.3),
    "euclidean cdist": lambda x, d: torch.cdist(x, x + 0.3, compute_mode="use_mm_for_euclid_dist"),
    "matrix_exp": lambda x, d: torch.linalg.matrix_exp(square(x) / 50),
    "det": lambda x, d: torch.linalg.det(square(x) / 8),
    "inverse": lambda x, d: torch.linalg.inv(square(x)),
    "cholesky": lambda x, d: torch.linalg.cholesky(square(x)),
    "qr": lambda x, d: torch.linalg.qr(square(x)).R.abs(),
    "svd": lambda x, d: torch.linalg.svdvals(square(x)),
    "solve": lambda x, d: torch.linalg.solve(square(x), x),
    "triangular": lambda x, d: torch.linalg.solve_triangular(square(x).tril(), x, upper=False),
    "avg_pool2d": lambda x, d: F.avg_pool2d(x, 2),
    "avg_pool2d over": lambda x, d: F.avg_pool2d(x, 3, 1, 1),
    "avg_pool3d": lambda x, d: F.avg_pool3d(x, 2),
    "max_pool2d": lambda x, d: F.max_pool2d(x, 2),
    "max_pool3d": lambda x, d: F.max_pool3d(x, 2),
    "adaptive_avg_pool2d": lambda x, d: F.adaptive_avg_pool2d(x, 2),
    "adaptive_avg_pool3d": lambda x, d: F.adaptive_avg_pool3d(x, 2),
    "adaptive_max_pool2d": lambda x, d: F.adaptive_max_pool2d(x, 2),
    "adaptive_max_pool3d": lambda x, d: F.adaptive_max_pool3d(x, 2),
    "nearest1d": lambda x, d: F.interpolate(x, scale_factor=2),
    "nearest2d": lambda x, d: F.interpolate(x, scale_factor=2),
    "nearest-exact1d": lambda x, d: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "nearest-exact2d": lambda x, d: F.interpolate(x, scale_factor=2, mode="nearest-exact"),
    "bilinear": lambda x, d: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x, d: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "reflection_pad1d": lambda x, d: F.pad(x, (1, 1), mode="reflect").square(),
    "reflection_pad2d": lambda x, d: F.pad(x, (1, 1, 1, 1), mode="reflect").square(),
    "replication_pad2d": lambda x, d: F.pad(x, (1, 1, 1, 1), mode="replicate").square(),
}
"""Functions for operators that the composed models do not hold."""


def functions() -> dict[str, Along]:
    found: dict[str, Along] = {**ALONG, **FUNCTIONS, **{f"more: {name}": f for name, f in MORE.items()}}
    for name, function in {**ELEMENTWISE, **{f"{n} of all": f for n, f in OF_ALL.items()}}.items():
        found[f"{name} (no dim)"] = lambda x, d, function=function: function(x)
    for name in OF_GRADIENT:
        if name != "noise":
            found[f"gradient {name}"] = lambda x, d, name=name: changed(x, name, d)
    return found


SHAPES = ((2, 6, 8), (4, 12, 16), (2, 4, 6, 8), (2, 8, 8, 4), (4, 4, 4))
DIMS_OF_WINDOWS = {"1d": 3, "2d": 4, "3d": 5, "bi": 4}


def trial(name: str, seed: int, mesh: DeviceMesh) -> set[str]:
    """A function of a random tensor and dim, on shards of a random dim; the operators that were proven on shards."""
    rng = random.Random(f"{name} {seed}")
    ndim = next((n for text, n in DIMS_OF_WINDOWS.items() if name.startswith("more") and text in name), 0)
    shape = {3: (4, 6, 8), 4: (2, 4, 6, 8), 5: (2, 4, 4, 4, 4)}[ndim] if ndim else rng.choice(SHAPES)
    d, s = rng.randrange(len(shape)), rng.randrange(len(shape))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    function = partial(functions()[name], d=d)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    made = function(x)
    gradient = torch.randn(made.shape, dtype=torch.float64, generator=generator)
    layout = sharded(s)
    if rng.random() < 0.2:
        layout = PARTIAL
    elif s >= made.ndim or made.shape[s] % RANKS:
        return set()
    elif made.shape == x.shape and shape[s] >= 6 and rng.random() < 0.25:
        first = rng.randrange(1, shape[s] // 2) * 2
        layout = sharded(s, (first, shape[s] - first))
    try:
        return walk(lambda t: function(t * 1.0), x, gradient, layout, mesh)
    except IndexError:  # an index that a rank's shard has not: it does not run, and nothing is proven of it
        return set()


NEVER_DISPATCHED = """\
__and__ __or__ __xor__ _conj _euclidean_dist _index_put_impl _linalg_svd _reshape_alias adaptive_avg_pool1d
alias as_strided avg_pool1d boundary conj_physical contiguous divide dropout imag isfinite lift_fresh_copy log_sigmoid
log_softmax multiply negative not_equal real relu6 repeat reshape selu softmax special_entr square subtract to
true_divide type_as"""
"""Operators of the table that torch runs by others, or only in its own tracing, or rarely."""
SOME = [name for i, name in enumerate(functions()) if i % 8 == 0]


@pytest.mark.parametrize(
    "names", [SOME, pytest.param(list(functions()), marks=pytest.mark.exhaustive)], ids=["some", "all"]
)
def test_what_is_proven_on_shards_agrees_with_numbers(names: list[str], mesh: DeviceMesh) -> None:
    trials = 1 if names is SOME else 8
    proven = {name for function in names for seed in range(trials) for name in trial(function, seed, mesh)}
    assert len(proven) > 60
    if names is not SOME:
        assert RULES.keys() - NEVER_DISPATCHED.split() <= proven | {name.rstrip("_") for name in proven}


def test_an_answer_that_is_wrong_is_seen(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A negative control: a softmax along the shards that is said to give shards."""
    monkeypatch.setitem(RULES, "_softmax", lambda call: [call.tensors[0][0]])
    x = torch.randn(4, 8, dtype=torch.float64)
    with pytest.raises(AssertionError, match="_softmax"):
        walk(lambda t: (t * 1.0).softmax(1), x, x, sharded(1), mesh)
