from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from colrow.config import RunConfig, dump_config
from colrow.errors import ConfigError
from colrow.plans.plan import Plan
from colrow.run import nonfinite
from colrow.run.preflight import resolve
from colrow.run.run_folder import CONFIG, changed_keys, claimed, read_plan, require_free, write_plan
from colrow.train import metrics

HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("process 7 on elsewhere"); file.flush()
print("held", flush=True)
time.sleep(60)
"""


def test_a_folder_in_use_is_refused_until_its_holder_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder / ".lock")], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=r"in use by another run .process 7 on elsewhere."):
            require_free(folder)
    finally:
        holder.kill()
        holder.wait()
    require_free(folder)
    with claimed(folder):
        assert f"process {holder.pid}" not in (folder / ".lock").read_text()


@pytest.mark.parametrize("name", [".lock", metrics.FILE, nonfinite.FILE, "loss.png", "loss.svg"])
def test_a_file_of_a_run_that_is_a_link_is_not_written_through(name: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    for target in ("precious", "nowhere"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(target)
        with pytest.raises(ConfigError, match=rf"{re.escape(name)} is no plain file, and is to be written: remove it"):
            require_free(tmp_path)
        assert (tmp_path / "precious").read_text() == "content"
        (tmp_path / name).unlink()
        require_free(tmp_path)  # as is advised
    if name != ".lock":
        os.mkfifo(tmp_path / name)
        with pytest.raises(ConfigError, match="is no plain file"):
            require_free(tmp_path)


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(fd: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.raises(ConfigError, match=r"has no file locks \(No locks available\).* set run\.dir to another disk"):
        require_free(tmp_path)


def test_a_folder_that_does_not_exist_is_free_and_stays_away(tmp_path: Path) -> None:
    require_free(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_another_model_data_or_seed_is_another_run(config: Callable[..., RunConfig]) -> None:
    previous = config()
    assert changed_keys(previous, 0) == []
    previous.run.dir.mkdir()
    (previous.run.dir / CONFIG).write_text(dump_config(previous))
    assert changed_keys(previous, 0) == []
    assert changed_keys(config(**{"train.lr": 2e-3, "mesh.tp": 1, "data.workers": 3}), 0) == [
        "mesh.tp: 2 -> 1",
        "train.lr: 0.001 -> 0.002",
    ]
    with pytest.raises(ConfigError, match=r"data.seq_len: 32 -> 64.*run.seed: 0 -> 5.*set run.dir to another folder"):
        changed_keys(config(**{"run.seed": 5, "data.seq_len": 64}), 0)


def test_ranks_read_the_plan_of_their_own_launcher(tmp_path: Path) -> None:
    plan = Plan.preset("llama-fast")
    digest = write_plan(tmp_path / "run", plan)
    read = read_plan(tmp_path / "run", digest)
    assert (read, read.name) == (plan, plan.name)
    write_plan(tmp_path / "run", Plan.preset("llama"))
    with pytest.raises(ConfigError, match=r"plan.yaml was changed .* set run.dir to another folder"):
        read_plan(tmp_path / "run", digest)


def test_a_run_of_an_older_version_goes_on(config: Callable[..., RunConfig]) -> None:
    """`model.implementation` was `colrow` where nothing was given; it is `auto` now, and resolved."""
    run = resolve(config())
    run.run.dir.mkdir()
    old = dump_config(config(**{"model.implementation": "colrow"}))
    (run.run.dir / CONFIG).write_text(old)
    assert changed_keys(run, 0) == []


def test_a_folder_that_cannot_be_made_is_found_before_data_are_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link to a folder is as good as the folder."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    require_free(tmp_path / "link")
    (tmp_path / "nowhere").symlink_to("none")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name, text in (
        ("nowhere", "is a link to none, which is not there: make that folder"),
        ("loop", "is a link to loop, which is not there"),
        ("file/run", "file cannot be written: set run.dir"),
    ):
        with pytest.raises(ConfigError, match=text):
            require_free(tmp_path / name)
    require_free(tmp_path / "new")
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everywhere
    with pytest.raises(ConfigError, match=f"run/new: {tmp_path} cannot be written: set run.dir"):
        require_free(tmp_path / "run/new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "loop", "nowhere", "real"]
