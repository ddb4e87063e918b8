"""Which blocks are exported for a derivation, and that the plan is the one that all of them give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.examine import prepared
from benchmarks.models.tiny import classes, tiny
from colrow.derive import derivation
from colrow.derive.derivation import derive
from colrow.derive.representatives import Representatives
from colrow.derive.requests import Requests
from colrow.derive.result import Derivation
from colrow.dryrun.calls import Inputs
from colrow.plans.derive_options import DeriveOptions, Styles
from helpers.variants import params

D, LAYERS = 16, 8


class Mlp(nn.Module):
    def __init__(self, width: int = 4 * D) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, width), nn.Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """An MLP over a norm; `turned` mixes tokens too."""

    def __init__(self, width: int = 4 * D, turned: bool = False) -> None:
        super().__init__()
        self.norm, self.mlp, self.turned = nn.LayerNorm(D), Mlp(width), turned

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.mlp(y.cumsum(1) if self.turned else y)


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(blocks), nn.Linear(D, 12)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Counted(Stack):
    """Finds its blocks by number, as many as it was built with."""

    def forward(self, x: Tensor) -> Tensor:
        for number in range(LAYERS):
            x = self.blocks[number](x)
        return self.head(x)


class Skips(Stack):
    """The second half takes what the first has made, the last first."""

    def forward(self, x: Tensor) -> Tensor:
        kept: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            if number >= LAYERS // 2:
                x = x + kept.pop()
            x = block(x)
            if number < LAYERS // 2:
                kept.append(x)
        return self.head(x)


class TwoStreams(Stack):
    """Every third block belongs to another stream; no operator and no shape shows it."""

    def forward(self, x: Tensor) -> Tensor:
        streams = [x, x.abs()]
        for number, block in enumerate(self.blocks):
            streams[number % 3 == 2] = block(streams[number % 3 == 2])
        return self.head(streams[0] + streams[1])


class Chain(nn.Module):
    """Each linear layer is split by what the one before it is: columns, rows, columns."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(LAYERS)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def alike() -> Stack:
    return Stack([Block() for _ in range(LAYERS)])


def every_third() -> Stack:
    return Stack([Block(turned=number % 3 == 2) for number in range(LAYERS + 4)])


def first_narrow() -> Stack:
    return Stack([Block(2 * D if number == 0 else 4 * D) for number in range(LAYERS)])


def shared() -> Stack:
    model = alike()
    for block in model.blocks[3:]:
        block.mlp = model.blocks[2].mlp
    return model


def inputs() -> tuple[Tensor, ...]:
    return (torch.randn(3, 34, D),)


def left_out(model: nn.Module, **options: Any) -> list[int]:
    requests = Requests.of(model, DeriveOptions(**options))
    found = Representatives.of(model, Inputs.of(inputs()), requests)
    return sorted(int(name.rpartition(".")[2]) for name in found.stands)


@pytest.mark.parametrize(
    ("build", "numbers"),
    [
        (alike, [2, 3, 4, 5, 6]),
        (every_third, [3, 4, 6, 7, 9, 8]),
        (first_narrow, [3, 4, 5, 6]),
        (shared, [5, 6]),
        (Skips, []),
        (TwoStreams, []),
        (Counted, []),
    ],
)
def test_of_each_kind_the_first_two_and_the_last_are_kept(build: Any, numbers: list[int]) -> None:
    model = build([Block() for _ in range(LAYERS)]) if isinstance(build, type) else build()
    assert left_out(model) == sorted(numbers)


def test_blocks_that_a_user_names_are_a_kind_of_their_own() -> None:
    assert left_out(alike(), keep_whole=("blocks.3.mlp",)) == [2, 4, 5, 6]


def test_a_model_that_does_not_run_on_fake_tensors_keeps_all_blocks() -> None:
    class ReadsData(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    assert left_out(ReadsData([Block() for _ in range(LAYERS)])) == []


def test_blocks_keep_their_names_and_parameters() -> None:
    model = alike()
    found = Representatives.of(model, Inputs.of(inputs()), Requests.of(model, DeriveOptions()))
    kept = dict(found.model.named_parameters())
    assert {name.split(".")[1] for name in kept if name.startswith("blocks")} == {"0", "1", "7"}
    assert all(kept[name] is model.get_parameter(name) for name in kept)
    assert found.name("blocks.5.mlp.up") == "blocks.1.mlp.up"
    assert found.count("blocks.1.mlp") == 6
    assert found.volume({"blocks.1.mlp.up.weight": 10}) == 10
    assert found.volume({f"blocks.{number}.mlp.up.weight": 10 for number in (0, 1, 7)} | {"head.weight": 1}) == 81


def both(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, given: tuple[Tensor, ...], **options: Any
) -> tuple[Derivation, Derivation]:
    """The derivations from some blocks and from all."""
    some = derive(model, 2, inputs=given, options=DeriveOptions(**options))

    class All(Representatives):
        @classmethod
        def of(cls, model: nn.Module, *_: Any) -> Representatives:
            return Representatives(model, model)

    monkeypatch.setattr(derivation, "Representatives", All)
    return some, derive(model, 2, inputs=given, options=DeriveOptions(**options))


def same(some: Derivation, every: Derivation) -> bool:
    fields = ("modules", "loss", "sharded", "replicated", "legal", "reductions", "notes", "sequence_parallel", "share")
    return all(getattr(some, field) == getattr(every, field) for field in fields)


@pytest.mark.parametrize(
    "build", params([alike, every_third, first_narrow, shared, Chain], exhaustive=lambda build: build is not Chain)
)
def test_the_plan_is_that_of_all_blocks(monkeypatch: pytest.MonkeyPatch, build: Any) -> None:
    some, every = both(monkeypatch, build(), inputs())
    assert same(some, every)
    assert some.share > 0.5


@pytest.mark.exhaustive
def test_without_the_look_at_joined_classes_the_chain_is_split_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Representatives, "require_separate", lambda *_: None)
    monkeypatch.setattr(Representatives, "spread", lambda self, styles, names: spread(self, styles, names))

    def spread(found: Representatives, styles: dict[str, Any], names: list[str]) -> dict[str, Any]:
        return {name: styles[found.name(name)] for name in names if found.name(name) in styles}

    some, every = both(monkeypatch, Chain(), inputs())
    assert not same(some, every)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "styles", "sizes"),
    [
        ("gpt2", "plain", {}),
        ("gpt2", "fast", {}),
        ("gemma3_text", "plain", {"layer_types": None}),
        ("deepseek_v3", "plain", {"num_key_value_heads": 8, "first_k_dense_replace": 1}),
    ],
)
def test_a_family_gets_the_plan_of_all_its_layers(
    monkeypatch: pytest.MonkeyPatch, kind: str, styles: Styles, sizes: dict[str, Any]
) -> None:
    pytest.importorskip("transformers")
    model, given = prepared(tiny(*classes(kind), num_hidden_layers=LAYERS, **sizes), 2)
    some, every = both(monkeypatch, model, given, styles=styles)
    assert same(some, every)
