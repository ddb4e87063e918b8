"""Ranks that start while their launcher still checks: they do nothing before its orders, and end without them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colrow.errors import ConfigError
from colrow.run import standby
from colrow.run.launch import Beside, Ended, launch, on_standby
from colrow.run.standby import Orders

ORDERS = Orders("digest", {"parts": {"imports": 1.5}, "last": 10.0})
RANK = """
import os, signal, time
from pathlib import Path
from colrow.cli.ranks import rank_folder
from colrow.run.standby import Standby
from colrow.run.stop import StopRequest

rank = os.environ["RANK"]
standby = Standby.begin()
Path("ready-" + rank).touch()
if standby is not None:
    orders = standby.wait()
    Path("plan-" + rank).write_text(orders.plan)
if Path("stay").exists():
    with StopRequest(rank_folder()):
        time.sleep(60)
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A rank that waits for its orders and writes down what they say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    (tmp_path / "rank.py").write_text(RANK)
    return ["rank.py"]


def files(name: str, count: int) -> bool:
    """Whether so many are there at least, within a minute."""
    end = time.monotonic() + 60
    while len(list(Path().glob(f"{name}-*"))) < count and time.monotonic() < end:
        time.sleep(0.02)
    return len(list(Path().glob(f"{name}-*"))) >= count


def test_ranks_go_on_with_their_orders(command: list[str]) -> None:
    with on_standby(command, 2) as ranks:
        assert files("ready", 2)
        assert not list(Path().glob("plan-*")), "nothing is done before the orders"
        assert ranks.run(orders=ORDERS) == Ended()
    assert [Path(f"plan-{rank}").read_text() for rank in (0, 1)] == ["digest"] * 2
    assert standby.VARIABLE not in os.environ
    assert launch(command, 1) == Ended(), "ranks that nobody keeps waiting need no orders"


def test_ranks_of_a_refused_run_end(command: list[str]) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="refused"), on_standby(command, 2) as ranks:
        raise ConfigError("refused")
    assert not ranks._agent.is_alive()
    assert ranks._agent.error is None, "no rank has failed"
    assert not list(Path().glob("plan-*"))
    assert time.monotonic() - began < standby._POLL_SECONDS + 10


@pytest.mark.parametrize("gone", ["folder", "launcher"])
def test_a_rank_ends_where_its_launcher_is_gone(gone: str, command: list[str], tmp_path: Path) -> None:
    def started(pid: int, folder: Path) -> int:
        environment = os.environ | {standby.VARIABLE: f"{pid}:{folder}", "RANK": "0"}
        return subprocess.run([sys.executable, *command], env=environment, timeout=60).returncode

    if gone == "folder":
        assert started(os.getpid(), tmp_path / "removed") == 1
    else:
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        assert started(dead.pid, tmp_path) == 1
    assert not list(Path().glob("plan-*"))


def test_the_first_orders_hold(tmp_path: Path) -> None:
    standby.give(tmp_path, ORDERS)
    standby.give(tmp_path, None)
    assert standby.Standby(os.getpid(), tmp_path).wait() == ORDERS


@pytest.mark.parametrize("when", ["while they run", "after they have failed"])
def test_what_refuses_a_run_beside_its_ranks_ends_them(command: list[str], when: str) -> None:
    def refuse() -> None:
        assert files("plan", 2 if when == "while they run" else 1)  # the first that fails may end the other before
        raise ConfigError("forecast: too large")

    if when == "while they run":
        Path("stay").touch()
    else:
        Path("rank.py").write_text(RANK + "raise MemoryError")
    began = time.monotonic()
    with pytest.raises(ConfigError, match="too large"), on_standby(command, 2) as ranks:
        ranks.run(orders=ORDERS, beside=Beside(refuse))
    assert not ranks._agent.is_alive()
    assert time.monotonic() - began < 30


def test_a_failure_is_that_of_the_ranks_where_nothing_refuses_the_run(command: list[str]) -> None:
    Path("rank.py").write_text(RANK + "raise MemoryError")
    done: list[Any] = []
    note: Callable[[], None] = lambda: done.append(None)  # noqa: E731
    with on_standby(command, 1) as ranks:
        ended = ranks.run(orders=ORDERS, beside=Beside(note))
    assert ended.failure is not None
    assert ended.status == 1
    assert done == [None]


def test_a_rank_listens_before_torch_is_imported() -> None:
    """And so does what reads a config: torch takes seconds."""
    show = "import sys; sys.modules['torch'] = None; import colrow.__main__, colrow.cli.train, colrow.config"
    assert subprocess.run([sys.executable, "-c", show], timeout=60).returncode == 0
