"""How much of a model a plan splits is said, with the largest reasons for the rest."""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from colrow.cli import main
from colrow.cli.text import Terminal, show_share
from colrow.plans.plan import Plan
from colrow.plans.split_share import SplitShare


class Layered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 32), "down": nn.Linear(32, 16)}) for _ in (0, 1))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x))
        return x


BOTH = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
UP = 16 * 32 + 32
ALL = UP + 32 * 16 + 16


def test_the_share_counts_elements_of_parameters() -> None:
    share = SplitShare.of(Layered(), Plan(modules=BOTH), 2)
    assert share.split == (ALL - 16) / ALL
    assert not share.is_small
    assert share.summary() == "99% of the parameters are split over tp=2"


def test_a_reason_names_its_largest_parameter_and_what_another_degree_takes_away() -> None:
    notes = {
        "layers.0.up.bias": "dim 0 (32): normalised over in norm",
        "layers.0.up.weight": "dim 0 (32): normalised over in norm; dim 1 (16): not divisible by 3",
        "layers.1.up.weight": "dim 0 (32): normalised over in norm; dim 1 (16): summed over by a product",
    }
    rest = SplitShare.of(Layered(), Plan({}, notes=notes), 3).rest
    assert {(name, why) for _, name, why in rest if "layers.*.up" in name} >= {
        ("layers.*.up.weight", "not divisible by 3"),
        ("layers.*.up.weight", "normalised over in norm"),
    }


def test_operations_count_beside_parameters() -> None:
    share = SplitShare.of(Layered(), Plan(modules=BOTH), 2, flops=0.5)
    assert share.summary() == (
        "only 99% of the parameters and 50% of the FLOPs are split over tp=2: each rank holds and computes the rest as "
        "without tp"
    )
    assert share.to_data()["flops"] == 0.5
    assert not SplitShare.of(Layered(), Plan(modules=BOTH), 2, flops=0.9).is_small


def test_json_has_the_shares_and_the_three_largest_reasons(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    module = "test_split_share:Layered"
    inputs = ["--inputs", "test_split_share:features", "--plan", "plan.yaml", "--tp", "2", "--json"]
    monkeypatch.chdir(Path(tempfile.mkdtemp()))
    Plan(modules={"layers.*.up": {"style": "colwise", "output": "replicate"}}).save("plan.yaml")
    for verb in ("plan", "check"):
        assert main([verb, module, *inputs]) == 0
        split = json.loads(capsys.readouterr().out)["split"]
        assert split["parameters"] == UP / ALL
        assert split["flops"] == 0.5
        (reason,) = split["reasons"]
        assert reason["parameter"] == "layers.*.down.weight"
        assert reason["share"] == 1 - UP / ALL


def features() -> Tensor:
    return torch.zeros(2, 8, 16)


def test_little_is_a_warning_with_one_line_for_all_layers() -> None:
    notes = {
        "layers.0.down.weight": "dim 1 (4): layers.0.down (Linear) does not run; dim 0 (16): normalised over",
        "layers.1.down.weight": "dim 1 (4): layers.0.down (Linear) does not run",
    }
    plan = Plan(modules={"layers.*.up": {"style": "colwise", "output": "replicate"}}, notes=notes)
    share = SplitShare.of(Layered(), plan, 2)
    assert share.split == UP / ALL
    assert share.is_small
    assert share.reasons()[0] == "48% replicated, layers.*.down.weight for one: layers.*.down (Linear) does not run"
    assert sum(part for part, _, _ in share.rest) == pytest.approx(1 - share.split)


def test_nothing_never_passes_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    share = SplitShare.of(Layered(), Plan(modules={}), 2)
    assert share.summary() == "0% of the parameters are split over tp=2: nothing is saved"
    show_share(share, Terminal(highlight=False, width=80))
    assert capsys.readouterr().out.startswith("warning: 0% of the parameters")
    assert not SplitShare.of(Layered(), Plan(modules={}), 1).is_small


class Scaled(nn.Module):
    """Nothing that could be split."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(ids[..., None].float().expand(-1, -1, 16))


def test_derive_warns_of_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "colrow"):
        assert Plan.derive(Scaled(), 2).modules == {}
    (record,) = (r for r in caplog.records if r.name == "colrow")
    assert record.getMessage().startswith("a derived plan splits only 0% of Scaled over tp=2: ")


def test_a_models_own_plan_for_its_head_alone_is_not_silent(caplog: pytest.LogCaptureFixture) -> None:
    model = Layered()
    model.tp_plan = {"layers.0.up": "colwise"}  # type: ignore[assignment]
    with caplog.at_level(logging.WARNING, "colrow"):
        Plan.from_huggingface(model)
    assert "Layered states for itself names modules with 25% of the parameters (layers.0.up): the rest" in caplog.text
    caplog.clear()
    model.tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}  # type: ignore[assignment]
    Plan.from_huggingface(model)
    assert caplog.text == ""


def test_a_parameter_without_elements_has_a_reason_too() -> None:
    model = nn.Linear(4, 4, bias=False)
    model.memory = nn.Parameter(torch.zeros(0, 4))
    share = SplitShare.of(model, Plan(modules={}, notes={"memory": "empty", "weight": "small"}), 2)
    assert share.rest == ((1.0, "weight", "small"), (0.0, "memory", "empty"))
