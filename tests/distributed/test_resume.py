"""What a run does with a config, or a version, other than the one that left its checkpoint."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from colrow.checkpoint.manifest import JSON
from colrow.config import RunConfig, dump_config, load_config
from colrow.data.loader import BatchOrder
from colrow.run.resume import ResumePoint, _sequences_of_older
from helpers.harness import Ranks
from helpers.runs import a_run, figures, train, write_text

pytestmark = pytest.mark.distributed

SEQ_LEN = 32


def short(folder: Path, name: str, **train: Any) -> RunConfig:
    """Three steps of 4 sequences, in one process."""
    section = {"steps": 3, "warmup_steps": 0} | train
    return a_run(folder, name, mesh={"tp": 1}, train=section, checkpoint={"export": False})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    write_text(folder)
    return folder


@contextmanager
def reads_listed() -> Iterator[list[int]]:
    """Within, the windows of every global batch, in the order in which batches are prepared."""
    read: list[int] = []
    plain = BatchOrder.indices

    def listed(self: BatchOrder, position: int) -> np.ndarray:
        windows = plain(self, position)
        read.extend(windows.tolist())
        return windows

    BatchOrder.indices = listed  # type: ignore[method-assign]
    try:
        yield read
    finally:
        BatchOrder.indices = plain  # type: ignore[method-assign]


def windows_of(device: str, config: RunConfig) -> list[int]:
    with reads_listed() as read:
        train(device, config)
    return read


def without_position(self: ResumePoint, config: RunConfig, data: Any) -> dict[str, JSON]:
    """What checkpoints held before they stored a position."""
    return {"step": self.step, "corpus": data.fingerprint, "seed": config.run.seed}


def other_batch(device: str, folder: Path, older: bool) -> tuple[list[int], list[int]]:
    """The windows of 3 steps of 4 and, continued, 2 steps of 8; and of 7 steps of 4."""
    name = f"older-{older}"
    stored = ResumePoint.to_json
    if older:
        ResumePoint.to_json = without_position  # type: ignore[method-assign]
    first = windows_of(device, short(folder, name))[: 3 * 4]  # one batch more is read ahead
    ResumePoint.to_json = stored  # type: ignore[method-assign]
    then = windows_of(device, short(folder, name, steps=5, global_batch=8))[: 2 * 8]
    return first + then, windows_of(device, short(folder, f"{name}-unbroken", steps=7))[: 7 * 4]


@pytest.mark.parametrize("older", [False, True])
def test_another_global_batch_reads_on_without_gap_or_repeat(ranks: Ranks, folder: Path, older: bool) -> None:
    ((read, unbroken),) = ranks(1).run(other_batch, folder, older)
    assert len(read) == 28
    assert read == unbroken
    tokens = [record["tokens"] for record in figures(folder / f"older-{older}" / "metrics.jsonl")]
    assert tokens == [sequences * SEQ_LEN for sequences in (4, 8, 12, 20, 28)]


def test_the_position_of_a_checkpoint_without_one_survives_a_start_that_saved_nothing(tmp_path: Path) -> None:
    """Such a start has left its own config in the folder: the record of the step still knows."""
    before, after = short(tmp_path, "run"), short(tmp_path, "run", global_batch=16)
    before.run.dir.mkdir()
    assert _sequences_of_older(3, before) == 12
    (before.run.dir / "config.yaml").write_text(dump_config(before))
    assert _sequences_of_older(3, after) == 12
    (before.run.dir / "config.yaml").write_text(dump_config(after))
    assert _sequences_of_older(3, after) == 48  # nothing else is known
    (before.run.dir / "metrics.jsonl").write_text('{"step": 2, "tokens": 256}\n{"step": 3, "tokens": 384}\n')
    assert _sequences_of_older(3, after) == 12


STORED = Path(__file__).parents[1] / "checkpoint" / "old_run"


def continue_old_run(device: str, folder: Path) -> str:
    """The run that version 1b285e2 left after 4 steps of 4, two steps of 8 further."""
    shutil.copytree(STORED, folder)
    sys.path.insert(0, str(folder))
    os.chdir(folder)
    keys = {"mesh.tp": 1, "train.steps": 6, "train.global_batch": 8, "check": False, "checkpoint.export": False}
    _, _, text = train(device, load_config(folder / "run" / "config.yaml", keys))
    return text


def test_a_run_of_version_1b285e2_goes_on_where_it_stood(ranks: Ranks, tmp_path: Path) -> None:
    (text,) = ranks(1).run(continue_old_run, tmp_path / "old")
    assert "continues  after step 4: 16 sequences, 512 tokens, 0.15 epochs" in text
    tokens = [record["tokens"] for record in figures(tmp_path / "old" / "run" / "metrics.jsonl")]
    assert tokens == [128, 256, 384, 512, 768, 1024]
