"""A restart derives and checks again only where what that depends on has changed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colrow.config import RunConfig, parse_config
from colrow.errors import PlanError
from colrow.models.build import build_source
from colrow.plans.plan import Plan
from colrow.run import plan_check, preflight
from colrow.run.decision import Decision
from colrow.run.kept_start import FILE

AGAIN = "check      as at the last start: nothing that it depends on has changed"


def config(folder: Path, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "model": {"shape": "laptop", "layers": 2},
        "data": {"corpus": "stdlib", "seq_len": 64, "tokenizer": {"vocab_size": 512}},
        "mesh": {"tp": 2},
        "plan": "llama",
        "train": {"steps": 2, "global_batch": 2, "micro_batch": 2, "lr": 1e-3, "warmup_steps": 1},
        "device": "cpu",
    }
    return parse_config(tree | changes)


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The decisions that were made, with what they say next: `decided.answer`."""

    class Decided(list[Any]):
        answer = Decision((), flops_split=1.0)
        says: tuple[str, ...] = ()

    made = Decided()

    def decide(*args: Any, start: Any, **options: Any) -> Decision:
        made.append(options)
        for line in made.says:
            start.say(line)
        return made.answer

    monkeypatch.setattr(plan_check, "decide", decide)
    return made


def check(config: RunConfig, plan: Plan | None = None, judgement: Any = None) -> list[str]:
    source = build_source(config.model, config.run.seed)
    return plan_check.check_plan(config, source, plan or Plan.preset("llama"), judgement)


def test_a_check_is_made_once(tmp_path: Path, decided: Any) -> None:
    first = check(config(tmp_path))
    assert AGAIN not in first
    assert check(config(tmp_path)) == [AGAIN, *first]
    train = {"steps": 9, "global_batch": 4, "micro_batch": 2, "lr": 1e-4, "warmup_steps": 1}
    assert check(config(tmp_path, train=train)) == [AGAIN, *first], "of no account to the check"
    assert len(decided) == 1
    for changes in (
        {"train": train | {"micro_batch": 4}},
        {"mesh": {"tp": 4}},
        {"model": {"shape": "laptop", "layers": 3}},
        {"verify": "never"},
        {"check": False, "verify": "always"},
    ):
        before = len(decided)
        assert AGAIN not in check(config(tmp_path, **changes))
        assert len(decided) == before + 1, changes
        assert AGAIN in check(config(tmp_path, **changes))
    assert AGAIN not in check(config(tmp_path), Plan.preset("llama-fast"))
    (tmp_path / "run" / FILE).write_text("[]")
    assert AGAIN not in check(config(tmp_path))


def test_what_a_derivation_judged_is_a_check(tmp_path: Path, decided: Any) -> None:
    first = check(config(tmp_path), judgement=object())
    assert check(config(tmp_path)) == [AGAIN, *first]
    assert check(config(tmp_path), judgement=object()) == first, "derived again, so judged again"
    assert len(decided) == 2


def test_a_refusal_and_a_proof_are_not_kept_as_a_check(tmp_path: Path, decided: Any) -> None:
    decided.answer = Decision((), refusal="no")
    for _ in range(2):
        with pytest.raises(PlanError, match="no"):
            check(config(tmp_path))
    decided.answer, decided.says = Decision(()), ("proved",)  # the proof has a file of its own
    for _ in range(2):
        assert AGAIN not in check(config(tmp_path))
    assert len(decided) == 4


def test_a_plan_is_derived_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def derive(model: Any, tp: int, **options: Any) -> Any:
        made.append(tp)
        return SimpleNamespace(plan=lambda: Plan.preset("llama-fast"), judgement=None)

    monkeypatch.setattr(preflight, "derive_judged", derive)
    derived = {"plan": "derive-fast"}
    first = preflight.check(config(tmp_path, **derived)).plan
    assert first.fingerprint is not None
    assert preflight.check(config(tmp_path, **derived)).plan == first
    fp8 = {"steps": 2, "global_batch": 2, "micro_batch": 2, "lr": 1e-3, "warmup_steps": 1, "fp8": "tensorwise"}
    with_fp8 = preflight.check(config(tmp_path, **derived, train=fp8)).plan
    assert with_fp8.modules == first.with_fp8("tensorwise").modules
    assert made == [2]
    for number, changes in enumerate(
        (
            {"plan": "derive"},
            derived | {"mesh": {"tp": 4}},
            derived | {"derive": {"keep_whole": ["*.mlp"]}},
            derived | {"model": {"shape": "laptop", "layers": 3}},
        )
    ):
        preflight.check(config(tmp_path, **changes))
        assert len(made) == number + 2, changes
    preflight.choose_plan(config(tmp_path / "bench", **derived), build_source(config(tmp_path).model, 0).model)
    assert not (tmp_path / "bench").exists(), "a benchmark leaves nothing in a run's folder"
