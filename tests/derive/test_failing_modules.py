"""One module whose code cannot be traced, or not on a rank's shapes, is left unsharded: the others are split."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from colrow.derive import derivation, sizes
from colrow.derive.derivation import derive
from colrow.derive.failure import ADVICE, InternalError, TraceError
from colrow.derive.trace import trace
from colrow.verifying.verify import parity
from helpers import attentions
from helpers.harness import Ranks
from helpers.layers import MLP, Block, Language
from helpers.variants import params

TOLERANCE = 1e-9
D, HEADS = 32, 4
IDS = torch.randint(0, 96, (2, 10), generator=torch.Generator().manual_seed(0))


class ByWidth(nn.Module):
    """It states how wide its products are."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.heads, self.width = nn.Linear(D, 3 * D), nn.Linear(D, D), HEADS, D

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        y = self.qkv(x)
        assert y.shape[-1] == 3 * C
        q, k, v = (part.view(B, T, self.heads, C // self.heads).transpose(1, 2) for part in y.split(self.width, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).contiguous().view(B, T, C))


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(D, D, bias=False) for _ in range(4))

    def heads(self, x: Tensor) -> list[Tensor]:
        B, T, _ = x.shape
        products = [linear(x) for linear in (self.q, self.k, self.v)]
        if any(y.shape != x.shape for y in products):
            raise ValueError("not enough values to unpack")
        return [y.view(B, T, HEADS, -1).transpose(1, 2) for y in products]


class MinusOneLast(Separate):
    """The -1 takes up the split: heads of half the features, which the rotary table does not fit."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("angle", torch.arange(64)[:, None] * torch.exp(-torch.arange(D // HEADS // 2)))

    def forward(self, x: Tensor) -> Tensor:
        sin, cos = self.angle[: x.shape[1]].sin(), self.angle[: x.shape[1]].cos()

        def turn(t: Tensor) -> Tensor:
            a, b = t.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(turn(q), turn(k), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(x.shape))


class ByHand(Separate):
    """Scores by matmul with a table for positions, a mask, and the full width in the last view."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(64, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        places = torch.arange(x.shape[1], device=x.device)
        bias = self.positions((places[:, None] - places).abs()).permute(2, 0, 1)
        scores = q @ k.transpose(-1, -2) / (D // HEADS) ** 0.5 + bias
        scores = scores.masked_fill(places[:, None] < places, float("-inf")).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(*x.shape[:2], D))


def language(attention: type[nn.Module]) -> Language:
    return Language(D, 96, (Block(D, attention(), MLP(D)) for _ in range(2)))


MLPS = {f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("up.weight", "up.bias", "down.weight")}


@pytest.mark.parametrize("attention", params([ByWidth, MinusOneLast, ByHand], lambda cls: cls is not ByWidth))
def test_attention_that_fails_on_a_rank_leaves_mlps_and_vocabulary_split(attention: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = language(attention).double()
    found = derive(model, 2, inputs=(IDS,))
    assert set(found.sharded) >= MLPS | {"embed.weight", "head.weight"}
    for name, why in found.replicated.items():
        if ".attn." in name and "positions" not in name and "bias" not in name:
            assert f"blocks.0.attn ({attention.__name__}) does not run on a rank's shapes" in why, name
            assert "test_failing_modules.py:" in why
            assert not any(raw in why for raw in ("Error", "unpack", "invalid for input"))
    assert parity(model, found.plan(), 2, (IDS,)).worst < TOLERANCE


@pytest.mark.exhaustive
def test_without_the_module_every_class_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    suspects = derivation._Derive._suspects
    monkeypatch.setattr(derivation._Derive, "_suspects", lambda self, split, module: suspects(self, split, None))
    found = derive(language(ByWidth), 2, inputs=(IDS,))
    assert set(found.sharded) == {"embed.weight", "head.weight"}


@pytest.mark.parametrize(
    ("holder", "function"), [(sizes, "sizes_written"), (sizes._Solved, "_local_sizes")], ids=["marks", "solves"]
)
def test_an_error_of_the_derivation_itself_is_no_size_that_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, holder: Any, function: str
) -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("no such call")

    monkeypatch.setattr(holder, function, broken)
    with pytest.raises(InternalError, match="an error of colrow's own: KeyError: 'no such call'"):
        derive(language(ByWidth), 2, inputs=(IDS,))


class Asks(nn.Module):
    """A branch on the values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = MLP(D)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(x)
        return y if not (x > 9).any() else y.masked_fill(x > 9, 0.0)


def test_what_cannot_be_traced_is_named_in_one_line_and_left_unsharded(
    capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    model = language(Asks).double()
    with caplog.at_level(logging.WARNING), pytest.raises(TraceError) as raised:
        trace(model, (IDS,))
    text = str(raised.value)
    assert "blocks.0.attn (Asks) branches on the data at test_failing_modules.py:" in text
    assert text.endswith(ADVICE)
    assert "\n" not in text
    assert "GuardOn" not in text
    assert raised.value.module == "blocks.0.attn"
    assert str(pickle.loads(pickle.dumps(raised.value))) == text
    with caplog.at_level(logging.WARNING):
        found = derive(model, 2, inputs=(IDS,))
    assert capfd.readouterr().err == ""
    assert not caplog.records
    assert set(found.sharded) == MLPS | {"embed.weight", "head.weight"}
    assert found.replicated["blocks.1.attn.mlp.up.weight"] == text.partition(": ")[2]
    assert text.partition(": ")[2] in found.notes
    assert not any("opaque" in why for why in found.replicated.values())
    assert parity(model, found.plan(), 2, (IDS,)).worst < TOLERANCE


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_experts_chosen_by_the_data_stay_unsharded_and_train_as_one_process_does(ranks: Ranks) -> None:
    kinds, batch = (attentions.Routed, attentions.ByWidth), torch.cat([IDS, IDS], -1)[:, :17] % attentions.VOCAB
    found = derive(attentions.language(*kinds), 2, inputs=(batch[:, :-1],))
    assert {"blocks.1.attn.qkv.weight", "blocks.0.mlp.up.weight"} <= set(found.sharded)
    assert "blocks.0.attn (Routed) has sizes that depend on the data" in found.replicated["blocks.0.attn.gate.weight"]
    for errors in ranks(2).run(attentions.train_case, kinds, batch, found.plan().to_yaml()):
        assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.asks = Asks()

    def forward(self, ids: Tensor) -> Tensor:
        return self.asks(ids) if ids.max() > 3 else ids


def test_a_model_whose_own_code_cannot_be_traced_is_refused() -> None:
    with pytest.raises(TraceError, match="Outer branches on the data"):
        derive(Outer(), 2, inputs=(torch.ones(2, 10, D),))


def test_at_tp_1_nothing_is_traced() -> None:
    found = derive(Outer(), 1, inputs=(torch.ones(2, 10, D),))
    assert not found.modules
    assert set(found.replicated) == {name for name, _ in Outer().named_parameters()}


class Modulated(nn.Module):
    """A timestep's frequencies, written in the model's own forward, and the vector that modulates the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 12), nn.SiLU(), nn.Linear(12, 12))
        self.norm, self.shift, self.mlp = nn.LayerNorm(6), nn.Linear(12, 12), MLP(6, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.arange(4, dtype=t.dtype)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], -1))
        shift, scale = self.shift(F.silu(condition)).chunk(2, -1)
        return x + self.mlp(self.norm(x) * (1 + scale[:, None]) + shift[:, None])


def test_frequencies_that_no_module_makes_leave_what_they_modulate_split() -> None:
    torch.manual_seed(0)
    model = Modulated().double()
    inputs = (torch.randn(3, 5, 6, dtype=torch.float64), torch.rand(3, dtype=torch.float64))
    found = derive(model, 2, inputs=inputs)
    assert {"time.2.weight", "shift.weight", "mlp.up.weight"} <= {*found.sharded}
    assert "no module stands between the stream and mul" in found.replicated["time.0.weight"]
    assert parity(model, found.plan(), 2, inputs).worst < TOLERANCE


class Timed(nn.Module):
    """A step's frequencies, written in forward, enter the first of two equal layers; a modulation takes the second."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D))
        self.modulation, self.mlp, self.head = nn.Linear(D, 8 * D), MLP(D), nn.Linear(D, 5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(D // 2, device=t.device) / D)
        c = self.time(torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype))
        scale, *gates = self.modulation(F.silu(c))[:, None].chunk(8, dim=-1)
        return self.head(F.layer_norm(x + sum(gates) * self.mlp(F.layer_norm(x, (D,)) * scale), (D,)))


def test_a_layer_that_fails_costs_its_neighbour_in_a_sequence_nothing() -> None:
    inputs = (torch.randn(2, 10, D, dtype=torch.float64), torch.tensor([3, 8]))
    model = Timed().double()
    found = derive(model, 2, inputs=inputs)
    assert "does not run on a rank's shapes" in found.replicated["time.0.weight"] + " ".join(found.notes)
    assert {"time.2.weight", "modulation.weight", "mlp.up.weight"} <= {*found.sharded}
    assert parity(model, found.plan(), 2, inputs).worst < TOLERANCE
