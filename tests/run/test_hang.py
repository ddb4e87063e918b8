"""When a run hangs, by which rank, and what is said: on reports made up here, by a clock that is a number."""

from __future__ import annotations

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colrow.config_sections import TrainSection
from colrow.run import hang_guard
from colrow.run.hang import Hang, HangWatch, awaited, limits_of
from colrow.run.hang_guard import LauncherGuard
from colrow.run.hang_record import FOLDER, write_for_silent
from colrow.run.heartbeat import (
    ENDED,
    REPORT_FILE,
    Heartbeat,
    RankReport,
    Reporter,
    _work_of_children,
    last_collective,
)

LIMITS = limits_of(TrainSection(steps=1, global_batch=1, micro_batch=1, lr=1.0, hang_timeout=100.0))


def report(rank: int, tick: int, step: int, phase: str = "training", issued: int = 0, **more: Any) -> RankReport:
    groups = {"0": [issued, more.pop("completed", issued)]}
    return RankReport(rank, 100 + rank, "elsewhere", tick, phase, step, step, groups, **more)


class Clock:
    """Two ranks whose reports come once a second; `play` lets seconds pass."""

    def __init__(self) -> None:
        self.now = 0.0
        self.watch = HangWatch(LIMITS, range(2), interval=1.0, now=0.0)

    def play(self, seconds: int, at: Callable[[int], list[RankReport]], signalled: float | None = None) -> Hang | None:
        """`at(second)` gives the reports; returns the first hang, if there is one."""
        for _ in range(seconds):
            self.now += 1
            self.watch.take(at(int(self.now)), self.now)
            if hang := self.watch.hang(signalled):
                return hang
        return None


@pytest.fixture
def clock() -> Clock:
    clock = Clock()
    assert clock.play(50, lambda t: [report(0, t, t), report(1, t, t)]) is None
    return clock


def test_a_stopped_rank_is_named_within_the_timeout_of_its_last_beat(clock: Clock) -> None:
    hang = clock.play(200, lambda t: [report(0, t, 51, issued=9, completed=8), report(1, 50, 50)])
    assert hang is not None
    assert (hang.ranks, list(hang.silent)) == ([1], [1])
    assert clock.now - 50 <= 100
    assert hang.text().startswith("rank 1 hangs in training: no sign of life for ")
    assert "rank 0: training, 51 steps done, waits in a collective\nrank 1: training, 50" in hang.text()
    assert "process 101 on elsewhere does not respond" in hang.text()
    assert "raise train.hang_timeout" in hang.text()
    assert max(map(len, hang.text().splitlines())) <= 80


def test_a_run_in_which_one_rank_goes_on_for_a_while_counts_from_the_slowest(clock: Clock) -> None:
    """Without a collective in between: rank 0 computes a long step of its own."""
    hang = clock.play(200, lambda t: [report(0, t, min(t, 80)), report(1, 50, 50)])
    assert hang is not None
    assert clock.now <= 150


def test_ranks_that_all_answer_and_all_wait_are_all_named(clock: Clock) -> None:
    waiting = [lambda t, rank=rank: report(rank, t, 50, issued=9, completed=8) for rank in range(2)]
    hang = clock.play(200, lambda t: [each(t) for each in waiting])
    assert hang is not None
    assert hang.text().startswith("all 2 ranks hang in training")
    assert hang.silent == {}


def test_the_rank_outside_the_collective_is_the_awaited_one() -> None:
    reports = {r: report(r, 1, 4, issued=7, completed=6) for r in range(3)} | {3: report(3, 1, 4, issued=6)}
    assert awaited(reports) == [3]
    behind = {0: report(0, 1, 4, issued=7, completed=6), 1: report(1, 1, 4, issued=6, completed=5)}
    assert awaited(behind) == [1]


@pytest.mark.parametrize("phase", ["start", "compilation", "capture", "evaluation", "saving", "export"])
def test_a_phase_has_a_limit_of_its_own_for_all_ranks(clock: Clock, phase: str) -> None:
    """Rank 1 alone is in it, and rank 0 waits for it."""
    at = lambda t: [report(0, t, 50, issued=9, completed=8), report(1, t, 50, phase)]  # noqa: E731
    assert clock.play(int(LIMITS[phase]) - 20, at) is None
    hang = clock.play(100, at)
    assert hang is not None
    assert (hang.ranks, hang.phase) == ([1], phase)
    assert f"train.hang_limits.{phase}" in hang.text()


def test_the_time_of_another_phase_does_not_count_in_training(clock: Clock) -> None:
    """Rank 0 has waited for an evaluation of 500 s, and is not behind as soon as it is over."""
    assert clock.play(500, lambda t: [report(0, t, 50), report(1, t, 50, "evaluation")]) is None
    assert clock.play(85, lambda t: [report(0, t, 50), report(1, t, 50)]) is None
    assert clock.play(20, lambda t: [report(0, t, 50), report(1, t, 50)]) is not None


def test_a_step_that_was_slow_may_be_slow_again(clock: Clock) -> None:
    assert clock.play(80, lambda t: [report(0, t, 50), report(1, t, 50)]) is None
    assert clock.play(1, lambda t: [report(0, t, 51), report(1, t, 51)]) is None
    assert clock.play(200, lambda t: [report(0, t, 51), report(1, t, 51)]) is None
    assert clock.play(60, lambda t: [report(0, t, 51), report(1, t, 51)]) is not None


def test_the_watcher_itself_may_be_stopped(clock: Clock) -> None:
    clock.now += 3600  # such as by Ctrl-Z: the ranks' reports are old now, and nobody is to blame
    assert clock.play(1, lambda t: [report(0, 50, 50), report(1, 50, 50)]) is None
    assert clock.play(50, lambda t: [report(0, t, t), report(1, t, t)]) is None
    assert clock.play(200, lambda t: [report(0, t, 99), report(1, 50, 50)]) is not None


def test_after_a_signal_a_hung_run_is_known_within_seconds(clock: Clock) -> None:
    at = lambda t: [report(0, t, 51, issued=9, completed=8), report(1, 50, 50)]  # noqa: E731
    hang = clock.play(25, at, signalled=clock.now)
    assert hang is not None
    assert hang.ranks == [1]
    assert "hang_timeout" not in hang.text()


def test_after_a_signal_a_run_whose_link_is_dead_is_known_within_seconds(clock: Clock) -> None:
    assert clock.play(30, lambda t: [report(0, t, 50), report(1, t, 50)]) is None
    hang = clock.play(4, lambda t: [report(0, t, 50), report(1, t, 50)], signalled=clock.now)
    assert hang is not None


def test_after_a_signal_a_save_that_goes_on_may_take_its_time(clock: Clock) -> None:
    """Rank 0 writes, and rank 1 waits for it."""
    at = lambda t: [report(0, t, 51, "saving", work=t / 10), report(1, t, 51, "saving")]  # noqa: E731
    assert clock.play(600, at, signalled=clock.now) is None
    stuck = clock.now / 10
    at = lambda t: [report(0, t, 51, "saving", work=stuck), report(1, t, 51, "saving")]  # noqa: E731
    assert clock.play(25, at, signalled=50.0) is not None


def test_after_a_signal_ranks_that_are_only_starting_have_time() -> None:
    """A busy host: imports take 40 s, and the signal comes shortly before their end."""
    clock = Clock()
    assert clock.play(30, lambda t: []) is None
    assert clock.play(16, lambda t: [], signalled=30.0) is None
    at = lambda t: [report(rank, t, t) for rank in range(2)]  # noqa: E731
    assert clock.play(20, at, signalled=30.0) is None
    clock = Clock()
    hang = clock.play(60, lambda t: [], signalled=0.0)
    assert hang is not None
    assert clock.now <= 20  # and torchrun's agent needs some seconds more
    assert "has sent no report since it was started" in hang.text()


def test_ranks_that_have_ended_hang_nowhere(clock: Clock) -> None:
    assert clock.play(4000, lambda t: [report(0, 99, 60, ENDED), report(1, 99, 60, ENDED)]) is None


def test_nobody_is_named_where_the_timeout_is_null() -> None:
    train = TrainSection(steps=1, global_batch=1, micro_batch=1, lr=1.0, hang_timeout=None)
    watch = HangWatch(limits_of(train), range(2), now=0.0)
    for t in range(10_000):
        watch.take([], float(t))
    assert watch.hang() is None


ENTRY = {
    "collective_seq_id": 7, "pg_id": 0, "process_group": ["0", "default_pg"], "profiling_name": "gloo:all_reduce",
    "input_sizes": [[5]], "input_dtypes": ["Double"], "state": "scheduled",
}  # fmt: skip


def test_a_silent_ranks_record_is_what_others_know_that_it_had_issued(tmp_path: Path) -> None:
    entries = [{**ENTRY, "collective_seq_id": i} for i in range(5, 9)]
    (tmp_path / "rank-0.json").write_text(json.dumps({"collectives": entries}))
    last = write_for_silent(tmp_path, [report(1, 3, 50, issued=6)], "the launcher")
    assert last == {1: "all_reduce 6 of group 0 (default_pg), [5] Double"}
    written = json.loads((tmp_path / "rank-1.json").read_text())
    assert written["written_by"] == "the launcher"
    assert [entry["collective_seq_id"] for entry in written["collectives"]] == [5, 6]
    record = pickle.loads((tmp_path / "flight_recorder" / "rank_1").read_bytes())
    assert [entry["collective_seq_id"] for entry in record["entries"]] == [5, 6]
    assert last_collective([]) == ""


@pytest.mark.parametrize("full", [False, True])
def test_the_launcher_keeps_what_is_known_and_kills_a_stopped_rank(
    full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is stopped for real, and a rank that answers no more; also where the disk takes no record."""

    def written(*_: object) -> dict[int, str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if full:
        monkeypatch.setattr(hang_guard, "write_for_silent", written)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    train = TrainSection(steps=1, global_batch=1, micro_batch=1, lr=1.0, hang_timeout=0.4)
    launched = tmp_path / "launched" / "id" / "attempt_0" / "0"
    launched.mkdir(parents=True)
    guard = LauncherGuard(train, tmp_path / "run", 1)
    try:
        os.kill(child.pid, signal.SIGSTOP)
        host = os.uname().nodename
        (launched / REPORT_FILE).write_text(RankReport(0, child.pid, host, 1, "training", 3).to_json())
        end = time.monotonic() + 20
        while guard.hang is None and time.monotonic() < end:
            guard.look(tmp_path / "launched", None)
            time.sleep(0.01)
        assert guard.hang is not None
        assert child.wait(10) == -signal.SIGKILL
    finally:
        child.kill()
    assert f"rank 0: training, 3 steps done, process {child.pid} is stopped (SIGSTOP)" in guard.text(None)
    assert guard.text(signal.SIGTERM).startswith("SIGTERM came, and the run could not save:\nrank 0 hangs")
    folder = tmp_path / "run" / FOLDER
    kept = f"flight recorder and stacks: {folder}"
    assert (f"{kept}, not complete (No space left on device)\n" if full else f"{kept}\n") in guard.text(None)
    assert (folder / "message.txt").exists() == (not full)
    if full:
        return
    assert json.loads((folder / "rank-0.json").read_text())["written_by"] == "the launcher"


CHILD = """
from colrow.run.heartbeat import end_with_launcher
end_with_launcher()
print(1, flush=True)
import time; time.sleep(60)
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {CHILD!r}])
print(child.pid, flush=True)
child.wait()
"""


@pytest.mark.parametrize("is_linux", [True, False])
def test_a_rank_ends_with_its_launcher_even_where_it_is_stopped(is_linux: bool) -> None:
    """Without Linux's own way a stopped rank lives on."""
    child = CHILD if is_linux else f"import sys; sys.platform = 'darwin'{CHILD}"
    parent = PARENT.replace(repr(CHILD), repr(child))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    launcher = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, env=env)
    assert launcher.stdout is not None
    lines = sorted(launcher.stdout.readline().strip() for _ in range(2))
    pid = int(max(lines, key=len))
    if is_linux:
        os.kill(pid, signal.SIGSTOP)
    launcher.kill()
    launcher.wait()
    end = time.monotonic() + 20
    while _runs(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether the process exists, and is not only waiting for whoever takes its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_rank_reports_at_once_that_it_is_in_another_phase(tmp_path: Path) -> None:
    """An hour would be the interval: a rank that is stopped then must not have the previous phase's limit."""
    heartbeat = Heartbeat()
    with Reporter(heartbeat, 3, 3600.0, tmp_path):
        for phase in ("training", "saving"):
            heartbeat.enter(phase)
            end = time.monotonic() + 60
            while _phase(tmp_path) != phase and time.monotonic() < end:
                time.sleep(0.01)
            assert _phase(tmp_path) == phase
    assert _phase(tmp_path) == ENDED


def _phase(folder: Path) -> str:
    file = folder / REPORT_FILE
    return RankReport.from_json(file.read_bytes()).phase if file.exists() else ""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_compiler_that_a_rank_waits_for_is_a_sign_of_life() -> None:
    """`c++` starts another program, and only that computes."""
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'while True: pass'])"
    before = _work_of_children()
    child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        end = time.monotonic() + 60.0
        while _work_of_children() < before + 0.3:
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
