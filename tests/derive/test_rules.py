"""Each rule: the operation on shards is the shard of the operation, values and gradients, over random shapes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, Node

from benchmarks.models.prove import Sabotage, ShardedRun, graph_values
from colrow.derive.axes import Atom, leaves, regroup, size_of, unify
from colrow.derive.choice import Choice
from colrow.derive.choose import class_facts
from colrow.derive.derivation import derive
from colrow.derive.infer import RULES, AxisInference, NoRuleError, number
from colrow.derive.table import infer
from colrow.derive.trace import trace
from colrow.verifying.verify import parity

TOLERANCE = 1e-10
quick = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],  # shrinking repeats traces for minutes
)


class Op(nn.Module):
    """An operation on parameters and one input, as a model."""

    def __init__(self, function: Any, *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.weights)


def worst_error(op: Op, x: Tensor, tp: int, sabotage: Sabotage = Sabotage.NONE) -> tuple[float, int]:
    """Largest error over every class that the rules let be sharded, and how many classes there were."""
    traced = trace(op, (x,))
    inference = infer(traced)
    facts = class_facts(inference)
    free = [a for a in facts.volume if a.forbidden is None and a not in facts.twice and a.size % tp == 0]
    worst = 0.0
    for atom in free:
        choice = Choice(tp, {atom})
        values, params = graph_values(traced, op, (x,))
        out = ShardedRun(traced, inference, choice, sabotage)(values)
        expected = op(x)
        probe = torch.randn(expected.shape, dtype=torch.float64)
        worst = max(worst, float((out - expected).detach().abs().max()))
        got = torch.autograd.grad((out * probe).sum(), list(params.values()), allow_unused=True)
        want = torch.autograd.grad((expected * probe).sum(), list(op.weights), allow_unused=True)
        for g, w in zip(got, want, strict=True):
            if w is not None:
                assert g is not None
                worst = max(worst, float((g - w).abs().max()))
    return worst, len(free)


sizes = st.sampled_from((1, 2, 3, 5))
factors = st.sampled_from((1, 2, 3))
degrees = st.sampled_from((2, 3, 4))


@given(degrees, factors, factors, sizes, st.integers(0, 3))
@quick
def test_products_of_shards_are_exact(tp: int, h: int, d: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    hidden, wide = tp * h, tp * d * 2
    x = torch.randn(rows + 1, 7, 5, dtype=torch.float64)
    functions = [
        (lambda x, a, b, c: F.linear(torch.tanh(F.linear(x, a, b)), c), ((wide, 5), (wide,), (3, wide))),
        (lambda x, a, b: (x @ a.T).relu() @ b.permute(1, 0), ((hidden, 5), (4, hidden))),
        (
            lambda x, a, b, c: torch.addmm(b, x.flatten(0, 1), a).view(rows + 1, 7, wide) @ c,
            ((5, wide), (wide,), (wide, 2)),
        ),
        (lambda x, a, b: torch.einsum("bsd,hde->bshe", x, a).flatten(2) @ b, ((tp, 5, d * 2), (tp * d * 2, 3))),
    ]
    for function, shapes in functions:
        error, _ = worst_error(Op(function, *shapes), x, tp)
        assert error < TOLERANCE


@given(
    degrees,
    st.sampled_from((1, 2, 3)),
    st.sampled_from((1, 2)),
    st.sampled_from((2, 4)),
    st.booleans(),
    st.integers(0, 2),
)
@quick
def test_attention_with_grouped_heads(tp: int, kv: int, group: int, dim: int, fused: bool, seed: int) -> None:
    torch.manual_seed(seed)
    kv = kv * tp
    heads, width = kv * group, kv * group * dim
    x = torch.randn(3, 7, 5, dtype=torch.float64)

    def attend(x: Tensor, *weights: Tensor) -> Tensor:
        if fused:
            q, k, v = F.linear(x, weights[0]).split([width, kv * dim, kv * dim], -1)
        else:
            q, k, v = (F.linear(x, w) for w in weights[:3])
        q, k, v = (t.unflatten(-1, (-1, dim)).transpose(1, 2) for t in (q, k, v))
        if group > 1 and seed == 1:
            k, v = (t[:, :, None].expand(3, kv, group, 7, dim).reshape(3, heads, 7, dim) for t in (k, v))
        if group == 1 and seed == 1:  # heads joined with the batch
            parts = (t.flatten(0, 1) for t in (q, k, v))
            out = F.scaled_dot_product_attention(*parts, is_causal=True).unflatten(0, (3, heads))
        elif group == 1 and seed == 2:  # windows behind the heads
            parts = (torch.stack([t, t * 2], 2) for t in (q, k, v))
            out = F.scaled_dot_product_attention(*parts, is_causal=True).sum(2)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=k.shape[1] != heads)
        return F.linear(out.transpose(1, 2).flatten(2), weights[-1])

    shapes = [(width + 2 * kv * dim, 5)] if fused else [(width, 5), (kv * dim, 5), (kv * dim, 5)]
    error, classes = worst_error(Op(attend, *shapes, (4, width)), x, tp)
    assert error < TOLERANCE
    assert classes > 0


@given(degrees, factors, st.sampled_from((1, 2, 3)), st.integers(0, 2**16))
@quick
def test_convolutions_and_norms_of_channels(tp: int, f: int, group: int, seed: int) -> None:
    """Random windows, strides, padding and groups, there and back."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    width, window, stride, padding = tp * f * group, rng.choice((1, 2, 3)), rng.choice((1, 2)), rng.choice((0, 1))
    groups, grouped = rng.choice((tp * f, width)), rng.choice((F.conv1d, F.conv_transpose1d))
    x = torch.randn(3, 7, 11, dtype=torch.float64)

    def through(x: Tensor, a: Tensor, b: Tensor, c: Tensor, s: Tensor, d: Tensor) -> Tensor:
        y = F.conv1d(x, a, b, stride, padding).tanh()
        y = F.group_norm(grouped(y, c, None, 1, window // 2, groups=groups), tp * f, s)
        return F.conv1d(y, d)

    shapes = ((width, 7, window), (width,), (width, width // groups, window), (width,), (4, width, 1))
    op = Op(through, *shapes)
    error, classes = worst_error(op, x, tp)
    assert error < TOLERANCE
    assert classes > 0
    dropped, _ = worst_error(op, x, tp, Sabotage.DROPPED)
    assert dropped > 1e-3


@given(degrees, factors, st.integers(0, 2**16))
@quick
def test_einsum_of_random_letters(tp: int, f: int, seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)
    sizes = {"b": 3, "t": 7, "d": 5, "h": tp * f, "e": 2, "o": 4}
    weights = ["".join(rng.sample("dhe", 3)), "".join(rng.sample("heo", 3))]
    between, result = "bt" + "".join(rng.sample("he", 2)), "".join(rng.sample("bto", 3))
    one, other = f"btd,{weights[0]}->{between}", f"{between},{weights[1]}->{result}"
    shapes = (tuple(sizes[letter] for letter in weight) for weight in weights)
    op = Op(lambda x, a, b: torch.einsum(other, torch.einsum(one, x, a), b), *shapes)
    error, classes = worst_error(op, torch.randn(3, 7, 5, dtype=torch.float64), tp)
    assert error < TOLERANCE
    assert classes > 0
    dropped, _ = worst_error(op, torch.randn(3, 7, 5, dtype=torch.float64), tp, Sabotage.DROPPED)
    assert dropped > 1e-3


@given(
    degrees,
    st.sampled_from((2, 3, 4)),
    factors,
    st.sampled_from(("chunk", "slice", "interleaved", "view", "unbind")),
    st.integers(0, 2),
)
@quick
def test_pieces_of_a_fused_weight(tp: int, pieces: int, f: int, how: str, seed: int) -> None:
    torch.manual_seed(seed)
    width = tp * f * 2
    x = torch.randn(3, 7, 5, dtype=torch.float64)

    def gated(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, a)
        if how == "chunk":
            parts = y.chunk(pieces, -1)
        elif how == "slice":
            parts = tuple(y[..., i * width : (i + 1) * width] for i in range(pieces))
        elif how == "interleaved":
            parts = tuple(y[..., i::pieces] for i in range(pieces))
        else:
            split = y.view(3, 7, pieces, width)
            parts = tuple(split[:, :, i] for i in range(pieces)) if how == "view" else split.unbind(2)
        out = parts[0].sigmoid()
        for part in parts[1:]:
            out = out * part
        return F.linear(out, b)

    op = Op(gated, (pieces * width, 5), (4, width))
    error, classes = worst_error(op, x, tp)
    assert error < TOLERANCE
    assert classes > 0
    broken, _ = worst_error(op, x, tp, Sabotage.CONTIGUOUS)
    assert (broken > 1e-3) == (how != "interleaved")  # a contiguous cut of a packed weight must show
    dropped, _ = worst_error(op, x, tp, Sabotage.DROPPED)
    assert dropped > 1e-3


@given(
    degrees, factors, st.sampled_from(("softmax", "cumsum", "amax", "step", "gap", "overlap", "flip", "fft", "sort"))
)
@quick
def test_what_looks_along_an_axis_keeps_it_whole(tp: int, f: int, how: str) -> None:
    width = tp * f * 4
    x = torch.randn(3, 7, 5, dtype=torch.float64)

    def mixed(x: Tensor, a: Tensor) -> Tensor:
        y = F.linear(x, a)
        match how:
            case "softmax":
                return y.softmax(-1)
            case "cumsum":
                return y.cumsum(-1)
            case "amax":
                return y - y.amax(-1, keepdim=True)
            case "step":
                return y[..., 2::4] + y[..., ::3][..., : width // 4]
            case "gap":
                return y[..., : width // 4] + y[..., width // 2 : 3 * width // 4]
            case "overlap":
                return y[..., : width // 2] + y[..., width // 4 : 3 * width // 4]
            case "flip":
                return y.flip(-1)
            case "fft":
                return torch.fft.rfft(y).abs()
            case _:
                return y.sort(-1).values

    traced = trace(Op(mixed, (width, 5)), (x,))
    inference = infer(traced)
    (weight,) = inference.params
    assert all(atom.forbidden for atom in leaves(inference.of(weight)[0]))


@given(degrees, factors, st.integers(0, 2))
@quick
def test_lookups_experts_and_norms(tp: int, f: int, seed: int) -> None:
    torch.manual_seed(seed)
    vocab, width, experts = tp * 7, tp * f, 3
    ids = torch.randint(0, vocab, (3, 5))

    def lookup(ids: Tensor, table: Tensor, head: Tensor) -> Tensor:
        return F.linear(F.embedding(ids, table), head)

    error, classes = worst_error(Op(lookup, (vocab, 6), (vocab, 6)), ids, tp)
    assert error < TOLERANCE
    assert classes >= 2

    x = torch.randn(3, 7, 5, dtype=torch.float64)

    def mixture(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        y = torch.bmm(x, up).relu()
        return torch.bmm(y, down)

    error, classes = worst_error(Op(mixture, (experts, 5, width), (experts, width, 5)), x, tp)
    assert error < TOLERANCE
    assert classes > 0

    def wide_norm(x: Tensor, a: Tensor, scale: Tensor, b: Tensor) -> Tensor:
        y = F.linear(x, a)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
        return F.linear(y, b)

    error, classes = worst_error(Op(wide_norm, (width, 5), (width,), (4, width)), x, tp)
    assert error < TOLERANCE
    assert classes > 0


@given(st.lists(st.sampled_from((2, 3, 4)), min_size=1, max_size=4), st.integers(0, 3))
@quick
def test_regroup_keeps_every_extent(extents: list[int], cut: int) -> None:
    dims = [[Atom(n)] for n in extents]
    total = size_of([a for d in dims for a in d])
    shape = [total] if cut == 0 else [*extents[:cut], size_of([a for d in dims[cut:] for a in d])]
    out = regroup(dims, shape)
    assert out is not None
    assert [size_of(d) for d in out] == shape
    back = regroup(out, extents)
    assert back is not None
    assert [size_of(d) for d in back] == extents


def test_a_view_across_factors_is_refused() -> None:
    assert regroup([[Atom(7)], [Atom(5)]], [5, 7]) is None


def shifted(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Scores of relative positions: one zero more for each query, and a view that gives each a place later."""
    y = (x @ a.T).unflatten(-1, (4, 2)).transpose(1, 2)
    scores = y @ y.mT
    scores = torch.cat([torch.zeros_like(scores[..., :1]), scores], -1).view(3, 4, 6, 5)[:, :, 1:]
    return (scores.softmax(-1) @ y).transpose(1, 2).flatten(2) @ b.T


def of_one_key_head(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    q = (x @ a.T).unflatten(-1, (4, 2))
    scores = torch.einsum("bihd,bjd->bhij", q, x[..., :2]).softmax(-1)
    return torch.einsum("bhij,bjd->bihd", scores, x[..., :2]).flatten(2) @ b.T


@pytest.mark.parametrize("attention", [shifted, of_one_key_head])
def test_heads_stay_beside_a_view_of_the_scores_and_with_one_head_of_keys(attention: Any) -> None:
    op, x = Op(attention, (8, 8), (8, 8)), torch.randn(3, 5, 8, dtype=torch.float64)
    traced = trace(op, (x,))
    inference = infer(traced)
    assert not inference.unknown
    weight = next(node for node, name in inference.params.items() if name == "weights.0")
    heads, width = leaves(inference.of(weight)[0])
    assert heads.forbidden is None
    assert width.forbidden is not None
    assert worst_error(op, x, 2)[0] < TOLERANCE


def test_misaligned_dimensions_stay_whole() -> None:
    one, other = [Atom(6)], [Atom(4), Atom(5)]
    unify(one, other, "test")
    assert all(a.forbidden for a in [*leaves(one), *leaves(other)])


def test_an_operator_without_a_rule_keeps_its_operands_whole() -> None:
    traced = trace(Op(lambda x, a: torch.linalg.solve(a, x), (4, 4)), (torch.randn(3, 4, 5, dtype=torch.float64),))
    inference = infer(traced)
    assert inference.unknown
    (weight,) = inference.params
    assert all(atom.forbidden and "no rule" in atom.forbidden for dim in inference.of(weight) for atom in leaves(dim))


@pytest.mark.parametrize("error", [AttributeError, TypeError])
def test_a_rule_with_a_bug_is_not_taken_for_no_rule(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inference: AxisInference, node: Node) -> Any:
        raise error("a bug")

    monkeypatch.setitem(RULES, "linear", broken)
    with pytest.raises(error, match="a bug"):
        derive(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8)), 2, inputs=(torch.zeros(3, 34, 8),))


def test_a_number_that_the_graph_computes_is_no_rule() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    with pytest.raises(NoRuleError, match="dim is not a known number"):
        number(graph.call_function(torch.ops.aten.select.int, (x, x, 0)), 1, "dim")


class Joined(nn.Module):
    """Features behind a memory, which is empty at first."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.up, self.down, self.length = nn.Linear(8, 16), nn.Linear(16 + length, 8), length

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        joined = torch.cat([h.new_zeros(*h.shape[:-1], self.length), h], -1)
        return self.down(joined + h.relu() if self.length == 0 else joined)


@pytest.mark.parametrize(("length", "split"), [(0, {"up.weight", "up.bias"}), (3, set())])
def test_an_empty_piece_joins_nothing(length: int, split: set[str]) -> None:
    torch.manual_seed(0)
    model, x = Joined(length).double(), (torch.randn(2, 3, 8, dtype=torch.float64),)
    found = derive(model, 2, inputs=x)
    assert {name for name in found.sharded if name.startswith("up")} == split
    assert parity(model, found.plan(), 2, x).worst < 1e-9
