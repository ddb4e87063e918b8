"""A run's folder: its lock, the config it belongs to, and the files that describe the run."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from colrow.checkpoint.space import DISK_FULL
from colrow.config import RunConfig, dump_config, load_config
from colrow.data.disk import NoFileLocksError, atomic_write, try_lock, writing
from colrow.data.tokenizer import Tokenizer
from colrow.errors import ConfigError
from colrow.plans.plan import Plan
from colrow.run.resume_rules import changes_between
from colrow.run.trust import mark_as_ours, require_trusted

CONFIG, PLAN, TOKENIZER, CHECKPOINTS, EXPORT, LOCK = (
    "config.yaml",
    "plan.yaml",
    "tokenizer.json",
    "checkpoints",
    "export",
    ".lock",
)
_IN_PLACE = (LOCK, "metrics.jsonl", "nonfinite.jsonl", "loss.png", "loss.svg")
"""What a run opens under its own name to write it; all else is written beside, and renamed."""


def is_of_a_run(file: Path) -> bool:
    """Whether the file is the config.yaml that a run wrote into its folder, not one that a person keeps elsewhere."""
    return file.name == CONFIG and any((file.parent / name).exists() for name in (PLAN, CHECKPOINTS, LOCK))


def load_trusted(
    file: Path, overrides: dict[str, Any] | None = None, *, auto: bool = False, trust_code: bool = False
) -> RunConfig:
    """`load_config` for a verb that builds the model: refuses code that only somebody else's run folder names."""
    config = load_config(file, overrides, auto=auto)
    if is_of_a_run(file):
        require_trusted(config, file, trust_code)
    return config


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Hold the lock of the run's folder. The kernel releases it when the process ends, however it ends.

    Raises:
        ConfigError: another run uses the folder, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in (folder / name for name in _IN_PLACE):  # a folder of somebody else's may lead to other files
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ConfigError(f"{path} is no plain file, and is to be written: remove it")
        # without a buffer: on a full disk that would fail once more when it is closed, and name no file
        file = (folder / LOCK).open("ab+", buffering=0)
    except OSError as error:
        raise unwritable(folder, error) from error
    with file:
        try:
            is_ours = try_lock(file)
        except NoFileLocksError as error:
            raise ConfigError(
                f"the file system of {folder} has no file locks ({error.strerror}), by which two runs are kept "
                "apart: set run.dir to another disk"
            ) from error
        if not is_ours:
            file.seek(0)
            holder = file.read().decode("utf-8", "replace").strip()
            raise ConfigError(
                f"the run's folder {folder} is in use by another run{f' ({holder})' if holder else ''}: "
                "wait for it, stop it, or set run.dir to another folder"
            )
        # for the message of whoever comes next; the lock itself is the kernel's, and has no content
        with writing(folder / LOCK):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield


def unwritable(folder: Path, error: OSError) -> ConfigError:
    """The error of a run's folder that cannot be written."""
    space = "free some space there, or " if error.errno in DISK_FULL else ""
    return ConfigError(f"cannot write to the run's folder {folder}: {error.strerror}: {space}set run.dir")


def require_free(folder: Path) -> None:
    """Raise a ConfigError when another run uses the folder, or it cannot be made: before data are prepared for it."""
    if folder.exists():
        with claimed(folder):
            pass
        return
    if folder.is_symlink():
        raise ConfigError(
            f"run.dir {folder} is a link to {os.readlink(folder)}, which is not there: make that folder, or set run.dir"
        )
    there = next(path for path in folder.absolute().parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to the run's folder {folder}: {there} cannot be written: set run.dir")


def changed_keys(config: RunConfig, step: int) -> list[str]:
    """`key: before -> now` for what changed since the folder's previous start, and what follows from it.

    Args:
        step: steps of the newest checkpoint; 0 where there is none.

    Raises:
        ConfigError: something changed that makes it another run (model, data, seed); the text names the keys.
    """
    path = config.run.dir / CONFIG
    return changes_between(load_config(path), config, step) if path.exists() else []


def write_plan(folder: Path, plan: Plan) -> str:
    """Write the resolved plan.yaml, for the ranks to read. Returns the SHA-256 of its text.

    Raises:
        ConfigError: another run uses the folder.
    """
    text = plan.to_yaml()
    with claimed(folder):
        atomic_write(folder / PLAN, text)
    return _digest(text)


def read_plan(folder: Path, digest: str) -> Plan:
    """The plan that `write_plan` wrote and returned `digest` for.

    Raises:
        ConfigError: since then another launcher has written its own.
    """
    text = (folder / PLAN).read_text(encoding="utf-8")
    if _digest(text) != digest:
        raise ConfigError(
            f"{folder / PLAN} was changed between launch and start of the ranks, probably by another run: "
            "set run.dir to another folder"
        )
    return Plan.from_yaml(text, str(folder / PLAN))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_folder(config: RunConfig, plan: Plan, tokenizer: Tokenizer) -> None:
    """Write the resolved config.yaml, plan.yaml and the tokenizer."""
    config.run.dir.mkdir(parents=True, exist_ok=True)
    text = dump_config(config)
    atomic_write(config.run.dir / CONFIG, text)
    mark_as_ours(config.run.dir, text)
    atomic_write(config.run.dir / PLAN, plan.to_yaml())
    tokenizer.save(config.run.dir)
