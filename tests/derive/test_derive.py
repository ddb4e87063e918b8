"""Derived plans of hand-written modules: what is split, why the rest is not, and that the plan runs and is right."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.prove import Sabotage, prove
from colrow.derive.blocks import BlockFinder
from colrow.derive.derivation import DeriveOptions, derive
from colrow.derive.emit import Emitter
from colrow.derive.local import LocalCheck
from colrow.derive.result import Derivation
from colrow.errors import PlanError
from colrow.plans.plan import Plan
from colrow.verifying.backends import RankFailure
from colrow.verifying.verify import parity
from helpers.variants import params

TOLERANCE = 1e-9


class Attention(nn.Module):
    """Fused qkv, heads counted by an attribute."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, d // heads
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, self.heads, self.dim).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).reshape(B, T, self.heads * self.dim))


class Gated(nn.Module):
    def __init__(self, d: int, f: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * f, bias=False), nn.Linear(f, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(F.silu(a) * b)


class Layer(nn.Module):
    def __init__(self, d: int, heads: int, parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attention, self.mlp = Attention(d, heads), Gated(d, 2 * d)

    def forward(self, x: Tensor) -> Tensor:
        if self.parallel:
            return x + self.attention(self.norm1(x)) + self.mlp(self.norm2(x))
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Fused qkv, learned positions, tied head; optionally parallel blocks or one layer used twice."""

    def __init__(
        self, parallel: bool = False, shared: bool = False, vocab: int = 96, d: int = 32, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocab, d), nn.Embedding(128, d)
        self.layers = nn.ModuleList(Layer(d, heads, parallel) for _ in range(1 if shared else 2))
        self.repeat = 2 if shared else 1
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for _ in range(self.repeat):
            for layer in self.layers:
                x = layer(x)
        return self.head(self.norm(x))


class Peeking(GPT):
    """Reads a row of the embedding's weight by itself, for a value that nothing uses (Gemma 4 does)."""

    def forward(self, ids: Tensor) -> Tensor:
        torch.where((ids == 0)[..., None], self.tokens.weight[0], self.tokens(ids))
        return super().forward(ids)


class Encoder(nn.Module):
    """Takes and gives hidden states."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(d, 4, False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Convolved(nn.Module):
    """A convolution over the sequence between two linears, and a sound MLP behind."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.into, self.conv, self.mlp = nn.Linear(d, d), nn.Conv1d(d, d, 3, padding=1), Gated(d, 2 * d)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.into(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp(y)


class SlopedAttention(Attention):
    """Counts its heads to make a bias for each: on a rank it would count from the first."""

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, self.heads, self.dim).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        slopes = 2.0 ** -torch.arange(self.heads, dtype=x.dtype)
        places = torch.arange(T, dtype=x.dtype)
        bias = slopes[:, None, None] * (places[None, :] - places[:, None])
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.out(y.transpose(1, 2).reshape(B, T, self.heads * self.dim))


class Sloped(nn.Module):
    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.attention, self.mlp = SlopedAttention(d, 4), Gated(d, 2 * d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x + self.attention(x))


@torch.library.custom_op("colrow_test::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.flip(-1) * 2


@mystery.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


mystery.register_autograd(lambda ctx, g: g.flip(-1) * 2, setup_context=lambda ctx, inputs, output: None)


class Mysterious(nn.Module):
    """An operator that nobody has a rule for."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.a, self.b, self.mlp = nn.Linear(d, 2 * d), nn.Linear(2 * d, d), Gated(d, 2 * d)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.b(mystery(self.a(x))))


def check(model: nn.Module, tp: int = 2, x: Tensor | None = None, **options: Any) -> tuple[Derivation, float]:
    torch.manual_seed(0)
    model = model.double()
    given = (x,) if x is not None else None
    found = derive(model, tp, inputs=given, options=DeriveOptions(**options))
    ids = torch.randint(0, 90, (3, 17 * tp)) if x is None else x
    proof = parity(model, found.plan(), tp, (ids,))
    return found, max(proof.loss, proof.worst)


STATES = torch.randn(3, 34, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("kind", "tp"),
    params(
        [("serial", 2), ("serial", 4), ("parallel", 2), ("shared", 2), ("odd vocabulary", 4)],
        exhaustive=lambda kind, tp: (kind, tp) != ("serial", 2),
    ),
)
def test_a_gpt_with_fused_qkv(kind: str, tp: int) -> None:
    vocab = 97 if kind == "odd vocabulary" else 96
    found, error = check(GPT(parallel=kind == "parallel", shared=kind == "shared", vocab=vocab), tp)
    assert error < TOLERANCE
    assert "tokens.weight" in found.sharded  # the head's too: they are tied
    assert found.share > 0.5
    where = "layers.0" if kind == "shared" else "layers.*"
    qkv = found.modules[f"{where}.attention.qkv"]
    assert qkv["style"] == "packed_colwise"
    assert qkv["segments"] == [32, 32, 32]
    assert found.modules[f"{where}.attention"]["attributes"] == {"heads": "/tp"}
    assert found.legal == [1, 2, 4]
    assert found.loss == "vocab_parallel"
    assert "places.weight" in found.replicated


@pytest.mark.exhaustive
def test_a_weight_that_is_read_in_vain_stays_a_plain_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    found, error = check(Peeking(), sequence_parallel=False)
    assert error < TOLERANCE
    assert found.modules["tokens"] == {"style": "fast_embedding", "all_tokens": True}
    assert found.modules["head"]["style"] == "colwise"
    found, error = check(Peeking())
    assert error < TOLERANCE
    monkeypatch.setattr(Emitter, "_read_in_vain", lambda *_: False)
    with pytest.raises(RankFailure, match="got mixed"):
        check(Peeking(), sequence_parallel=False)


@pytest.mark.parametrize("shards", params([True, False], lambda shards: shards))
def test_an_encoder_on_hidden_states_is_split_and_exact(shards: bool) -> None:
    found, error = check(Encoder(), x=STATES, sequence_parallel=shards)
    assert error < TOLERANCE
    assert {"layers.*.attention.out", "layers.*.mlp.down"} <= found.reductions.keys()


def test_a_packed_layer_outside_of_a_block_sums_its_input_gradient() -> None:
    modules: dict[str, Any] = {
        "layers.*.mlp.up": {"style": "packed_colwise", "segments": [64, 64]},
        "layers.*.mlp.down": "rowwise",
    }
    torch.manual_seed(0)
    model = Encoder().double()
    assert parity(model, Plan(modules=modules), 2, (STATES,)).worst < TOLERANCE
    modules["layers.*.mlp.up"] |= {"segments": [128]}
    assert parity(model, Plan(modules=modules), 2, (STATES,)).worst > 1e-3


@pytest.mark.exhaustive
def test_slopes_that_each_rank_would_make_alike_keep_the_heads_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    found, error = check(Sloped(), x=STATES)
    assert error < TOLERANCE
    assert "mlp.down.weight" in found.sharded
    assert "attention.qkv.weight" in found.replicated
    monkeypatch.setattr(LocalCheck, "_same_on_all", lambda *_: False)
    found, error = check(Sloped(), x=STATES)
    assert "attention.qkv.weight" in found.sharded
    assert error > 1e-3


class Forgetful(nn.Module):
    """A gate whose own decay is used behind the reduction of its two products, as in linear attention."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)
        self.decay = nn.Parameter(torch.rand(d))

    def forward(self, x: Tensor) -> Tensor:
        return -self.decay.exp() * F.softplus(self.down(self.up(x)))


class Forgetting(nn.Module):
    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.norm, self.gate, self.mlp = nn.LayerNorm(d), Forgetful(d), Gated(d, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.gate(x) + self.mlp(x)


def test_a_parameter_behind_its_block_s_reduction_is_not_summed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    found, error = check(Forgetting(), x=STATES)
    assert error < TOLERANCE
    assert {"mlp.down.weight", "gate.up.weight"} <= set(found.sharded)
    monkeypatch.setattr(BlockFinder, "_uses_behind", lambda *_: False)
    monkeypatch.setattr(Emitter, "_never_summed_twice", lambda _: None)
    found, error = check(Forgetting(), x=STATES)
    assert "gate.up.weight" in found.sharded
    assert error > 0.5  # twice its gradient


def test_a_convolution_along_the_sequence_is_split_by_channels() -> None:
    found, error = check(Convolved(), x=STATES)
    assert error < TOLERANCE
    assert {"conv.weight", "mlp.up.weight"} <= set(found.sharded)


def test_an_unknown_operator_keeps_its_neighbours_whole() -> None:
    found, error = check(Mysterious(), x=STATES)
    assert error < TOLERANCE
    assert found.unknown == {"mystery": 1}
    assert "no rule for mystery" in found.replicated["a.weight"]
    assert "mlp.up.weight" in found.sharded


def test_parity_fails_when_a_plan_is_broken_on_purpose() -> None:
    torch.manual_seed(0)
    model = GPT().double()
    plan = derive(model, 2).plan()
    broken: dict[str, Any] = dict(plan.modules)
    qkv = next(k for k in broken if k.endswith("qkv"))
    broken[qkv] = dataclasses.replace(broken[qkv], segments=(96,))
    ids = torch.randint(0, 90, (3, 34))
    assert parity(model, plan, 2, (ids,)).worst < TOLERANCE
    assert parity(model, Plan(modules=broken, loss=plan.loss), 2, (ids,)).worst > 1e-3


@pytest.mark.parametrize("tp", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_the_graph_proof_holds_and_bites(tp: int) -> None:
    torch.manual_seed(0)
    model = GPT().double()
    assert prove(model, tp).worst < TOLERANCE
    assert prove(model, tp, sabotage=Sabotage.CONTIGUOUS).worst > 1e-3
    assert prove(model, tp, sabotage=Sabotage.DROPPED).worst > 1e-3


class Routed(nn.Module):
    """Each of two experts takes the tokens that chose it: how many, only the data says."""

    def __init__(self, d: int = 32) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(d, 2), nn.ModuleList(Gated(d, 2 * d) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        counts = torch.bincount(self.router(rows).argmax(-1), minlength=2).tolist()
        parts = rows.split(counts)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)]).view_as(x)


def test_sizes_that_depend_on_the_data_are_refused_with_the_reason() -> None:
    with pytest.raises(PlanError, match=r"Routed.*(depend on the data|data-dependent)"):
        derive(Routed(), 2, inputs=(STATES.float(),))


def test_a_plan_can_be_saved_and_read_back() -> None:
    model = GPT()
    before = copy.deepcopy(dict(model.named_parameters()))
    plan = Plan.derive(model, tp=2)
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
