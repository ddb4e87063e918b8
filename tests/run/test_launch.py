"""`colrow train` as a user starts it: processes, signals, and how failures show."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colrow.train.metrics import read_metrics
from helpers.forked import Commands
from helpers.runs import write_text
from helpers.started import Run, write_config

pytestmark = pytest.mark.distributed

SICK = """
import os
from dataclasses import replace
from colrow.models.llama import Llama
from colrow.models.shapes import shape

class Sick(Llama):
    def forward(self, *args, **kwargs):
        if os.environ["RANK"] == "1":
            raise RuntimeError("this rank is sick")
        return super().forward(*args, **kwargs)

def build():
    return Sick(replace(shape("laptop"), num_hidden_layers=1))
"""

COUNTED = """
from colrow.derive import judged
from colrow.models.llama import Llama
from colrow.models.shapes import shape
from dataclasses import replace

derive = judged.derive

def counted(*args, **options):
    with open("derived.txt", "a") as file:
        file.write("once\\n")
    return derive(*args, **options)

judged.derive = counted

def build():
    return Llama(replace(shape("laptop"), num_hidden_layers=1))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_text(tmp_path)
    (tmp_path / "sick.py").write_text(SICK, encoding="utf-8")
    (tmp_path / "counted.py").write_text(COUNTED, encoding="utf-8")
    models = {"tiny": {"shape": "laptop", "layers": 1}, "sick": {"python": "sick:build"}}
    for name, model in (models | {"counted": {"python": "counted:build"}}).items():
        write_config(tmp_path, name, model)
    return tmp_path


@pytest.fixture
def start(folder: Path, commands: Commands) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def begin(*command: str) -> Run:
        path = os.pathsep.join([*sys.path, str(folder)])
        runs.append(Run(folder, commands.environment(PYTHONPATH=path, TMPDIR=str(folder)), *command))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


def test_a_signal_saves_and_a_killed_rank_ends_the_run(folder: Path, start: Callable[..., Run]) -> None:
    run = start(sys.executable, "-m", "colrow", "train", "tiny.yaml")
    run.wait_for("^step +3/")
    second = start("colrow", "train", "tiny.yaml")
    assert second.end() == 2
    assert "in use by another run" in second.text
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 128 + signal.SIGINT, run.text
    assert "colrow train tiny.yaml" in run.text
    (saved,) = (folder / "runs/tiny/checkpoints").iterdir()
    step = int(saved.name.removeprefix("step-"))

    run = start("colrow", "train", "tiny.yaml")
    run.wait_for(f"^step +{step + 3}/")
    assert f"after step {step}" in run.text
    ranks = run.ranks()
    assert len(ranks) == 2
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    assert run.end() == 1
    assert time.monotonic() - killed < 20
    assert run.text.count("error") == 1
    assert "killed by SIGKILL" in run.text
    assert [line for line in run.text.splitlines() if line.startswith("begins ")] == []
    log = next((folder / "runs/tiny/logs").glob("*.log")).read_text()
    assert f"rank 0| step {step + 3}" in " ".join(log.split())
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    records = read_metrics(folder / "runs/tiny/metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    assert len(records) >= step + 3


@pytest.mark.exhaustive
def test_torchrun_starts_ranks_and_shows_the_error_of_the_one_that_failed(start: Callable[..., Run]) -> None:
    run = start("torchrun", "--nproc-per-node", "2", "-m", "colrow", "train", "sick.yaml")
    assert run.end() != 0
    assert "verify     sick:build is a model that nobody here has seen" in run.text
    assert "while the other ranks wait\nverify     proved: " in run.text
    assert "tp 2, CPU" in run.text
    assert run.text.count("RuntimeError: this rank is sick") == 1
    assert "onnection" not in run.text


@pytest.mark.exhaustive
def test_a_plan_is_derived_once_and_the_ranks_read_it(folder: Path, start: Callable[..., Run]) -> None:
    flags = ["--plan", "derive", "--train.steps", "1", "--checkpoint.last", "False", "--sample.prompt", "None"]
    run = start(sys.executable, "-m", "colrow", "train", "counted.yaml", *flags, "--checkpoint.export", "False")
    assert run.end() == 0, run.text
    assert (folder / "derived.txt").read_text() == "once\n"
    assert "plan       derived" in run.text
