"""The table of other packages' models: who is in it, and what a judge says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.foreign import judge
from benchmarks.models.foreign.__main__ import table, trained_table
from benchmarks.models.foreign.registry import GROUPS, models_of
from benchmarks.models.results import read
from colrow.checking.check import Findings
from colrow.checking.finding import Finding
from colrow.derive.judged import Judgement
from colrow.dryrun.calls import Inputs
from colrow.plans.plan import Plan

PINS = Path(judge.__file__).parent


def test_there_are_models_of_many_packages_in_each_field() -> None:
    found = [each for group in GROUPS for each in models_of(group)]
    assert len({each.key for each in found}) == len(found) >= 40
    assert len({each.package for each in found}) >= 20
    fields = {"language", "vision", "audio", "diffusion", "recommenders", "time series", "proteins", "graphs"}
    assert {each.field for each in found} == fields


@pytest.mark.parametrize("group", GROUPS)
def test_every_package_has_a_pin(group: str) -> None:
    lines = (PINS / f"{group}.txt").read_text(encoding="utf-8").splitlines()
    assert all("==" in line for line in lines)
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines}
    assert "torch" not in pinned
    packages = {each.package.lower() for each in models_of(group)}
    assert packages - {"transformers"} <= pinned


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.values, self.out = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.values(x).relu())


class Written(nn.Module):
    """By hand: a block of attention's parameters and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.up, self.down = SelfAttention(), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.down(self.up(x).relu())


def judged() -> judge.Row:
    return judge.judged(Written(), Inputs.of((torch.randn(3, 34, 16),)), 2)


@pytest.mark.exhaustive
def test_a_judge_says_useful_and_how_much() -> None:
    row = judged()
    assert row["verdict"] == "useful"
    assert row["share"] > 0.9
    assert row["attention"] > 0.9
    assert row["seconds"] > 0


def test_a_finding_and_an_exception_are_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Findings([Finding("CR501", "error", "up", "off", "")])
    plan = Plan(modules={"up": "colwise", "down": "rowwise"})
    found = SimpleNamespace(plan=lambda: plan, judgement=Judgement(None, wrong))
    monkeypatch.setattr(judge, "derive_judged", lambda *args, **options: found)
    assert judged()["verdict"] == "WRONG"

    def fails(*args: Any, **options: Any) -> None:
        raise IndexError("tuple")

    monkeypatch.setattr(judge, "derive_judged", fails)
    row = judged()
    assert (row["verdict"], row["reason"]) == ("fails", "IndexError: tuple")


def test_the_table_counts_verdicts(tmp_path: Path) -> None:
    first = {"model": "a/B", "package": "a", "name": "B", "field": "vision", "tp": 2, "seconds": 1.5}
    rows = [
        first | {"verdict": "useful", "share": 0.97, "attention": 0.9, "reason": ""},
        first | {"tp": 4, "verdict": "little", "share": 0.2, "attention": 0.1, "reason": "heads | 2"},
    ]
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [first | {"verdict": "WRONG"}, *rows]), encoding="utf-8")
    text = table(list(read(path).values()), "command", "with torch", ["a/B", "a/C"])
    assert "Not run yet, 1 of 2: a/C." in text
    assert "1 models of 1 packages" in text
    assert "| useful | 1 | 0 |" in text
    assert "| WRONG | 0 | 0 |" in text
    assert "| attention split | 1 of 1 | 0 of 1 |" in text
    assert "| vision | a | B | useful | little | 97% / 20% | 90% / 10% | 1.5 | heads / 2 |" in text


def test_the_page_holds_models_that_are_here_and_nothing_wrong() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models-foreign.md").read_text(encoding="utf-8")
    assert re.search(r"^\| WRONG \| 0( \| 0)* \|$", text, re.M)
    known = {(each.package, each.name) for group in GROUPS for each in models_of(group)}
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    listed = {(row[1], row[2]) for row in cells if len(row) > 6 and row[0] != "field"}
    assert len(listed) >= 40
    assert listed <= known


def test_models_that_were_trained_stand_in_a_table_of_their_own() -> None:
    good = {"dtype": "float64", "dropout": 0.1, "first": 1.5, "last": 1.25, "worst": 2e-15, "ok": True}
    rows = [{"model": "a/A", "styles": "plain"} | good, {"model": "b/B", "styles": "fast", "refused": "no stream"}]
    text = trained_table(rows)
    assert "| a/A | plain | float64 | 0.1 | 1.5, 1.25 | 2e-15 |" in text
    assert "| b/B | fast |  |  |  | refused: no stream |" in text
