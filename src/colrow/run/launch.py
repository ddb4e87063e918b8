"""Local ranks under torchrun's own launcher, and how a run of them ends.

torchrun answers SIGINT and SIGTERM by ending its ranks within seconds, which is too soon for a step and a checkpoint.
So its agent runs in a thread here: Python delivers signals to the main thread only, which asks the ranks to stop and
waits for as long as they need. The agent notices a rank that fails, ends the others, and returns what each of them
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
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from colrow.data.disk import atomic_write
from colrow.run import standby
from colrow.run.hang_guard import LauncherGuard
from colrow.run.standby import Orders
from colrow.run.stop import PID_FILE, SIGNALS

EXIT_USER_ERROR = 2
"""Exit status of an error that a user can fix: its text says everything, and no traceback is shown."""
_POLL_SECONDS = 0.1
_DISMISSED_SECONDS = 10.0
"""How long a launcher waits for the end of ranks that it does not need: they end by themselves within one or two."""
_KILLED_SECONDS = 15.0
"""How long ranks that were killed have to go: one that a driver holds does not, and its launcher ends without it."""


@dataclasses.dataclass(frozen=True)
class RankFailure:
    """The failure that ended a run: the rank that failed, the text, and the exit status for the command.

    Attributes:
        is_silent: the rank left no message.
    """

    rank: int
    text: str
    status: int
    is_silent: bool = False


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: the first failure, if there was one, and the signal that asked for the end, if one did."""

    failure: RankFailure | None = None
    signal: int | None = None

    @property
    def status(self) -> int:
        """Exit status for the command: that of a process ended by the signal, although the ranks saved and left."""
        if self.signal is not None:
            return 128 + self.signal
        return 0 if self.failure is None else self.failure.status


def launch(command: Sequence[str], ranks: int, *, save: bool = True) -> Ended:
    """Run `python COMMAND...` as `ranks` local ranks, with torchrun's environment, and wait for all of them.

    The first SIGINT or SIGTERM is passed on, and the ranks are expected to save and end; the second one kills them.

    Args:
        save: whether the ranks have something to save. Without, the first signal kills them.

    Raises:
        KeyboardInterrupt: a signal has killed ranks that had nothing to save.
    """
    with tempfile.TemporaryDirectory(prefix="colrow-") as folder:
        return LocalRanks(command, ranks, Path(folder), save=save).run()


@contextmanager
def on_standby(command: Sequence[str], ranks: int) -> Iterator[LocalRanks]:
    """Start `python COMMAND...` as local ranks that wait for orders (`run.standby`) while the block decides on them:
    `LocalRanks.run` gives these. Ranks without orders end with the block.
    """
    with tempfile.TemporaryDirectory(prefix="colrow-") as folder:
        local = LocalRanks(command, ranks, Path(folder))
        standby.announce(Path(folder))
        local.start()
        try:
            yield local
        finally:
            local.dismiss()
            os.environ.pop(standby.VARIABLE, None)


class LocalRanks:
    """Local ranks under torchrun's agent, whose files are in `folder`; for the rest see `launch`."""

    def __init__(self, command: Sequence[str], ranks: int, folder: Path, *, save: bool = True) -> None:
        self._folder, self._save = folder, save
        self._agent = _Agent(command, ranks, folder)

    def start(self) -> None:
        self._agent.start()

    def dismiss(self) -> None:
        """End ranks on standby that have no orders yet."""
        if standby.give(self._folder, None):
            self._agent.join(_DISMISSED_SECONDS)

    def run(
        self, *, orders: Orders | None = None, guard: LauncherGuard | None = None, beside: Beside | None = None
    ) -> Ended:
        """Start the ranks, or give those on standby their orders, and wait for all of them.

        Args:
            guard: ends ranks that hang, and those that hang after the first signal.
            beside: what is done meanwhile. Where it refuses the run, the ranks are killed.

        Raises:
            Exception: what `beside` has raised.
        """
        signals, agent = _Signals(self._folder, stops=1 if self._save else 0), self._agent
        with signals:
            if orders is None:
                agent.start()
            else:
                standby.give(self._folder, orders)
            if beside is not None:
                beside.start()
            killed, where = None, ""
            while agent.is_alive() and (killed is None or time.monotonic() - killed < _KILLED_SECONDS):
                agent.join(_POLL_SECONDS)
                if guard is not None and signals.count > signals.stops:
                    where = where or guard.describe()  # before the next line kills the ranks
                if beside is not None and beside.error is not None:
                    killed = killed or time.monotonic()
                    signals.kill()
                signals.pass_on()
                if guard is not None and killed is None:
                    guard.look(self._folder, signals.since)
                    killed = None if guard.hang is None else time.monotonic()
        if beside is not None:
            beside.join()  # ranks without memory have failed perhaps before it could say so
            if beside.error is not None:
                raise beside.error
        return self._ended(signals, guard, where)

    def _ended(self, signals: _Signals, guard: LauncherGuard | None, where: str) -> Ended:
        if signals.count and not self._save:
            raise KeyboardInterrupt(signals.last)
        if guard is not None and guard.hang is not None:
            return Ended(RankFailure(guard.hang.ranks[0], guard.text(signals.last), 1), signals.last)
        error = self._agent.error
        if isinstance(error, ChildFailedError):
            if signals.count > signals.stops:
                text = (
                    "the ranks did not end after the first signal; the second one killed them, and nothing of the "
                    "steps since the last checkpoint is saved"
                )
                return Ended(RankFailure(0, f"{text}\n{where}".strip(), 1), signals.last)
            return Ended(first_failure(error.failures), signals.last)
        if error is not None:
            raise error
        return Ended(signal=signals.last)


class Beside(threading.Thread):
    """What a launcher does while its ranks run: `call`, whose exception is kept."""

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__(name="beside", daemon=True)
        self._call = call
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._call()
        except BaseException as error:
            self.error = error


def first_failure(failures: Mapping[int, ProcessFailure]) -> RankFailure:
    """The failure that caused the others, which are mostly ranks that lost their connection to it.

    A rank killed by a signal leaves no error file, and is the cause of the other ranks' errors.
    """
    rank, failure = min(failures.items(), key=_order)
    return _describe(rank, failure)


class _Agent(threading.Thread):
    """torchrun's agent, in a thread of its own."""

    def __init__(self, command: Sequence[str], ranks: int, folder: Path) -> None:
        super().__init__(name="torchrun", daemon=True)
        options: dict[str, Any] = {}
        if any(field.name == "shutdown_timeout" for field in dataclasses.fields(LaunchConfig)):  # torch >= 2.12
            options["shutdown_timeout"] = 5  # seconds between SIGTERM and SIGKILL for the ranks left after a failure
        self._launch = elastic_launch(
            LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=ranks,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint="localhost:0",  # 0: any free port, so that several runs on one host do not collide
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
            # the command prints the failure, once
            logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
        try:
            self._launch(*self._command)
        except BaseException as error:
            self.error = error


class _Signals:
    """Counts SIGINT and SIGTERM, and passes them on to the ranks that have installed their handlers.

    A rank writes its process id file only after it can take a signal: an earlier SIGTERM would kill it unsaved.

    Args:
        stops: how many signals ask the ranks to stop; the next one kills them.
    """

    def __init__(self, folder: Path, stops: int) -> None:
        self._folder, self.stops = folder, stops
        self.count = 0
        self.last: int | None = None
        self.since: float | None = None
        """When the first one came, in `time.monotonic()`."""
        self._sent: set[tuple[int, bool]] = set()

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.signal(number, self._take) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self.count += 1
        self.last = number
        self.since = self.since or time.monotonic()

    def kill(self) -> None:
        """As if signals had asked for it."""
        self.count = self.stops + 1

    def pass_on(self) -> None:
        """Send each rank that has written its process id one SIGTERM, and later one SIGKILL."""
        if not self.count:
            return
        kill = self.count > self.stops
        for file in self._folder.glob(f"*/attempt_*/*/{PID_FILE}"):
            try:
                pid = int(file.read_text(encoding="ascii"))
                if (pid, kill) not in self._sent:
                    self._sent.add((pid, kill))
                    os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
            except (OSError, ValueError):  # the rank has just ended, or is still writing the file
                continue


def _order(item: tuple[int, ProcessFailure]) -> tuple[int, float]:
    """Causes first: killed from outside, then by the time of the error, then ended by the agent (no file, SIGTERM)."""
    failure = item[1]
    if not failure.error_file_data.get("message") or failure.error_file_data["message"] == "<NONE>":
        # A positive status without an error file: a rank that saw another one fail and left (stop.py), no cause either.
        ended_by_agent = -failure.exitcode == signal.SIGTERM or failure.exitcode > 0
        return (2 if ended_by_agent else 0, 0.0)
    return (1, _extra(failure).get("time", float(failure.timestamp)))


def _extra(failure: ProcessFailure) -> dict[str, Any]:
    message = failure.error_file_data["message"]
    return message.get("extraInfo", {}) if isinstance(message, dict) else {}


def _describe(rank: int, failure: ProcessFailure) -> RankFailure:
    message = failure.error_file_data.get("message")
    if isinstance(message, dict):
        extra = _extra(failure)
        text, status = extra.get("py_callstack") or message["message"], int(extra.get("status", 1))
        return RankFailure(rank, text if status == EXIT_USER_ERROR else f"rank {rank} failed\n{text}", status)
    if failure.exitcode < 0:
        name = failure.signal_name()
        cause = " (the kernel may have run out of memory)" if name == "SIGKILL" else ""
        return RankFailure(rank, f"rank {rank} was killed by {name}{cause}", 1, is_silent=True)
    return RankFailure(rank, f"rank {rank} ended with status {failure.exitcode} and left no message", 1, is_silent=True)


def write_error(file: Path, text: str, when: float, status: int) -> None:
    """Write an error for the launcher, in the format that torchrun reads too. `when`: seconds since the epoch."""
    extra = {"py_callstack": text, "timestamp": str(int(when)), "time": when, "status": status}
    atomic_write(file, json.dumps({"message": {"message": text, "extraInfo": extra}}))
