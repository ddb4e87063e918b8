"""A run that is killed inside its saves, export, tokenization and updates ends as one that nobody disturbed."""

from __future__ import annotations

import json
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from helpers.forked import Commands
from helpers.killed_runs import PIECES, faults
from helpers.variants import params

pytestmark = pytest.mark.distributed


FORMS = ["short", *(str(piece + 1) for piece in range(PIECES))]


@pytest.mark.parametrize("form", params(FORMS, lambda form: form != "short"))
def test_killed_where_it_hurts_the_run_ends_equal_bit_for_bit(form: str, tmp_path: Path, commands: Commands) -> None:
    program = ["python", str(Path(__file__).parents[1] / "helpers" / "killed_runs.py"), str(tmp_path), form]
    done = subprocess.run(program, env=commands.environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    kills = result["kills"]
    for kill in kills:
        assert kill["signals"], f"{kill['group']} {kill['event']} {kill['pattern']} was not reached: {kill['log']}"
        assert "damaged" not in kill["states"]
    assert [kill["group"] for kill in kills] == [fault.group for fault in faults(form)]
    assert any("unfinished" in kill["states"] for kill in kills)  # some of them were inside a save
    assert result["statuses"] == [0, 0, 0], result["text"]
    assert result["differences"] == []
    assert result["export"]
    assert not [name for name in result["left"] if name.startswith(".export")]


def test_the_pieces_are_40_kills_where_it_hurts() -> None:
    groups = Counter(fault.group for form in FORMS[1:] for fault in faults(form))
    assert groups == {"save": 15, "export": 5, "tokenization": 5, "update": 5, "anywhere": 10}
    assert {fault.group for fault in faults("short")} == {"save", "export", "tokenization", "update"}


@pytest.mark.exhaustive
def test_a_file_that_is_cut_off_is_refused_or_the_run_ends_equal(tmp_path: Path, commands: Commands) -> None:
    """And neither the clock nor the times of files decide anything."""
    program = ["python", str(Path(__file__).parents[1] / "helpers" / "damaged_runs.py"), str(tmp_path)]
    done = subprocess.run(program, env=commands.environment(), capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    assert len(results) > 15
    assert all(results[name]["statuses"] == [0, 0] for name in ("clock", "times"))
    ended = [name for name, result in results.items() if result["statuses"] == [0, 0]]
    assert any(name.endswith(".safetensors") for name in ended)  # the older checkpoint is used
    for name, result in results.items():
        assert result["differences"] == [], name
        assert "Traceback" not in result["log"], name
        assert 2 in result["statuses"] or name in ended, (name, result)
