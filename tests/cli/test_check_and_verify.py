"""`colrow check` and `colrow verify`: exit status, JSON, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from colrow.cli import main
from colrow.plans.plan import Plan
from colrow.verifying import controls

SHALLOW = """
from dataclasses import replace
from colrow.models.llama import Llama
from colrow.models.shapes import shape

def build():
    return Llama(replace(shape("laptop"), num_hidden_layers=1))
"""


def broken(folder: Path) -> Path:
    plan = Plan.preset("llama")
    kept = {key: style for key, style in plan.modules.items() if key != "norm"}
    path = folder / "plan.yaml"
    Plan(kept, plan.loss, "broken").save(path)
    return path


def test_check_of_a_sound_plan_exits_0_without_findings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "laptop", "--tp", "2", "--plan", "llama", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("ok", "findings")} == {"ok": True, "findings": []}
    assert (found["split"]["parameters"] > 0.9, found["split"]["flops"]) == (True, 1.0)


def test_check_of_a_broken_plan_exits_1_with_its_finding(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(broken(tmp_path))
    assert main(["check", "laptop", "--tp", "2", "--plan", path, "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is False
    (finding,) = shown["findings"]
    assert set(finding) == {"code", "severity", "where", "message", "fix"}
    assert (finding["code"], finding["severity"], finding["where"]) == ("CR501", "error", "norm.weight")


def test_check_prints_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "laptop", "--tp", "3"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "error CR202 heads-do-not-divide at layers.*.self_attn.q_proj" in out
    assert "choose tp from 1, 2, 4, 8" in out
    assert "docs/checks/CR202.md" in out


NORMED = """
from torch import nn

class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        h = self.up(x)
        return self.down(h / h.norm(dim=-1, keepdim=True))
"""


def test_check_calls_an_unproven_plan_right_unless_it_is_strict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "normed.py").write_text(NORMED, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    path = str(tmp_path / "plan.yaml")
    Plan({"up": "colwise", "down": "rowwise"}, "replicated", "normed").save(path)
    args = ["check", "normed:Normed", "--tp", "2", "--plan", path, "--seq-len", "16", "--json"]
    assert main(args) == 0
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["code"], finding["severity"]) == ("CR414", "warning")
    assert "linalg_vector_norm on a shard of dim 2 at normed.py:11" in finding["message"]
    assert main([*args, "--strict"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["check", "lama", "--tp", "2"], "no model is called 'lama'"),
        (["check", "laptop", "--tp", "0"], "--tp 0: use 1 or more"),
        (["check", "laptop", "--tp", "2", "--plan", "nowhere.yaml"], "no preset and no file 'nowhere.yaml'"),
        (["check", "laptop", "--tp", "2", "--keep-whole", "lm_head"], "keep_whole and split are requests to a derived"),
        (["verify", "laptop", "--tp", "1"], "verify needs tp of 2 or more"),
    ],
)
def test_bad_usage_exits_2_and_says_what_is_wrong(
    args: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    assert text in capsys.readouterr().err


def test_verify_exits_0_for_a_proved_plan_and_1_for_a_wrong_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "shallow.py").write_text(SHALLOW, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["verify", "shallow:build", "--tp", "2", "--backend", "local", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"ok", "loss_rel_err", "max_grad_rel_err", "parameters", "worst", "tolerance"} <= set(shown)
    assert shown["ok"] is True
    assert shown["verdict"] == "proved"
    assert shown["control"]["caught"] is True
    assert shown["max_grad_rel_err"] < shown["tolerance"]
    assert main(["verify", "shallow:build", "--tp", "2", "--backend", "local", "--plan", str(broken(tmp_path))]) == 1
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "norm.weight, ranks differ" in out
    assert "wrong: the sharded model does not compute the same" in out


def test_verify_exits_3_when_it_is_inconclusive(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "shallow.py").write_text(SHALLOW, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(controls, "_cases", lambda task, plan: iter(()))  # nothing to break
    assert main(["verify", "shallow:build", "--tp", "2", "--plan", "llama", "--backend", "local", "--json"]) == 3
    shown = json.loads(capsys.readouterr().out)
    assert (shown["ok"], shown["verdict"], shown["control"]) == (False, "inconclusive", None)
