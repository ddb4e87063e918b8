"""Exit statuses that `docs/guide/exit-codes.md` lists, of the processes that a person starts."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from colrow.cli import main
from colrow.cli.ranks import user_error
from colrow.run.launch import Ended, RankFailure
from colrow.verifying.backends import _interrupts_blocked


@pytest.mark.parametrize(
    ("ended", "status"),
    [
        (Ended(), 0),
        (Ended(RankFailure(1, "sick", 1)), 1),
        (Ended(RankFailure(0, "a wrong config", 2)), 2),
        (Ended(signal=signal.SIGTERM), 143),
        (Ended(RankFailure(1, "lost", 1), signal.SIGINT), 130),
    ],
)
def test_a_run_ends_with_the_status_of_its_cause(ended: Ended, status: int) -> None:
    assert ended.status == status


def test_a_closed_pipe_is_quiet() -> None:
    """With `import torch` forbidden, to be quick: the listing needs none."""
    code = "import sys; sys.modules['torch'] = None; from colrow.cli import main; sys.exit(main(['--help']))"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stderr is not None
    child.stdout.close()  # before anything is written
    assert child.stderr.read() == b""
    assert child.wait() == 128 + signal.SIGPIPE


def test_ctrl_c_in_a_verb_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("colrow.cli.checkpoints.main", interrupted)
    assert main(["checkpoints", "x"]) == 130
    assert capsys.readouterr().err == "colrow checkpoints: stopped by SIGINT\n"


@pytest.mark.parametrize(
    ("ending", "lines"),
    [
        ("exec('stop()')", "colrow plan: stopped by {name}\n"),  # Python keeps in mind what went through exec
        ("\ntry: stop()\nexcept KeyboardInterrupt: return 0", ""),
        ("\ntry: stop()\nexcept KeyboardInterrupt: raise ImportError('twice')", "colrow: stopped by {name}\n"),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_whatever_a_library_makes_of_it(
    number: signal.Signals, ending: str, lines: str, tmp_path: Path
) -> None:
    code = f"""
import os, signal, sys, types
sys.modules["torch"] = None
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
import colrow.__main__ as command

def stop():
    os.kill(os.getpid(), {int(number)})

def main(argv):
    {ending.replace(chr(10), chr(10) + "    ")}

globals()["stop"] = stop
sys.modules["colrow.cli.plan"] = types.SimpleNamespace(main=main)
sys.argv = ["colrow", "plan"]
command.run()
"""
    (tmp_path / "probe.py").write_text(code)  # only of a module Python asks at exit what went through exec
    command = [sys.executable, "-m", "probe"]
    done = subprocess.run(command, cwd=tmp_path, timeout=60, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (128 + number, lines.format(name=number.name))


@pytest.fixture
def heeding_ctrl_c() -> Iterator[None]:
    """As in a terminal: a shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeding_ctrl_c")
def test_processes_of_verify_start_without_ctrl_c() -> None:
    show = "import signal; print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []))"

    def is_blocked() -> str:
        return subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, timeout=60).stdout.strip()

    with _interrupts_blocked():
        within = is_blocked()
    assert (within, is_blocked()) == ("True", "False")
    done = []
    with pytest.raises(KeyboardInterrupt), _interrupts_blocked():
        done.append(signal.raise_signal(signal.SIGINT))
    assert done == [None]  # it came when the block had ended


@pytest.mark.parametrize(("module", "is_named"), [("torch._inductor.exc", True), ("mine", False)])
def test_a_full_cache_of_the_compiler_is_named(module: str, is_named: bool) -> None:
    """Its errors carry the system's as text."""
    error = type("InductorError", (RuntimeError,), {"__module__": module})(
        "OSError: [Errno 28] No space left on device"
    )
    text = user_error(error)
    assert (text is not None) == is_named
    assert text is None or "TORCHINDUCTOR_CACHE_DIR" in text
