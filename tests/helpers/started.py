"""`colrow train` as a process that a test starts, signals, and waits for."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from colrow.run import launch
from colrow.run.stop import PID_FILE

PATIENCE = 240.0
"""Seconds until something that does not come is an error."""


class Run:
    """A started command and what it has printed."""

    def __init__(self, folder: Path, environment: dict[str, str], *command: str) -> None:
        self._folder = folder
        self._out = (folder / f"out-{time.monotonic_ns()}.log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=self._out, stderr=subprocess.STDOUT
        )

    @property
    def text(self) -> str:
        return Path(self._out.name).read_text(encoding="utf-8")

    def wait_for(self, pattern: str) -> None:
        end = time.monotonic() + PATIENCE
        while not re.search(pattern, self.text, re.MULTILINE):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < end, f"{pattern!r} did not come:\n{self.text}"
            time.sleep(0.1)

    def end(self) -> int:
        return self.process.wait(PATIENCE)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, in order; TMPDIR is the folder."""
        files = sorted(self._folder.glob(f"*/*/attempt_*/*/{PID_FILE}"))
        return [int(file.read_text(encoding="ascii")) for file in files]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self._out.close()


def write_config(folder: Path, name: str, model: dict[str, Any], **sections: dict[str, Any]) -> Path:
    """`NAME.yaml` of a run in `runs/NAME` on two tp ranks and `*.txt`; `sections` are laid over it, key by key."""
    tree: dict[str, Any] = {
        "run": {"dir": f"runs/{name}"},
        "model": model,
        "data": {
            "corpus": "*.txt",
            "seq_len": 32,
            "tokenizer": {"vocab_size": 300},
            "validation_fraction": 0.2,
            "cache": "cache",
            "workers": 1,
        },
        "mesh": {"tp": 2},
        "train": {"steps": 100_000, "global_batch": 2, "micro_batch": 2, "lr": 1e-4},
        "device": "cpu",
    }
    for key, section in sections.items():
        tree[key] = tree.get(key, {}) | section
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def without_ranks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on `colrow train` in this process starts no ranks. Returns the numbers of those that got orders."""
    numbers: list[int] = []

    @contextmanager
    def on_standby(command: Sequence[str], ranks: int) -> Iterator[Any]:
        yield SimpleNamespace(run=lambda **_: numbers.append(ranks) or launch.Ended())

    monkeypatch.setattr(launch, "on_standby", on_standby)
    return numbers
