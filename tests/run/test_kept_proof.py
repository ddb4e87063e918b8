"""A run starts with a proof, which its folder keeps: a restart pays again where what it depends on has changed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from colrow.cli import main
from colrow.config import RunConfig, parse_config
from colrow.models.build import build_source, imported
from colrow.plans.plan import Plan
from colrow.run import decision, plan_check, preflight
from colrow.run.kept_proof import FILE, KeptProof, dependencies
from colrow.verifying.report import Report, Verdict
from helpers.broken_plans import gpt_plan
from helpers.runs import write_text
from helpers.started import without_ranks

MODEL = """
from types import SimpleNamespace
import mine_layers
from helpers.started import without_ranks

def build():
    model = mine_layers.Gpt(layers=1)
    model.config = SimpleNamespace(vocab_size=mine_layers.V)
    return model
"""
LAYERS = "from helpers.broken_models import *\nfrom helpers.broken_models import Gpt as _Gpt\nclass Gpt(_Gpt): pass\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a model of a user's own in two files, a plan for it, and a run."""
    write_text(tmp_path)
    (tmp_path / "mine.py").write_text(MODEL)
    (tmp_path / "mine_layers.py").write_text(LAYERS)
    gpt_plan().save(tmp_path / "plan.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    tree = {
        "run": {"dir": "run"},
        "model": {"python": "mine:build"},
        "data": {"corpus": "*.txt", "seq_len": 16, "tokenizer": {"vocab_size": 300}, "cache": "cache", "workers": 1},
        "mesh": {"tp": 2},
        "plan": "plan.yaml",
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 2, "lr": 1e-3},
        "device": "cpu",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    yield tmp_path
    for name in ("mine", "mine_layers"):
        sys.modules.pop(name, None)


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Verdict], list[str]]:
    """`proofs(verdict)`: from now on a proof ends so; returns the list of those that are made."""

    def expect(verdict: Verdict) -> list[str]:
        made: list[str] = []

        def prove(*args: Any, **options: Any) -> Report:
            made.append(verdict)
            return Report(verdict, 2, "local", 12, 1e-9, None, 0.1, 0.0, 0.5, 0.0)

        monkeypatch.setattr(decision, "prove", prove)
        return made

    return expect


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of ranks that were to be started; none is."""
    monkeypatch.setattr(preflight, "require_vocabulary_of", lambda *args: None)
    monkeypatch.setattr("colrow.data.prepare.prepare", lambda *args, **options: type("Data", (), {"tokenizer": None}))
    return without_ranks(monkeypatch)


@pytest.mark.parametrize("check", ["True", "False"])
@pytest.mark.parametrize("verdict", ["wrong", "inconclusive"])
def test_only_a_proved_plan_starts(
    check: str, verdict: Verdict, folder: Path, proofs: Any, started: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = proofs(verdict)
    assert main(["train", "run.yaml", "--check", check]) == 2
    printed = capsys.readouterr()
    assert "verify     mine:build is a model that nobody here has seen" in printed.out
    assert f"is {'wrong' if verdict == 'wrong' else 'not proved'}, and nothing was started" in printed.err
    assert ("model.reduced" in printed.err) is (verdict == "inconclusive")
    assert (made, started) == ([verdict], [])
    assert not (folder / "run" / FILE).exists()
    assert main(["train", "run.yaml", "--check", check, "--verify", "never"]) == 0
    assert (made, started) == ([verdict], [2])


def test_a_restart_pays_again_only_for_what_changed(
    folder: Path, proofs: Any, started: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    made = proofs("proved")
    run = ["train", "run.yaml", "--check", "False"]

    def start(*flags: str) -> str:
        assert main([*run, *flags]) == 0
        return capsys.readouterr().out

    assert "proved: loss and 12 gradients" in start()
    assert "was proved at tp=2 when the run was started before" in start("--train.steps", "5", "--train.lr", "1e-4")
    assert "was proved" in start("--verify", "always")
    assert len(made) == 1

    (folder / "mine_layers.py").write_text(LAYERS + "# another file of the user's, which the builder's file imports\n")
    assert "the model or its source changed since the proof in run/proof.json" in start()
    Plan(gpt_plan().modules, name="renamed").save(folder / "plan.yaml")
    assert "the plan changed" in start()
    assert "the config changed" in start("--data.seq_len", "32")
    assert "the plan changed" not in start("--mesh.tp", "4"), "the config did"
    kept = json.loads((folder / "run" / FILE).read_text())
    kept["depends"]["torch"] = "2.11.0"
    (folder / "run" / FILE).write_text(json.dumps(kept))
    assert "torch changed" in start("--mesh.tp", "4")
    assert "was proved" in start("--mesh.tp", "4")
    (folder / "run" / FILE).write_text("{}")
    assert "proved: " in start("--mesh.tp", "4")
    assert len(made) == 7
    assert started == [2] * 6 + [4] * 4


def test_the_model_itself_counts_whatever_file_its_sizes_come_from(folder: Path) -> None:
    tree = yaml.safe_load((folder / "run.yaml").read_text())
    config: RunConfig = parse_config(tree)
    model = build_source(config.model, 0).model
    builder = imported("mine:build", "model")
    before = dependencies(config, model, gpt_plan(), builder)
    assert dependencies(config, model, gpt_plan(), builder) == before, "nothing random"
    assert dependencies(config, build_source(config.model, 1).model, gpt_plan(), builder) == before, "no values"
    sys.modules["mine_layers"].__version__ = "2"  # type: ignore[attr-defined]
    assert dependencies(config, model, gpt_plan(), builder) != before, "another version of the package"
    del sys.modules["mine_layers"].__version__
    model.blocks[0].scale = 2.0  # type: ignore[index,union-attr,assignment]
    assert {key for key, value in dependencies(config, model, gpt_plan(), builder).items() if value != before[key]} == {
        "model"
    }
    model.head.weight.requires_grad_(False)  # type: ignore[union-attr,operator]
    kept = KeptProof(folder / "run", lambda: before)
    assert not kept.find(print)
    kept.keep(Report("proved", 2, "local", 12, 1e-9, None, 0.1))
    assert kept.find(print)
    assert not KeptProof(folder / "run", lambda: before | {"colrow": "another"}).find(print)


@pytest.mark.exhaustive
def test_the_first_rank_proves_in_a_child_and_finds_the_proof_again(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = parse_config(yaml.safe_load((folder / "run.yaml").read_text()) | {"check": False})
    plan_check.check_plan_apart(config, gpt_plan())
    assert "is verified at tp=2, while the other ranks wait" in (printed := capfd.readouterr().out)
    assert "proved: loss and 12 gradients" in printed
    plan_check.check_plan_apart(config, gpt_plan())
    assert "was proved" in (printed := capfd.readouterr().out)
    assert "is verified" not in printed
    assert not torch.distributed.is_initialized()
