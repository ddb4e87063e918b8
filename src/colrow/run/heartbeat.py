"""What each rank reports of itself while it runs, for those who watch whether it hangs.

[Note: heartbeat]
The main thread of a rank beats: it enters a phase, ends a step, or issues a collective (torch's flight recorder counts
them). Another thread of the rank, the reporter, sends a report every second or two, numbered by `tick`; it goes on
while the main thread waits in a collective, which releases the interpreter's lock. So a report that does not change is
of a process that is stopped, or of a host that is gone; one whose tick moves and whose `progress` does not is of a rank
that waits, or computes. Clocks are not compared: who watches takes its own time when it sees a report change.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from colrow.run import startup

if TYPE_CHECKING:
    from colrow.config_sections import TrainSection

REPORT_FILE = "heartbeat.json"
"""In the folder that the launcher gave a rank, beside its process id."""
ENDED = "ended"
"""The phase of a rank that has nothing left to do."""
_LONGEST_INTERVAL = 2.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Heartbeat:
    """What the main thread reports; the reporter's thread reads it without a lock, one field at a time.

    Attributes:
        phase: a key of `train.hang_limits`, or `training`.
        step: steps of the run that are done.
    """

    phase: str = "start"
    step: int = 0
    beats: int = 0
    changed: threading.Event = field(default_factory=threading.Event)
    """Set when the phase changes: a report at once, for the phase decides which limit counts."""

    def beat(self, step: int) -> None:
        """The main thread has ended a step."""
        self.step = step
        self.beats += 1

    def enter(self, phase: str) -> None:
        """The main thread begins something that has a limit of its own."""
        is_other = phase != self.phase
        self.phase = phase
        self.beats += 1
        if is_other:
            self.changed.set()

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within, the main thread is in `phase`; afterwards again in the previous one."""
        previous = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(previous)


@contextmanager
def compilations(heartbeat: Heartbeat) -> Iterator[None]:
    """Within, the heartbeat is in the phase `compilation` while torch.compile compiles."""
    if "torch._dynamo" not in sys.modules:  # whose import takes a second
        yield
        return
    from colrow.torch_compat import around_compilation

    phase = heartbeat.phase

    def begin() -> None:
        startup.mark("steps")
        heartbeat.enter("compilation")

    def end() -> None:
        startup.mark("compile")
        heartbeat.enter(phase)

    with around_compilation(begin, end):
        yield


@dataclass(frozen=True)
class RankReport:
    """One report of one rank."""

    rank: int
    pid: int = 0
    host: str = ""
    tick: int = 0
    """Number of the report."""
    phase: str = "start"
    step: int = 0
    """Steps of the run that are done."""
    beats: int = 0
    groups: dict[str, list[int]] = field(default_factory=dict)
    """Collectives that the rank has issued, and that have completed, by process group."""
    work: float = 0.0
    """CPU seconds of the process and MB that it has written: what moves while it saves or compiles."""
    collective: str = ""
    """The last collective, once the rank has waited for a while."""

    @property
    def progress(self) -> object:
        """What changes when the main thread beats."""
        return (self.phase, self.step, self.beats, self.groups)

    @property
    def issued(self) -> int:
        """Collectives that the rank has issued, over all groups."""
        return sum(counts[0] for counts in self.groups.values())

    @property
    def waits(self) -> bool:
        """Whether a collective is issued and has not completed."""
        return any(issued > completed for issued, completed in self.groups.values())

    def to_json(self) -> str:
        """For `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankReport:
        """Raises ValueError for what is half written."""
        return cls(**json.loads(text))


def report_interval(train: TrainSection) -> float:
    """Seconds between reports: small against the time within which a hang is to be seen."""
    return min(_LONGEST_INTERVAL, train.hang_timeout / 20) if train.hang_timeout else _LONGEST_INTERVAL


class Reporter(threading.Thread):
    """Sends a rank's reports. A context manager: at the end it sends that the rank has ended.

    Args:
        folder: where the launcher looks for the report; None without a launcher.
        after: called with each report, in this thread.
    """

    def __init__(
        self,
        heartbeat: Heartbeat,
        rank: int,
        interval: float,
        folder: Path | None = None,
        after: Callable[[RankReport], None] = lambda _: None,
    ) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._heartbeat, self._rank, self._interval = heartbeat, rank, interval
        self._folder, self._after = folder, after
        self._host, self._tick, self._still = socket.gethostname(), 0, 0
        self._previous: object = None
        self._collective = ""
        self._is_over = False

    def __enter__(self) -> Reporter:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._heartbeat.changed.set()
        self.join()
        self._heartbeat.enter(ENDED)
        self._send(self.report())

    def run(self) -> None:
        while True:
            self._heartbeat.changed.clear()
            if self._is_over:  # looked at after the clear, which may have undone the set of the end
                return
            report = self.report()
            self._send(report)
            self._after(report)
            self._heartbeat.changed.wait(self._interval)

    def report(self) -> RankReport:
        """The rank as it is now."""
        self._tick += 1
        report = RankReport(
            self._rank,
            os.getpid(),
            self._host,
            self._tick,
            self._heartbeat.phase,
            self._heartbeat.step,
            self._heartbeat.beats,
            _counts(),
            _work() + (_work_of_children() if self._heartbeat.phase == "compilation" else 0.0),
        )
        self._still = self._still + 1 if report.progress == self._previous else 0
        self._previous = report.progress
        if self._still == 0 or report.phase == "capture":  # the record queries events, which a capture forbids
            self._collective = ""
        elif self._still == 2:  # once for each wait, after two intervals without a beat: it takes 0.1 s
            self._collective = last_collective(_entries())
        return replace(report, collective=self._collective)

    def _send(self, report: RankReport) -> None:
        if self._folder is None:
            return
        partial = self._folder / f"{REPORT_FILE}.partial"
        try:
            partial.write_text(report.to_json(), encoding="utf-8")
            partial.replace(self._folder / REPORT_FILE)
        except OSError:  # the launcher has ended, and its folder is gone
            return


def _counts() -> dict[str, list[int]]:
    if "torch" not in sys.modules:
        return {}
    from colrow.torch_compat import collective_counts

    with suppress(ValueError, RuntimeError):  # the main thread is just destroying the group
        return {group: list(counts) for group, counts in collective_counts().items()}
    return {}


def _entries() -> list[dict[str, Any]]:
    if not _counts():
        return []
    from colrow.torch_compat import recorded_collectives

    with suppress(ValueError, RuntimeError):
        return recorded_collectives()
    return []


def last_collective(entries: list[dict[str, Any]]) -> str:
    """The last one in words: `all_reduce 57 of group 0 (default_pg), [5] Double`; empty where there is none."""
    if not entries:
        return ""
    last = entries[-1]
    name = str(last["profiling_name"]).partition(":")[2] or str(last["profiling_name"])
    sizes, dtypes = last.get("input_sizes") or [[]], last.get("input_dtypes") or [""]
    group = f"group {last['pg_id']} ({last['process_group'][1]})"
    return f"{name} {last['collective_seq_id']} of {group}, {sizes[0]} {dtypes[0]}"


def _work() -> float:
    times = os.times()
    cpu = times.user + times.system + times.children_user + times.children_system
    try:
        written = Path("/proc/self/io").read_text(encoding="ascii").split("wchar: ", 1)[1].split("\n", 1)[0]
    except (OSError, IndexError):  # not on Linux
        written = "0"
    return cpu + int(written) / 1e6


def _work_of_children(pid: str = "self") -> float:
    """CPU seconds of the processes below this one that still run: a C++ compiler may take minutes, and its time is the
    parent's only when it has ended. 0 where /proc has no children."""
    seconds = 0.0
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError, IndexError):  # it has just ended
            for child in file.read_text(encoding="ascii").split():
                stat = Path(f"/proc/{child}/stat").read_text(encoding="utf-8", errors="replace")
                # behind the name in brackets: user and system time of the process, and of its ended children
                ticks = sum(map(int, stat.rpartition(")")[2].split()[11:15]))
                seconds += ticks / os.sysconf("SC_CLK_TCK") + _work_of_children(child)
    return seconds


def end_with_launcher() -> None:
    """Let this process end soon after the one that started it, however that ends.

    The kernel kills it, even where it is stopped or waits in a driver; where the kernel cannot be asked (not Linux), a
    thread looks once a second. Not from a normal thread's code: the main thread may never leave its collective.
    """
    parent = os.getppid()
    if sys.platform.startswith("linux"):
        prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)
        if prctl is not None and prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) == 0:
            if os.getppid() != parent:  # it has ended in between
                os._exit(1)
            return
    threading.Thread(target=_end_after, args=(parent,), name="launcher", daemon=True).start()


def _end_after(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)
