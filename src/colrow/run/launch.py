"""Local ranks under torchrun's own launcher, and how a run of them ends.

torchrun answers SIGINT and SIGTERM by ending its ranks within seconds, which is too soon for a step and a checkpoint.
So its agent runs in a thread here, where it takes no signals; the main thread takes them, asks the ranks to stop, and
waits for as long as they need. The agent notices a rank that fails, ends the others, and hands over what each of them
wrote into its error file: the first failure is the one to show.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from colrow.run.stop import PID_FILE, SIGNALS

USERS = 2
"""The exit status of an error that a user can mend: its text says everything."""
_POLL_SECONDS = 0.1


@dataclasses.dataclass(frozen=True)
class Failure:
    """The failure that ended a run: of which rank, its text, and the exit status it asks for."""

    rank: int
    text: str
    status: int


def launch(command: Sequence[str], ranks: int, *, save: bool = True) -> Failure | None:
    """Run `python COMMAND...` as `ranks` local ranks, with torchrun's environment, and wait for all of them.

    The first SIGINT or SIGTERM is passed on, the ranks are expected to save and end; the second one ends them.

    Args:
        save: whether the ranks have something to save. Without, the first signal ends them.

    Returns:
        The first failure; None when all ranks ended well.

    Raises:
        KeyboardInterrupt: a signal has ended ranks that had nothing to save.
    """
    with tempfile.TemporaryDirectory(prefix="colrow-") as folder:
        agent = _Agent(command, ranks, Path(folder))
        signals = _Signals(Path(folder), patience=1 if save else 0)
        with signals:
            agent.start()
            while agent.is_alive():
                agent.join(_POLL_SECONDS)
                signals.pass_on()
        if signals.count and not save:
            raise KeyboardInterrupt
        if isinstance(agent.error, ChildFailedError):
            return first_failure(agent.error.failures)
        if agent.error is not None:
            raise agent.error
    return None


def first_failure(failures: Mapping[int, ProcessFailure]) -> Failure:
    """The failure that came before the others, which are mostly ranks that lost their neighbour.

    A rank that a signal killed leaves no error file, and is what the others' errors are about.
    """
    rank, failure = min(failures.items(), key=_order)
    return _described(rank, failure)


class _Agent(threading.Thread):
    """torchrun's agent, away from the main thread."""

    def __init__(self, command: Sequence[str], ranks: int, folder: Path) -> None:
        super().__init__(name="torchrun", daemon=True)
        options: dict[str, Any] = {}
        if any(field.name == "shutdown_timeout" for field in dataclasses.fields(LaunchConfig)):  # torch >= 2.12
            options["shutdown_timeout"] = 5
        self._launch = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",
                local_addr="localhost",
                max_restarts=0,
                monitor_interval=_POLL_SECONDS,
                logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
                **options,
            ),
            sys.executable,
        )
        self._command = list(command)
        self.error: BaseException | None = None

    def run(self) -> None:
        for name in ("multiprocessing.api", "agent.server.api", "agent.server.local_elastic_agent"):
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)  # we say it ourselves
        try:
            self._launch(*self._command)
        except BaseException as error:
            self.error = error


class _Signals:
    """Counts SIGINT and SIGTERM, and passes them on to the ranks once these can take them.

    Args:
        patience: how many signals ask the ranks to stop; the next one kills them.
    """

    def __init__(self, folder: Path, patience: int) -> None:
        self._folder, self._patience = folder, patience
        self.count = 0
        self._told: set[tuple[int, bool]] = set()

    def __enter__(self) -> _Signals:
        self._former = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1

    def pass_on(self) -> None:
        """Tell each rank that has written its process id, once to stop and once to end."""
        if not self.count:
            return
        kill = self.count > self._patience
        for file in self._folder.glob(f"*/attempt_*/*/{PID_FILE}"):
            try:
                pid = int(file.read_text(encoding="ascii"))
                if (pid, kill) not in self._told:
                    self._told.add((pid, kill))
                    os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
            except (OSError, ValueError):  # it has just ended, or is about to write
                continue


def _order(item: tuple[int, ProcessFailure]) -> tuple[int, float]:
    failure = item[1]
    if not failure.error_file_data.get("message") or failure.error_file_data["message"] == "<NONE>":
        ended_by_agent = -failure.exitcode == signal.SIGTERM or failure.exitcode > 0
        return (2 if ended_by_agent else 0, 0.0)
    return (1, _extra(failure).get("time", float(failure.timestamp)))


def _extra(failure: ProcessFailure) -> dict[str, Any]:
    message = failure.error_file_data["message"]
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def _described(rank: int, failure: ProcessFailure) -> Failure:
    message = failure.error_file_data.get("message")
    if isinstance(message, dict):
        extra = _extra(failure)
        text, status = extra.get("py_callstack") or message["message"], int(extra.get("status", 1))
        return Failure(rank, text if status == USERS else f"rank {rank} failed\n{text}", status)
    if failure.exitcode < 0:
        name = failure.signal_name()
        cause = " (the kernel may have run out of memory)" if name == "SIGKILL" else ""
        return Failure(rank, f"rank {rank} was killed by {name}{cause}", 1)
    return Failure(rank, f"rank {rank} ended with status {failure.exitcode} and left no message", 1)


def write_error(file: Path, text: str, when: float, status: int) -> None:
    """Leave an error for the launcher, in the form that torchrun reads too. `when`: seconds since the epoch."""
    extra = {"py_callstack": text, "timestamp": str(int(when)), "time": when, "status": status}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")
    partial.replace(file)
