"""Which of several failures is shown, and how a rank tells a stop from a loss."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from colrow.run.launch import first_failure, write_error
from colrow.run.stop import PID_FILE, StopRequest, another_rank_failed


def failure(
    folder: Path, rank: int, status: int, text: str = "", when: float = 0.0, users: bool = False
) -> ProcessFailure:
    file = folder / f"{rank}.json"
    if text:
        write_error(file, text, when, 2 if users else 1)
    return ProcessFailure(local_rank=rank, pid=1000 + rank, exitcode=status, error_file=str(file))


def test_the_earliest_error_is_shown(tmp_path: Path) -> None:
    found = first_failure(
        {
            0: failure(tmp_path, 0, 1, "Traceback: connection lost", 100.9),
            1: failure(tmp_path, 1, 1, "Traceback: the cause", 100.2),
            2: failure(tmp_path, 2, -signal.SIGTERM),
        }
    )
    assert (found.rank, found.status) == (1, 1)
    assert found.text == "rank 1 failed\nTraceback: the cause"


def test_a_users_error_is_shown_bare(tmp_path: Path) -> None:
    found = first_failure({1: failure(tmp_path, 1, 2, "train.lr is too high", 5.0, users=True)})
    assert (found.text, found.status) == ("train.lr is too high", 2)


def test_a_killed_rank_is_the_cause_of_what_others_say(tmp_path: Path) -> None:
    found = first_failure(
        {0: failure(tmp_path, 0, 1, "connection lost", 1.0), 1: failure(tmp_path, 1, -signal.SIGKILL)}
    )
    assert (found.rank, found.status) == (1, 1)
    assert "rank 1 was killed by SIGKILL" in found.text


def test_a_signal_is_a_request(tmp_path: Path) -> None:
    with StopRequest(None) as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def ranks(tmp_path: Path) -> list[Path]:
    folders = [tmp_path / str(rank) for rank in range(2)]
    for folder in folders:
        folder.mkdir()
    return folders


def test_a_neighbour_is_lost_when_it_left_an_error_or_is_gone(ranks: list[Path]) -> None:
    mine, other = ranks
    assert not another_rank_failed(mine)  # it has not begun yet
    (other / PID_FILE).write_text(str(os.getpid()))
    assert not another_rank_failed(mine)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (other / PID_FILE).write_text(str(ended.pid))
    assert another_rank_failed(mine)
    (other / PID_FILE).unlink()  # it has ended well
    assert not another_rank_failed(mine)
    write_error(other / "error.json", "text", 1.0, 1)
    assert another_rank_failed(mine)


STUCK = """
import sys, threading
from pathlib import Path
from colrow.run.stop import StopRequest
with StopRequest(Path(sys.argv[1])):
    print("in", flush=True)
    lock = threading.Lock(); lock.acquire()
    while True:
        lock.acquire(timeout=60)  # stands for a collective: no line of Python runs
"""


def test_a_stuck_rank_ends_at_once_when_its_neighbour_failed(ranks: list[Path]) -> None:
    mine, other = ranks
    write_error(other / "error.json", "text", 1.0, 1)
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", STUCK, str(mine)], stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 1
