"""The clock of a start-up: its parts add up over launcher and rank, and are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from colrow.run import startup


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(startup.time, "time", lambda: now[0])
    yield now
    startup._last = None


def test_parts_of_launcher_and_rank_add_up(clock: list[float], tmp_path: Path) -> None:
    startup.begin()
    clock[0] = 103.0
    startup.mark("imports")
    clock[0] = 104.0
    startup.mark("data")
    reading = startup.reading()
    clock[0] = 106.0
    startup.begin()  # the rank's own, of what it does on standby
    startup.mark("nothing that anybody waits for")
    clock[0] = 110.0
    startup.begin(reading)
    startup.mark("imports of ranks")
    clock[0] = 112.0
    startup.mark("steps")
    clock[0] = 115.0
    startup.mark("compile")
    clock[0] = 116.0
    text = startup.finish(tmp_path)
    assert text == (
        "16.0 s from the command to here: imports 3.0, data 1.0, imports of ranks 6.0, steps 3.0, compile 3.0"
    )
    kept = json.loads((tmp_path / startup.FILE).read_text())
    assert kept["seconds"] == 16.0
    assert sum(kept["parts"].values()) == 16.0
    assert startup.finish(tmp_path) is None  # said once


def test_without_a_command_nothing_is_measured(clock: list[float], tmp_path: Path) -> None:
    startup._last = None
    startup.mark("weights")
    assert startup.reading() is None
    assert startup.finish(tmp_path) is None
    assert not list(tmp_path.iterdir())
