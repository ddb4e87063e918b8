"""Forked commands are what they stand for: output, folder, exit status, signals, and what they start."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from helpers.forked import Commands

SHOW = "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['WORD'], 'torch' in sys.modules)"
CHILD = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', 'import sys; sys.exit(5)']))"
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"


def run(commands: Commands, folder: Path, *command: str) -> tuple[int, str, str]:
    environment = commands.environment(WORD="set")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_a_command_runs_as_it_is_started(commands: Commands, tmp_path: Path) -> None:
    assert run(commands, tmp_path, "python", "-c", SHOW, "a b") == (0, f"['a b'] {tmp_path} set True\n", "")
    (tmp_path / "show.py").write_text(SHOW, encoding="utf-8")
    assert run(commands, tmp_path, "python", "show.py", "-x")[1] == f"['-x'] {tmp_path} set True\n"
    assert run(commands, tmp_path, "python", "-m", "show")[1] == f"[] {tmp_path} set True\n"
    assert "show a plan" in run(commands, tmp_path, "colrow", "--help")[1]
    assert "nproc-per-node" in run(commands, tmp_path, "torchrun", "--help")[1]


@pytest.mark.parametrize(
    ("program", "status", "error"),
    [
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('why')", 1, "why\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import os; os.kill(os.getpid(), 9)", -9, ""),
        (CHILD, 5, ""),
    ],
)
def test_a_command_ends_with_its_status(
    commands: Commands, tmp_path: Path, program: str, status: int, error: str
) -> None:
    got = run(commands, tmp_path, "python", "-c", program)
    assert got[0] == status
    assert got[2].endswith(error)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_reaches_the_command(commands: Commands, tmp_path: Path, number: int) -> None:
    process = subprocess.Popen(
        ["python", "-c", SLEEP], env=commands.environment(), stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(10) != 0
    end = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < end, "the command outlives its client"
        time.sleep(0.01)
