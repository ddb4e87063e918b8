"""What a derivation tries on a rank: few exports, none decomposed, and none that is believed blindly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import colrow.derive.local
from colrow.derive.attributes import Attributes, AttributeSearch
from colrow.derive.derivation import derive
from colrow.derive.failure import Misfit
from colrow.derive.infer import op_name
from colrow.derive.result import Derivation
from colrow.derive.trace import operators_like, trace
from colrow.derive.undecomposed import known_shape

X = torch.randn(3, 34, 8)


class Mixer(nn.Module):
    """Views, pieces of equal and unequal sizes, a write in place and a region without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.o, self.heads = nn.Linear(8, 48), nn.Linear(16, 8), 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).chunk(3, -1)
        q, k, v = (t.reshape(*x.shape[:2], self.heads, 4).transpose(1, 2) for t in (q, k, v))
        with torch.no_grad():
            angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None].cos()
        scores = q * angle @ k.transpose(-1, -2)
        scores += 1
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(*x.shape[:2], -1))


class AsksWhetherExported(Mixer):
    """Runs on fake tensors only by the code that it has for an export, as transformers' experts do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if torch.compiler.is_exporting() else x * x.sum().item())


class ByItsWidth(nn.Module):
    """Divides by the width of what a rank has: nothing raises there."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        return x + self.down(hidden / hidden.shape[-1])


def derived(model: nn.Module) -> Derivation:
    return derive(nn.Sequential(model, nn.LayerNorm(8)), 2, inputs=(X,))


def test_ranks_are_compared_before_decompositions(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("operators_like", "decomposed"):
        function = getattr(colrow.derive.local, name)
        monkeypatch.setattr(colrow.derive.local, name, lambda *given, f=function: calls.append(f) or f(*given))
    found = derived(AsksWhetherExported())
    assert {"0.inner.weight", "0.o.weight"} <= set(found.sharded)
    assert {*calls} == {operators_like}


def test_a_number_that_a_rank_computes_otherwise_shows_before_decompositions() -> None:
    found = derived(ByItsWidth())
    assert not found.sharded
    assert any("computes with [16] on a rank, not [32]" in note for note in found.notes), found.notes


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.experts = nn.Linear(2, 2), nn.Linear(2, 2)


NEEDED = {"key_dim", "value_dim", "heads"}


@pytest.mark.parametrize(
    ("others", "wrong", "most"),
    [(["window"], set(), 11), (["head_k_dim", "head_v_dim"], {"head_k_dim", "head_v_dim"}, 13)],
    ids=["one idle", "sizes of a head"],
)
def test_attributes_that_are_needed_together_are_found_in_few_exports(
    others: list[str], wrong: set[str], most: int
) -> None:
    tried: list[Attributes] = []

    def misfit(attributes: Attributes) -> Misfit | None:
        tried.append(attributes)
        given = {*attributes.get("attn", {})}
        fits = given >= NEEDED and not given & wrong and not attributes.get("experts")
        return None if fits else Misfit("attn does not fit", "attn")

    names = [*NEEDED, *others]
    candidates = {("Attention", name): {"attn": "/tp"} for name in names} | {("Experts", "count"): {"experts": "/tp"}}
    search = AttributeSearch(Layer(), {}, misfit)
    assert search.found(lambda: candidates) == {"attn": dict.fromkeys(NEEDED, "/tp")}
    assert len(tried) <= most  # 26 sets of up to four of the first five


class Padded(nn.Module):
    """Views of what was written in place: decompositions take them where they are used."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(x)
        if self.writes:
            mask = zeros
            mask[:, :].masked_fill_(x > 0, -1.0)
        else:
            mask = zeros.masked_fill(x > 0, -1.0)
        return x[:, None] + mask.view(3, 1, 34, 8).expand(-1, 4, -1, -1).reshape(3, 4, 34, 8)


@pytest.mark.parametrize("writes", [False, True])
def test_views_of_what_was_written_in_place_have_their_decomposed_nodes(writes: bool) -> None:
    known = trace(Padded(writes), (X,)).undecomposed
    assert [n for n in known.nodes if n not in known.result] == []
    for node, found in known.result.items():
        assert known_shape(node) == known_shape(found)
    views = [node for node in known.nodes if op_name(node) == "view"]
    assert [node in known.parts for node in views] == [not writes]
