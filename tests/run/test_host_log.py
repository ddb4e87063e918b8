"""The log of a host: what a rank has written to stderr is there, however the rank ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from colrow.run.host_log import FOLDER, HostLog, failed_rank, last_lines

WRITES = """
import os, sys
from pathlib import Path
from colrow.run.host_log import HostLog
log = HostLog(Path(sys.argv[1]), int(sys.argv[2]))
log.copy_stderr()
for i in range(40):
    print("line", i, file=sys.stderr)
os.write(2, b"unfinished line of C++")
exec(sys.argv[3])
"""


def run_rank(folder: Path, rank: int, end: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITES, str(folder), str(rank), end]
    return subprocess.run(command, env=env, capture_output=True, text=True, start_new_session=True)


@pytest.mark.parametrize(
    ("end", "status"),
    [
        ("log.close()", 0),
        ("os.abort()", -signal.SIGABRT),
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("os.killpg(0, 9)", -signal.SIGKILL),
    ],
)
def test_what_a_rank_has_written_is_on_stderr_and_in_its_hosts_log(tmp_path: Path, end: str, status: int) -> None:
    ended = run_rank(tmp_path, 3, end)
    assert ended.returncode == status
    assert ended.stderr.splitlines() == [*(f"line {i}" for i in range(40)), "unfinished line of C++"]
    assert last_lines(tmp_path, 3)[-2:] == ["line 39", "unfinished line of C++"]
    assert len(last_lines(tmp_path, 3)) == 12
    assert last_lines(tmp_path, 4) == []
    assert (tmp_path / FOLDER / f"{socket.gethostname()}.log").exists()


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("../precious"), lambda path: path.symlink_to("no")]
)
def test_a_log_that_is_no_plain_file_is_left_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    (tmp_path / "precious").write_text("content\n")
    (tmp_path / FOLDER).mkdir()
    make(tmp_path / FOLDER / f"{socket.gethostname()}.log")
    log = HostLog(tmp_path, 0)
    log.write("text")
    log.copy_stderr()
    log.close()
    assert (tmp_path / "precious").read_text() == "content\n"
    assert last_lines(tmp_path, 0) == []


def test_the_last_lines_are_of_the_last_start(tmp_path: Path) -> None:
    for text in ("first", "second"):
        log = HostLog(tmp_path, 0)
        log.write(text)
    HostLog(tmp_path, 1).write("of another rank")
    assert last_lines(tmp_path, 0) == ["second"]


def test_the_rank_that_failed_first_is_found_on_any_host(tmp_path: Path) -> None:
    now = time.time()
    log = HostLog(tmp_path, 0)
    log.write_failure(now + 1, "connection lost")
    (tmp_path / FOLDER / "b.log").write_text(f"rank 2| begins\nrank 2| failed at {now:.1f}\nrank 2| the cause\n")
    assert failed_rank(tmp_path, now - 60) == (2, "b")
    assert last_lines(tmp_path, 2)[-1] == "the cause"
    assert failed_rank(tmp_path, now + 60) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    log = HostLog(tmp_path / "file", 0)
    log.write("text")
    log.copy_stderr()
    log.close()
