"""Whether a run hangs, and by which rank, judged from the ranks' reports.

[Note: when a run hangs]
All ranks meet in collectives, so one that stands still stops the others within a step. The run hangs when the rank that
beat the longest time ago did so longer ago than its limit: `train.hang_timeout` in training, more in the phases that
take long by nature (`train.hang_limits`). A rank that waits for another's evaluation or compilation does nothing
wrong, so the largest limit of all ranks counts, and time starts again when a rank enters another phase. A step that was
slow before may be so again: three times the longest silence that ended by itself is allowed.

After a signal that asks for the end, less will do: a rank whose reports have stopped, or a run of which no rank beats,
is not going to save.
"""

from __future__ import annotations

import socket
import textwrap
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from colrow.run.heartbeat import ENDED, RankReport

if TYPE_CHECKING:
    from colrow.config_sections import TrainSection

TRAINING = "training"
_EARLY_SHARE, _EARLY_SECONDS = 0.2, 10.0
"""How much before its end a limit counts as over: reports come later than beats, and the ranks' records take time."""
SILENT_AFTER_SIGNAL, STILL_AFTER_SIGNAL = 12.0, 18.0
"""Seconds without a report of a rank, or without a beat of any, after which a run that was asked to end hangs."""
_SLOW_AGAIN = 3.0  # times the longest silence that ended by itself
_ACTIVE_WORK = 0.05  # CPU seconds or MB between two reports: less is what the reporter itself takes


@dataclass
class _Seen:
    """A rank's last report, and when this process saw which part of it change."""

    report: RankReport
    alive: float
    progress: float
    phase: float
    work: float
    longest_silence: float = 0.0
    """Seconds between two beats in training."""

    def take(self, report: RankReport, now: float) -> None:
        """A new report."""
        if report.tick == self.report.tick and report.pid == self.report.pid:
            return
        self.alive = now
        if report.progress != self.report.progress:
            if report.phase == self.report.phase == TRAINING:
                self.longest_silence = max(self.longest_silence, now - self.progress)
            self.progress = now
        if report.phase != self.report.phase:
            self.phase = now
        if report.work - self.report.work > _ACTIVE_WORK:
            self.work = now
        self.report = report

    def shift(self, seconds: float) -> None:
        """Leave out seconds in which this process, which watches, was stopped itself."""
        self.alive, self.progress, self.phase, self.work = (
            at + seconds for at in (self.alive, self.progress, self.phase, self.work)
        )


@dataclass(frozen=True)
class Hang:
    """A run that hangs.

    Attributes:
        ranks: those that the others wait for; all of them where none stands out.
        silent: those that send no reports any more, and why, as far as can be seen.
        seconds: since the slowest rank's last beat.
        limit: that is over, in seconds; None where a signal came.
        phase: whose limit it is.
    """

    ranks: list[int]
    silent: Mapping[int, str]
    reports: Mapping[int, RankReport]
    seconds: float
    limit: float | None
    phase: str

    def text(self, collectives: Mapping[int, str] | None = None) -> str:
        """What the person reads: the ranks at fault, then a line for each rank.

        Args:
            collectives: the last collective of ranks that do not say it themselves.
        """
        names = f"rank{'s' if len(self.ranks) > 1 else ''} {', '.join(map(str, self.ranks))}"
        if 1 < len(self.ranks) == len(self.reports):
            names = f"all {len(self.ranks)} ranks"
        verb = "hang" if len(self.ranks) > 1 else "hangs"
        lines = [f"{names} {verb} in {self.phase}: no sign of life for {self.seconds:.0f} s"]
        lines += [self._line(report, (collectives or {}).get(rank)) for rank, report in sorted(self.reports.items())]
        if self.limit is not None:
            key = "train.hang_timeout" if self.phase == TRAINING else f"train.hang_limits.{self.phase}"
            lines.append(f"the limit is {self.limit:g} s: raise {key} where the run is only slow")
        return "\n".join(textwrap.fill(line, 80, subsequent_indent="    ") for line in lines)

    def _line(self, report: RankReport, collective: str | None) -> str:
        where = f"rank {report.rank}: {report.phase}, {report.step} steps done"
        collective = collective or report.collective
        if report.rank in self.silent:
            where += f", {self.silent[report.rank]}"
        elif report.waits:
            return f"{where}, waits in {collective or 'a collective'}"
        if not collective and report.groups:
            collective = ", ".join(f"{counts[0]} of group {group}" for group, counts in sorted(report.groups.items()))
        return f"{where}, last collective {collective}" if collective else where


def state_of(report: RankReport) -> str:
    """Why a rank sends no reports, as far as this host can see."""
    if not report.pid:
        return "has sent no report since it was started"
    match _process_state(report):
        case "T" | "t":
            return f"process {report.pid} is stopped (SIGSTOP)"
        case "D":
            return f"process {report.pid} waits for a device or disk"
        case "gone":
            return f"its process {report.pid} is gone"
        case _:
            return f"process {report.pid} on {report.host or 'its host'} does not respond"


def _process_state(report: RankReport) -> str:
    """The kernel's letter for the rank's process, `gone`, or nothing where it is another host's."""
    if report.host != socket.gethostname() or not report.pid:
        return ""
    try:
        return Path(f"/proc/{report.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "gone"


@dataclass
class HangWatch:
    """Judges a run by the reports of its ranks.

    Args:
        limits: seconds by phase; empty where `train.hang_timeout` is null, and nothing is watched.
        ranks: those that are expected, from now on.
        interval: seconds between reports, and calls of `take`.
    """

    limits: Mapping[str, float]
    ranks: Iterable[int]
    interval: float = 2.0
    now: float = field(default_factory=time.monotonic)
    _seen: dict[int, _Seen] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for rank in self.ranks:
            self._seen[rank] = _Seen(RankReport(rank), *(self.now,) * 4)

    def take(self, reports: Iterable[RankReport], now: float) -> None:
        """The reports as they are now. Call it regularly: a gap is time in which this process was stopped itself."""
        if (gap := now - self.now) > 3 * self.interval + 1:  # a busy host is late by less
            for seen in self._seen.values():
                seen.shift(gap)
        self.now = now
        for report in reports:
            if report.rank in self._seen:
                self._seen[report.rank].take(report, now)

    @property
    def reports(self) -> dict[int, RankReport]:
        """The last report of each rank."""
        return {rank: seen.report for rank, seen in self._seen.items()}

    def hang(self, signalled: float | None = None) -> Hang | None:
        """The hang, if there is one.

        Args:
            signalled: when the run was asked to end, by the same clock; None if it was not.
        """
        running = {rank: seen for rank, seen in self._seen.items() if seen.report.phase != ENDED}
        if not running or not self.limits:
            return None
        slowest = min(running.values(), key=lambda seen: seen.progress)
        since = self.now - slowest.progress
        judged = max(running.values(), key=self._limit)  # the largest limit counts: the others may wait for that rank
        limit = self._limit(judged)
        early = min(_EARLY_SHARE * limit, _EARLY_SECONDS)
        # since the last beat of the slowest, or since any rank entered another phase, whichever is later
        if self.now - max(slowest.progress, *(seen.phase for seen in running.values())) > limit - early:
            # a reporter that runs sends every two seconds, so ten without a report are no delay
            silent = [rank for rank, seen in running.items() if self.now - seen.alive > min(limit / 3, 10.0)]
            return self._verdict(running, silent, since, limit, judged.report.phase)
        if signalled is None:
            return None
        silent = [rank for rank, seen in running.items() if self._is_silent(seen, signalled)]
        # outside of training CPU time and bytes written are signs of life too: a save has no collectives
        last = max(seen.progress if self._beats(seen) else max(seen.progress, seen.work) for seen in running.values())
        if not any(seen.report.tick for seen in running.values()):
            last = max(last, signalled)  # no rank has reported yet: their time begins with the signal
        patience = max(STILL_AFTER_SIGNAL, 2 * max(seen.longest_silence for seen in running.values()))
        if self.now - signalled > 2.0 and (silent or self.now - last > patience):
            return self._verdict(running, silent, since, None, slowest.report.phase)
        return None

    def describe(self) -> str:
        """A line for each rank; empty before the first report."""
        reports = {rank: report for rank, report in self.reports.items() if report.tick}
        late = {rank for rank in reports if self.now - self._seen[rank].alive > 3 * self.interval}
        late |= {rank for rank, report in reports.items() if _process_state(report) in ("T", "t")}
        silent = {rank: state_of(reports[rank]) for rank in late}
        return Hang([], silent, reports, 0.0, None, "").text().partition("\n")[2]

    def _limit(self, seen: _Seen) -> float:
        limit = self.limits[seen.report.phase]
        return max(limit, _SLOW_AGAIN * seen.longest_silence) if seen.report.phase == TRAINING else limit

    def _is_silent(self, seen: _Seen, signalled: float) -> bool:
        """After a signal: whether a rank's reports have stopped. One that has sent none yet, as imports take long on a
        busy host, gets time from the signal on."""
        if seen.report.tick:
            return self.now - seen.alive > SILENT_AFTER_SIGNAL
        return self.now - max(seen.alive, signalled) > STILL_AFTER_SIGNAL

    def _beats(self, seen: _Seen) -> bool:
        """Whether the rank's phase is one in which collectives come often."""
        return seen.report.phase in (TRAINING, "evaluation")

    def _verdict(
        self, running: Mapping[int, _Seen], silent: list[int], seconds: float, limit: float | None, phase: str
    ) -> Hang:
        reports = {rank: seen.report for rank, seen in running.items()}
        why = {rank: state_of(reports[rank]) for rank in silent}  # now: what ends the run kills them
        return Hang(silent or awaited(reports), why, reports, seconds, limit, phase)


def awaited(reports: Mapping[int, RankReport]) -> list[int]:
    """The ranks that the others wait for: not in a collective while others are, else behind; all where that says
    nothing. Pipeline stages issue different numbers of collectives, so there the count alone says nothing."""
    elsewhere = [rank for rank, report in reports.items() if not report.waits]
    if 0 < len(elsewhere) < len(reports):
        return elsewhere
    least = min((report.step, report.issued) for report in reports.values())
    return [rank for rank, report in reports.items() if (report.step, report.issued) == least]


def limits_of(train: TrainSection) -> dict[str, float]:
    """Seconds by phase; empty where `train.hang_timeout` is null."""
    if train.hang_timeout is None:
        return {}
    return {TRAINING: train.hang_timeout, **train.hang_limits.model_dump()}
