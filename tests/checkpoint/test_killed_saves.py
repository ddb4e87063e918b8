"""A save that is killed at any moment leaves a complete checkpoint, and nothing that is taken for one."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from helpers.forked import Commands


def run(commands: Commands, folder: Path, step: int, how: str) -> list[dict[str, Any]]:
    program = ["python", str(Path(__file__).parents[1] / "helpers" / "killed_saves.py"), str(folder), str(step), how]
    done = subprocess.run(program, env=commands.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    "step",
    [pytest.param(2, id="the next step"), pytest.param(1, id="the same step again", marks=pytest.mark.exhaustive)],
)
def test_a_kill_at_any_change_to_the_disk_leaves_a_whole_checkpoint(
    commands: Commands, tmp_path: Path, step: int
) -> None:
    *killed, finished = run(commands, tmp_path, step, "atomic")
    assert len(killed) > 20  # writes, flushes, renames, removals
    for result in killed:
        assert result["signal"] == signal.SIGKILL
        assert "damaged" not in result["states"]
        assert result["latest"] in {1, step}
        assert result["right"]
        assert result["after"] == ["step-3"]
    assert any("unfinished" in result["states"] for result in killed)
    assert {result["latest"] for result in killed} == {1, step}
    assert finished["exit"] == 0
    assert finished["names"] == [f"step-{step}"]
    assert finished["right"]


def test_a_save_under_the_final_name_would_be_seen(commands: Commands, tmp_path: Path) -> None:
    killed = run(commands, tmp_path, 2, "naive")
    assert any("damaged" in result["states"] for result in killed)
