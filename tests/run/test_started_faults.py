"""Runs that hang or lose their launcher, as a person starts them: what ends, when, and what is said.

With `--device cuda` their ranks are on GPUs, under NCCL.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers.forked import Commands
from helpers.runs import write_text
from helpers.started import Run, write_config

pytestmark = pytest.mark.distributed
TRAIN = ("colrow", "train", "tiny.yaml")
STEP, STARTED = "^step +1/", "^batch +"
"""What a run prints after its first step, and before it."""
TORCHRUN = ("torchrun", "--nproc-per-node", "2", "-m", *TRAIN)


@pytest.fixture
def start(tmp_path: Path, commands: Commands, request: pytest.FixtureRequest) -> Iterator[Callable[..., Run]]:
    write_text(tmp_path)
    write_config(tmp_path, "tiny", {"shape": "laptop", "layers": 1})
    device = request.config.getoption("--device")
    runs: list[Run] = []

    def begin(*command: str, hang_timeout: float = 120.0, until: str = STEP) -> Run:
        environment = commands.environment(TMPDIR=str(tmp_path))
        flags = ["--train.hang_timeout", str(hang_timeout), "--train.log_every", "1000", "--check", "false"]
        flags += ["--device", device]
        runs.append(Run(tmp_path, environment, *command, *flags))
        runs[-1].wait_for(until)
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def writers(folder: Path) -> list[str]:
    """Who wrote the record of each rank, once all that belongs to one is there."""
    hang = folder / "runs/tiny/hang"
    ranks = [json.loads((hang / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for each in ranks:
        assert {"collective_seq_id", "profiling_name", "input_sizes"} <= each["collectives"][-1].keys()
    assert {path.name for path in (hang / "flight_recorder").iterdir()} == {"rank_0", "rank_1"}
    assert "loop.py" in (hang / "rank-0.stacks.txt").read_text()
    return [each["written_by"] for each in ranks]


def gone(ranks: list[int], within: float) -> bool:
    """Whether all processes have ended after so many seconds."""
    end = time.monotonic() + within
    while alive := any(Path(f"/proc/{pid}").exists() for pid in ranks):
        if time.monotonic() >= end:
            break
        time.sleep(0.1)
    return not alive


def test_a_stopped_rank_is_named_within_the_timeout(
    tmp_path: Path, start: Callable[..., Run], request: pytest.FixtureRequest
) -> None:
    run = start(*TRAIN, hang_timeout=6.0)
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    stopped = time.monotonic()
    assert run.end() == 1
    assert time.monotonic() - stopped < 12  # some seconds for a busy machine
    assert "error: rank 1 hangs in training: no sign of life for " in run.text
    text = " ".join(run.text.split())  # lines are folded at 80 columns
    assert f"process {ranks[1]} is stopped (SIGSTOP), last collective all_" in text
    assert "steps done, waits in all_" in text
    assert writers(tmp_path) == ["the rank", "the launcher"]
    assert gone(ranks, 0.0 if request.config.getoption("--device") == "cpu" else 30.0)  # the driver lets go of them


STOPS = """
import os
import signal
import time
from dataclasses import replace

from colrow.models.llama import Llama
from colrow.models.shapes import shape


def stop() -> None:
    time.sleep(1.0)  # the report of the phase is a thread's
    os.kill(os.getpid(), signal.SIGSTOP)


def build() -> Llama:
    model = Llama(replace(shape("laptop"), num_hidden_layers=1))
    if os.environ.get("RANK") == "1":
        model.register_forward_pre_hook(lambda module, args: None if module.training else stop())
    return model


def build_saving() -> Llama:
    if os.environ.get("RANK") == "1":
        fsync = os.fsync
        os.fsync = lambda fd: stop() if "checkpoints" in os.readlink(f"/proc/self/fd/{fd}") else fsync(fd)
    return Llama(replace(shape("laptop"), num_hidden_layers=1))


def build_compiling() -> Llama:
    if os.environ.get("RANK") == "1":
        import torch._inductor.compile_fx as inductor

        inductor.compile_fx = lambda *args, **options: stop()
    return Llama(replace(shape("laptop"), num_hidden_layers=1))


def build_capturing() -> Llama:
    from colrow.run.loop import Loop  # CUDA graphs are captured on GPUs alone: the loop is told that they are

    Loop._captures = lambda loop, steps: steps >= 2
    model = Llama(replace(shape("laptop"), num_hidden_layers=1))
    if os.environ.get("RANK") == "1":
        steps = []
        model.register_forward_pre_hook(lambda module, args: steps.append(1) or (stop() if len(steps) == 4 else None))
    return model


def build_tokenizing() -> Llama:
    if os.environ.get("RANK") == "1":
        import colrow.data.prepare

        colrow.data.prepare.open_corpus = lambda *args: stop()
    return Llama(replace(shape("laptop"), num_hidden_layers=1))
"""


def stopping(build: str) -> list[str]:
    """Flags of a run whose rank 1 stops itself where the function says."""
    return f"--model.shape null --model.layers null --model.python stops:{build} --verify never".split()


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("phase", "build", "flags"),
    [
        ("evaluation", "build", "--eval.every 3"),
        ("saving", "build_saving", "--checkpoint.every 4"),
        ("compilation", "build_compiling", "--train.compile true"),
        ("capture", "build_capturing", ""),
    ],
)
def test_a_rank_that_stops_in_another_phase_is_named_by_its_limit(
    phase: str, build: str, flags: str, tmp_path: Path, start: Callable[..., Run]
) -> None:
    """The rank stops itself in the forward of an evaluation, when it flushes a data file of a checkpoint, when a block
    is compiled, or in a step that would capture a CUDA graph."""
    (tmp_path / "stops.py").write_text(STOPS)
    limit, until, hang_timeout = "6", STEP, 120.0
    if (
        phase == "compilation"
    ):  # of the other rank too, which takes longer; training's limit would count when it is done
        limit, until, hang_timeout = "40", STARTED, 20.0
    command = (*TRAIN, *stopping(build), *flags.split(), f"--train.hang_limits.{phase}", limit)
    run = start(*command, hang_timeout=hang_timeout, until=until)
    begun = time.monotonic()
    assert run.end() == 1
    assert time.monotonic() - begun < 100  # below train.hang_timeout
    assert f"error: rank 1 hangs in {phase}: no sign of life for " in run.text
    assert f"raise train.hang_limits.{phase} where the run is only slow" in " ".join(run.text.split())


@pytest.mark.exhaustive
def test_torchruns_ranks_name_the_one_that_hangs(tmp_path: Path, start: Callable[..., Run]) -> None:
    run = start(*TORCHRUN, hang_timeout=6.0)
    os.kill(run.ranks()[1], signal.SIGSTOP)
    stopped = time.monotonic()
    assert run.end() == 1
    assert time.monotonic() - stopped < 20
    root_cause = run.text.partition("Root Cause")[2]
    assert "rank 1 hangs in training" in root_cause
    assert writers(tmp_path) == ["the rank", "rank 0"]


@pytest.mark.exhaustive
def test_torchruns_ranks_name_the_one_that_hangs_in_tokenization(tmp_path: Path, start: Callable[..., Run]) -> None:
    """They watch each other from before it: the other rank has its tokens, and waits."""
    (tmp_path / "stops.py").write_text(STOPS)
    limits = ("--train.hang_limits.tokenization", "10", "--train.hang_limits.start", "9")
    run = start(*TORCHRUN, *stopping("build_tokenizing"), *limits, until="^disk ")
    assert run.end() == 1
    root_cause = run.text.partition("Root Cause")[2]
    assert "rank 1 hangs in tokenization: no sign of life for " in root_cause
    assert "rank 0: start, 0 steps done" in root_cause
    assert "raise train.hang_limits.tokenization where the run is only slow" in " ".join(root_cause.split())


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", [TRAIN, TORCHRUN], ids=["colrow", "torchrun"])
def test_sigterm_ends_a_hung_run_and_is_named(start: Callable[..., Run], command: tuple[str, ...]) -> None:
    run = start(*command)
    ranks = run.ranks()
    os.kill(ranks[0], signal.SIGSTOP)
    time.sleep(1.0)
    run.process.send_signal(signal.SIGTERM)
    asked = time.monotonic()
    status = run.end()
    assert time.monotonic() - asked < 30
    assert status == (143 if command is TRAIN else 1), run.text
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    if command is TRAIN:
        assert "SIGTERM came, and the run could not save:\nrank 0 hangs in training" in run.text
        assert "out of memory" not in run.text


@pytest.mark.exhaustive
def test_a_second_ctrl_c_ends_a_hung_run_and_says_where_it_was(start: Callable[..., Run]) -> None:
    run = start(*TRAIN)
    os.kill(run.ranks()[1], signal.SIGSTOP)
    time.sleep(1.0)
    run.process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    run.process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    assert run.end() == 130
    assert time.monotonic() - asked < 15
    assert "nothing of the steps since the last checkpoint is saved\nrank 0: training" in run.text
    assert "is stopped (SIGSTOP)" in run.text


@pytest.mark.exhaustive
@pytest.mark.parametrize("command", [TRAIN, TORCHRUN], ids=["colrow", "torchrun"])
def test_ranks_end_with_a_killed_launcher_though_one_is_stopped(
    tmp_path: Path, start: Callable[..., Run], command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With real processes: a forked command's parent is not who started it."""
    first = command[1:] if command is not TRAIN else ()
    module = ("torch.distributed.run", *first) if first else ("colrow", *TRAIN[1:])
    monkeypatch.delenv("PYTHON_EXEC", raising=False)
    run = start(sys.executable, "-m", *module)
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGSTOP)
    run.process.kill()
    assert gone(ranks, 30.0)
