"""Layers whose output is gathered: what is split where nothing behind a layer works on shards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import Replicate

from colrow.checking.check import check
from colrow.derive.derivation import derive
from colrow.derive.failure import TraceError
from colrow.mesh import Mesh
from colrow.plans.derive_options import DeriveOptions
from colrow.plans.plan import Plan
from colrow.plans.split_share import SplitShare
from colrow.styles.gathered_parameters import GatheredParameters
from colrow.styles.replicated import GradSum
from colrow.verifying.verify import parity
from helpers.split_models import Bare, Branching, FewKvHeads

IDS = (torch.randint(0, 32, (3, 4), generator=torch.Generator().manual_seed(0)),)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_model_that_cannot_be_traced_is_split_by_layers() -> None:
    torch.manual_seed(0)
    model = Branching().double()
    with pytest.raises(TraceError, match="branches on the data"):
        derive(model, 2, inputs=IDS)
    kept = DeriveOptions(keep_whole=["mix"])
    found = derive(model, 2, inputs=IDS, options=kept, judge=lambda _: None)
    assert "mix.weight" in found.replicated
    assert {"bag.weight", "old.weight_v", "new.parametrizations.weight.original1", "up.weight"} <= {*found.sharded}
    assert "out.weight" in found.replicated  # five outputs
    plan = found.plan()
    assert parity(model, plan, 2, IDS).worst < 1e-9
    broken = replace(plan, modules=plan.modules | {"up": replace(plan.modules["up"], input=None)})
    errors = parity(model, broken, 2, IDS)
    assert errors.loss < 1e-9
    assert errors.gradients["bag.weight"] > 1e-3


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + F.normalize(self.second(F.normalize(self.first(x), dim=1)), dim=1)
        return x / x.std()


def test_layers_are_gathered_only_where_a_plan_would_split_little() -> None:
    torch.manual_seed(0)
    model, images = Normed().double(), (torch.randn(2, 3, 2, 2, dtype=torch.float64),)
    assert derive(model, 2, inputs=images).share < 0.6
    found = derive(model, 2, inputs=images, judge=lambda _: None)
    assert found.share == 1
    assert parity(model, found.plan(), 2, images).worst < 1e-9
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.LayerNorm(6))
    plan = derive(mlp, 2, inputs=(torch.randn(3, 4),), judge=lambda _: None).plan()
    assert not any(getattr(style, "gather", None) for style in plan.modules.values())


class OneHead(nn.Module):
    """An attention of one head, which no rank can have a part of, in a model that is split otherwise."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.o((self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x))

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(8), self.Attention()
        self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(self.up(x).relu())


def test_an_attention_that_stays_unsharded_is_gathered_and_the_rest_is_not() -> None:
    torch.manual_seed(0)
    model, x = OneHead().double(), (torch.randn(2, 3, 8, dtype=torch.float64),)
    alone = derive(model, 2, inputs=x)
    assert alone.share > 0.6
    assert not [name for name in alone.sharded if name.startswith("attention")]
    plan = derive(model, 2, inputs=x, judge=lambda _: None).plan()
    gathered = {name for name, style in plan.modules.items() if getattr(style, "gather", None) is not None}
    assert gathered == {"attention.q", "attention.k", "attention.v", "attention.o"}
    assert parity(model, plan, 2, x).worst < 1e-9


class Asking(nn.Module):
    """An attention that holds query, key and value in one matrix of its own, and branches on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out = nn.Parameter(torch.randn(24, 8)), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.in_proj).chunk(3, -1)
        return self.out((q @ k.mT).softmax(-1) @ v) * (2 if (x > 9).any() else 1)


def test_an_attention_that_cannot_be_traced_is_gathered_with_its_own_matrices() -> None:
    torch.manual_seed(0)
    model, x = OneHead(), (torch.randn(2, 3, 8, dtype=torch.float64),)
    model.attention = Asking()
    model.double()
    found = derive(model, 2, inputs=x, judge=lambda _: None)
    assert {"attention.in_proj", "attention.out.weight", "up.weight"} <= {*found.sharded}
    assert parity(model, found.plan(), 2, x).worst < 1e-9


def test_torchs_attention_of_a_model_that_cannot_be_traced_holds_its_matrix_in_shards() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 1, batch_first=True)
            self.up, self.down = nn.Linear(8, 64), nn.Linear(64, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.up(x).relu()) if x.sum() < 99 else x
            return y + self.attention(y, y, y)[0]

    torch.manual_seed(0)
    model, x = Model().double(), (torch.randn(2, 3, 8, dtype=torch.float64),)
    found = derive(model, 2, inputs=x, judge=lambda _: None)
    assert found.share > 0.6
    assert {"attention.in_proj_weight", "up.weight"} <= {*found.sharded}
    plan = found.plan()
    assert parity(model, plan, 2, x).worst < 1e-9


class ModuleOfEachHead(nn.Module):
    """Each head is a module, and its layers are less than 1% of the model, of which the MLP has most."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 2, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.q(x) @ self.k(x).mT).softmax(-1) @ self.v(x)

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.norm, self.heads = nn.LayerNorm(8), nn.ModuleList(self.Head() for _ in range(heads))
        self.proj = nn.Linear(2 * heads, 8, bias=False)
        self.up, self.down = nn.Linear(8, 160), nn.Linear(160, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.proj(torch.cat([head(y) for head in self.heads], -1))
        return x + self.down(self.up(x).relu())


@pytest.mark.parametrize(("heads", "layers"), [(4, {"q", "k", "v"}), (1, set())])
def test_layers_of_one_name_count_together(heads: int, layers: set[str]) -> None:
    torch.manual_seed(0)
    model, x = ModuleOfEachHead(heads).double(), (torch.randn(2, 3, 8, dtype=torch.float64),)
    found = derive(model, 2, inputs=x, judge=lambda _: None)
    gathered = {name for name in found.sharded if name.startswith("heads.")}
    assert gathered == {f"heads.{head}.{layer}.weight" for head in range(heads) for layer in layers}
    assert parity(model, found.plan(), 2, x).worst < 1e-9


class FewKeys(nn.Module):
    """Queries and one head of keys and values in one weight, of which every rank needs the latter."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o, self.heads = nn.Linear(8, 18), nn.Linear(12, 8), 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).split([12, 3, 3], dim=-1)
        q = q.view(*x.shape[:2], self.heads, -1).transpose(1, 2)
        y = (q @ k.mT[:, None]).softmax(-1) @ v[:, None]
        return self.o(y.transpose(1, 2).flatten(2))


def test_a_weight_of_which_ranks_only_use_a_part_is_not_counted_as_split() -> None:
    model = nn.Sequential(nn.LayerNorm(8), FewKeys())
    found = derive(model, 4, inputs=(torch.randn(2, 3, 8),))  # 4 does not divide the 6 rows of keys and values
    assert {*found.sharded} == {"1.qkv.weight", "1.qkv.bias", "1.o.weight"}
    assert found.share == pytest.approx(8 * 12 / sum(p.numel() for p in model.parameters()))
    assert found.share == pytest.approx(SplitShare.of(model, found.plan(), 4).split)


def test_what_forward_does_not_use_counts_as_unsplit() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6))
    mlp.forward, mlp.idle = nn.Sequential(*mlp).forward, nn.Linear(16, 16)  # type: ignore[method-assign]
    found = derive(mlp, 2, inputs=(torch.randn(3, 4),))
    assert found.replicated["idle.weight"] == "the model's forward does not use it"
    assert found.share == pytest.approx(SplitShare.of(mlp, found.plan(), 2).split)
    assert 0 < found.share < 0.6


@pytest.mark.parametrize("place", ["first", "backward"])
def test_an_objection_leaves_the_layer_out(place: str) -> None:
    """Also one that names no layer."""
    from colrow.derive.judged import Objection

    def judge(plan: object) -> Objection | None:
        return Objection("no", (place,)) if "first" in plan.modules else None  # type: ignore[attr-defined]

    model, images = Normed(), (torch.randn(2, 3, 2, 2),)
    found = derive(model, 2, inputs=images, judge=judge)
    assert {"first.weight", "first.bias"} == {*found.replicated}


def test_parameters_that_no_style_splits_are_held_in_shards_and_gathered() -> None:
    torch.manual_seed(0)
    model, ids = Bare().double(), (torch.randint(0, 20, (3, 4)),)
    assert derive(model, 2, inputs=ids).share == 0
    found = derive(model, 2, inputs=ids, judge=lambda _: None)
    assert found.share == 1
    assert {type(style).name for style in found.plan().modules.values()} == {"gathered_parameters"}
    assert parity(model, found.plan(), 2, ids).worst < 1e-9
    kept = derive(model, 2, inputs=ids, options=DeriveOptions(keep_whole=["lstm"]), judge=lambda _: None)
    assert {name for name in kept.replicated if name.startswith("lstm")} == {
        f"lstm.{n}" for n in model.lstm._parameters
    }


class Scored(nn.Module):
    """A parameter that each rank uses on its own heads, beside one that all use alike."""

    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(2))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.o = nn.Linear(8, 24), nn.Linear(8, 8)
            self.gain = Scored.Gain()

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 2).permute(2, 0, 3, 1, 4)
            return self.o((self.gain(q) @ k.mT).softmax(-1).matmul(v).transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.attention = nn.Parameter(torch.randn(8, 8, 16)), self.Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("btd,deh->bte", x, self.mix)
        return F.layer_norm(x + self.attention(x), (8,))


def test_a_parameter_that_ranks_use_on_their_shards_is_not_gathered() -> None:
    torch.manual_seed(0)
    model, x = Scored().double(), (torch.randn(2, 3, 8, dtype=torch.float64),)
    found = derive(model, 2, inputs=x, judge=lambda _: None)
    gathered = {key: style for key, style in found.plan().modules.items() if type(style).name == "gathered_parameters"}
    assert {*gathered} == {""}
    assert "attention.gain.weight" in found.replicated
    assert parity(model, found.plan(), 2, x).worst < 1e-9
    plan = found.plan()
    wrong = {"style": "gathered_parameters", "shards": {"weight": 0}}
    broken = replace(plan, modules={**plan.modules, "attention.gain": wrong})
    assert parity(model, broken, 2, x).gradients["attention.gain.weight"] > 1e-3


@pytest.mark.parametrize(
    ("kv", "common"), [(1, {"replicated": [1]}), (3, {"kv": [1, 2], "heads": 6, "kv_heads": 3})], ids=["one", "three"]
)
def test_kv_heads_that_do_not_divide_are_held_in_shards_beside_q(
    monkeypatch: pytest.MonkeyPatch, kv: int, common: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(FewKvHeads(kv)).double(), (torch.randn(3, 5, 8, dtype=torch.float64),)
    qkv = {"style": "packed_colwise", "segments": [24, 8] if kv == 1 else [24, 12, 12], **common}
    block = {"style": "local_block", "attributes": {"HEADS": "/tp"}, "input": ["replicate"]}
    plan = Plan({"0": block, "0.qkv": qkv, "0.out": "rowwise"}, loss="replicated")  # type: ignore[dict-item]
    assert plan.parameters(model, 2)["0.qkv.weight"].local_shape == (4 * (3 + kv), 8)
    assert parity(model, plan, 2, x).worst < 1e-9
    monkeypatch.setattr("colrow.styles.rank_tensors.Partial", Replicate)
    errors = parity(model, plan, 2, x)
    assert errors.loss < 1e-9
    assert errors.gradients["0.qkv.weight"] > 1e-3


class Flat(nn.Module):
    """A block that is called with matrices cut out of one vector, behind it a norm."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(32, 12), nn.GELU(), nn.Linear(12, 32))
        self.__dict__["block"] = block.requires_grad_(False)  # no module of the model: it has no parameters of its own
        self.weights = nn.ParameterList([torch.cat([param.detach().flatten() for param in block.parameters()])])
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 6)

    def forward(self, x: Tensor) -> Tensor:
        names, given = zip(*self.block.named_parameters(), strict=True)
        pieces = self.weights[0].split([param.numel() for param in given])
        state = {name: piece.view_as(param) for name, piece, param in zip(names, pieces, given, strict=True)}
        return self.head(self.norm(x + torch.func.functional_call(self.block, state, (x,))))


def test_a_vector_that_matrices_are_cut_out_of_is_held_in_shards_and_one_of_a_norm_is_not() -> None:
    model, inputs = Flat().double(), (torch.randn(3, 10, 32, dtype=torch.float64),)
    found = derive(model, 2, inputs=inputs, judge=lambda _: None)
    assert found.plan().modules["weights"] == GatheredParameters(shards={"0": 0})
    assert "norm" not in found.plan().modules
    assert parity(model, found.plan(), 2, inputs).worst < 1e-9


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(32, 8), nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


def test_sequence_shards_do_not_keep_a_recurrent_layer_from_being_held_in_shards() -> None:
    torch.manual_seed(0)
    model = Recurrent().double()
    assert derive(model, 2, inputs=IDS).sequence_parallel
    found = derive(model, 2, inputs=IDS, judge=lambda _: None)
    plan = found.plan()
    assert isinstance(plan.modules["rnn"], GatheredParameters)
    assert not found.sequence_parallel
    assert found.share > 0.95
    assert parity(model, plan, 2, IDS).worst < 1e-9
    assert not check(model, plan, Mesh(tp=2), 2, 10)
    summed = Plan(plan.modules | {"rnn": GradSum()}, loss=plan.loss)
    assert {finding.code for finding in check(model, summed, Mesh(tp=2), 2, 10)} == {"CR502"}
    assert parity(model, summed, 2, IDS).gradients["rnn.weight_hh_l0"] > 0.5
