"""A finite step that lies far from those before it is named and kept; noise, a falling loss and a new level are not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colrow.run.jumps import LEAST, Jumps
from colrow.run.nonfinite import FILE, MOST_LINES, DivergedError, NonfiniteSteps
from helpers.runs import a_run


def jumps(losses: Iterable[float], norms: Iterable[float] | None = None) -> list[int]:
    """The steps that are jumps."""
    losses = list(losses)
    found, seen = Jumps(), zip(losses, norms or [1.0] * len(losses), strict=True)
    return [i for i, (loss, norm) in enumerate(seen) if found.examine({"loss": loss, "grad_norm": norm})]


def test_a_loss_that_falls_from_ten_to_two_with_noise_never_jumps() -> None:
    assert jumps(2 + 8 * math.exp(-i / 50) + 0.3 * math.sin(7 * i) for i in range(400)) == []


def test_a_loss_near_zero_that_doubles_is_no_jump() -> None:
    assert jumps([0.01] * 30 + [0.03] * 3 + [0.01] * 10) == []


def test_one_bad_step_is_one_jump() -> None:
    assert jumps([3.0] * 40 + [9.0] + [3.0] * 40) == [40]
    assert jumps([3.0] * 81, [1.0] * 50 + [11.0] + [1.0] * 30) == [50]
    assert jumps([3.0] * 81, [1.0] * 50 + [9.0] + [1.0] * 30) == []


def test_the_first_steps_are_compared_with_nothing() -> None:
    assert jumps([3.0] * (LEAST - 1) + [9.0] + [3.0] * 5) == []
    assert jumps([3.0] * LEAST + [9.0] + [3.0] * 5) == [LEAST]


def test_a_level_that_lasts_becomes_the_usual_one() -> None:
    found = jumps([3.0] * 40 + [9.0] * 60)
    assert found == list(range(40, 40 + len(found)))
    assert len(found) <= 32


@pytest.fixture
def said() -> list[str]:
    return []


def steps_of(folder: Path, said: list[str], writes: bool = True) -> NonfiniteSteps:
    checkpoints: Any = SimpleNamespace(latest=lambda: None)
    config = a_run(folder, "run")
    config.run.dir.mkdir(parents=True, exist_ok=True)
    return NonfiniteSteps(config, checkpoints, 0, writes, said.append)


def record(step: int, loss: float) -> dict[str, Any]:
    return {"step": step, "loss": loss, "grad_norm": 1.0, "lr": 1e-3, "tokens": 128 * step}


def test_a_jump_is_printed_kept_and_counted_with_its_batch(tmp_path: Path, said: list[str]) -> None:
    steps = steps_of(tmp_path, said)
    records = [steps.examine(record(i, 9.0 if i in (20, 25) else 3.0), 4 * (i - 1)) for i in range(1, 31)]
    assert [r["step"] for r in records if "jump" in r] == [20, 25]
    assert [r for r in records if "jump" not in r] == [record(i, 3.0) for i in range(1, 31) if i not in (20, 25)]
    kept = [json.loads(line) for line in (tmp_path / "run" / FILE).read_text().splitlines()]
    assert [(entry["step"], entry["position"], entry["action"]) for entry in kept] == [
        (20, 76, "jump"),
        (25, 96, "jump"),
    ]
    assert steps.jumped == 2
    assert said[0].splitlines() == [
        "jump       step 20: loss 9 after a median of 3;",
        "           its batch is the one after 76 sequences",
    ]


def test_few_jumps_are_printed_and_one_rank_writes(tmp_path: Path, said: list[str]) -> None:
    steps = steps_of(tmp_path, said, writes=False)
    for i in range(1, 200):
        steps.examine(record(i, 9.0 if i > 20 and i % 3 == 0 else 3.0), 4 * (i - 1))
    assert steps.jumped > MOST_LINES == len(said)
    assert not (tmp_path / "run" / FILE).exists()


def test_steps_that_are_run_again_are_kept_once(tmp_path: Path, said: list[str]) -> None:
    """A run that has a checkpoint of step 21 and stopped at step 28; its last line was cut off."""
    steps, path = steps_of(tmp_path, said), tmp_path / "run" / FILE
    steps.go_on_after(0)
    assert not path.exists()
    for i in range(1, 28):
        steps.examine(record(i, 9.0 if i in (20, 25) else 3.0), 4 * (i - 1))
    with pytest.raises(DivergedError):
        steps.examine(record(28, math.nan), 4 * 27)
    path.write_text(path.read_text() + '{"step": 2')
    steps_of(tmp_path, said, writes=False).go_on_after(21)
    assert path.read_text().endswith('{"step": 2')
    steps_of(tmp_path, said).go_on_after(21)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(entry["step"], entry["action"]) for entry in kept] == [(20, "jump"), (28, "stop")]
    assert math.isnan(kept[1]["loss"])
