"""Ends a run that hangs: from its launcher, and from its ranks where torchrun is the launcher."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from colrow.run.hang import Hang, HangWatch, limits_of
from colrow.run.hang_record import FOLDER, REQUEST_FILE, write_for_silent, write_record
from colrow.run.heartbeat import REPORT_FILE, Heartbeat, RankReport, Reporter, report_interval

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from colrow.config_sections import TrainSection

_ANSWER_SECONDS = 4.0
"""How long ranks have to write their records."""


class LauncherGuard:
    """Watches the ranks that this process has launched, by the reports in their folders.

    Args:
        run: the run's folder.
    """

    def __init__(self, train: TrainSection, run: Path, ranks: int) -> None:
        self._folder, self._ranks = run / FOLDER, range(ranks)
        self._interval = report_interval(train)
        self._watch = HangWatch(limits_of(train), self._ranks, self._interval)
        self.hang: Hang | None = None
        self._text = self._unwritten = ""

    def look(self, launched: Path, signalled: float | None) -> None:
        """Read the reports; where the run hangs, keep what is known and kill the ranks.

        Args:
            launched: the folder that holds the ranks' folders.
            signalled: when the run was asked to end, in `time.monotonic()`.
        """
        now = time.monotonic()
        # called ten times a second; reports come once an interval
        if self.hang is not None or now - self._watch.now < self._interval / 2:
            return
        self._watch.take((report for _, report in _reports(launched)), now)
        hang = self._watch.hang(signalled)
        if hang is None:
            return
        self.hang, self._text = hang, hang.text()
        try:
            self._keep(hang, launched)
        except OSError as error:  # a full disk must not keep the run from its end
            self._unwritten = error.strerror or str(error)
        for report in self._watch.reports.values():
            kill(report)

    def text(self, asked_by: int | None) -> str:
        """Why the run was ended: after `asked_by`, a signal, if one came."""
        return message(self._text, self._folder, asked_by, self._unwritten)

    def describe(self) -> str:
        """Where each rank is; empty where nothing is watched."""
        return self._watch.describe()

    def _keep(self, hang: Hang, launched: Path) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for folder, report in _reports(launched):
            if report.rank not in hang.silent:
                (folder / REQUEST_FILE).write_text(str(self._folder.resolve()), encoding="utf-8")
        answering = hang.reports.keys() - set(hang.silent)
        end = time.monotonic() + _ANSWER_SECONDS
        while time.monotonic() < end and not all((self._folder / f"rank-{r}.json").exists() for r in answering):
            time.sleep(0.05)
        missing = [r for rank, r in hang.reports.items() if not (self._folder / f"rank-{rank}.json").exists()]
        self._text = hang.text(write_for_silent(self._folder, missing, "the launcher"))
        (self._folder / "message.txt").write_text(self._text + "\n", encoding="utf-8")


def _reports(launched: Path) -> Iterator[tuple[Path, RankReport]]:
    for file in launched.glob(f"*/attempt_*/*/{REPORT_FILE}"):
        with suppress(OSError, ValueError, TypeError):  # the rank is just writing it, or has ended
            yield file.parent, RankReport.from_json(file.read_bytes())


def answer_request(rank_folder: Path, report: RankReport) -> None:
    """Write this rank's record where its launcher asks for it."""
    request = rank_folder / REQUEST_FILE
    with suppress(OSError, ValueError, RuntimeError):  # the group may be gone in this moment
        if request.exists():
            folder = Path(request.read_text(encoding="utf-8"))
            request.unlink()
            write_record(folder, report)


class RankGuard:
    """Reports for this rank while it runs: a context manager around all that it does.

    Where torchrun is the launcher, which does not watch, it also watches the other ranks, once `join` has given it a
    store. Each rank does, so that those which run see the one that does not.

    Args:
        run: the run's folder.
        folder: what the launcher gave this rank, or None without a launcher.
        asked_to_end: whether the run was asked to end.
        give_up: called with the text and the seconds since the hang began, before this rank ends itself.
    """

    def __init__(
        self,
        train: TrainSection,
        run: Path,
        rank: int,
        ranks: int,
        folder: Path | None,
        asked_to_end: Callable[[], bool],
        give_up: Callable[[str, float], None],
    ) -> None:
        self._run, self._rank, self._ranks, self._rank_folder = run / FOLDER, rank, ranks, folder
        self._asked_to_end, self._give_up = asked_to_end, give_up
        self._interval = report_interval(train)
        self._limits = limits_of(train)
        self._keys = [f"colrow/heartbeat/{each}" for each in range(ranks)]
        self._store: Store | None = None
        self._signalled: float | None = None
        self.heartbeat = Heartbeat()
        self._reporter = Reporter(self.heartbeat, rank, self._interval, folder, self._look)

    def __enter__(self) -> RankGuard:
        self._reporter.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._reporter.__exit__(*error)

    def join(self, store: Store) -> None:
        """Watch the other ranks from now on. Collective, like the making of a process group that follows.

        Args:
            store: shared by the ranks of this start; no rank of another start uses it.
        """
        # a connection of its own: the main thread may block on the other one for as long as it likes
        own: Store = store.clone()  # type: ignore[attr-defined]  # since torch 2.9
        own.set_timeout(timedelta(seconds=2 * self._interval))
        own.set(self._keys[self._rank], RankReport(self._rank).to_json())
        self._watch = HangWatch(self._limits, range(self._ranks), self._interval)
        self._store = own  # last: the reporter's thread looks at it

    def _look(self, report: RankReport) -> None:
        if self._rank_folder is not None:
            answer_request(self._rank_folder, report)
        if self._store is not None:
            self._judge(report, self._store)

    def _judge(self, report: RankReport, store: Store) -> None:
        """Send this rank's report, read the others', and end this rank where the run hangs."""
        reports = [report]
        with suppress(RuntimeError, ValueError):  # the store is out of reach: no news of the others
            store.set(self._keys[self._rank], report.to_json())
            if store.check(self._keys):
                reports = [RankReport.from_json(text) for text in store.multi_get(self._keys)]
        now = time.monotonic()
        self._watch.take(reports, now)
        if self._signalled is None and self._asked_to_end():
            self._signalled = now
        hang = self._watch.hang(self._signalled)
        if hang is None or self._rank in hang.silent:
            return
        is_first = self._rank == min(hang.reports.keys() - set(hang.silent))
        text = hang.text()
        unwritten = ""
        try:
            text = self._keep(hang, report, is_first)
        except OSError as error:  # a full disk must not keep the run from its end
            unwritten = error.strerror or str(error)
        by_signal = signal.SIGTERM if self._signalled is not None else None
        self._give_up(message(text, self._run, by_signal, unwritten), hang.seconds)
        for each in hang.silent if is_first else ():  # now that torchrun has the reason: it would wait for 30 s
            if hang.reports[each].host == report.host:
                kill(hang.reports[each])
        os._exit(1)

    def _keep(self, hang: Hang, report: RankReport, is_first: bool) -> str:
        self._run.mkdir(parents=True, exist_ok=True)
        write_record(self._run, report)
        # The others write theirs meanwhile: torchrun ends them when the first one has ended.
        time.sleep(_ANSWER_SECONDS / 2 if is_first else _ANSWER_SECONDS)
        if not is_first:
            return hang.text()
        text = hang.text(
            write_for_silent(self._run, [hang.reports[each] for each in hang.silent], f"rank {self._rank}")
        )
        (self._run / "message.txt").write_text(text + "\n", encoding="utf-8")
        return text


def message(text: str, folder: Path, asked_by: int | None, unwritten: str = "") -> str:
    """Why a run was ended, for people.

    Args:
        text: the hang's.
        unwritten: why the record in `folder` is not complete.
    """
    if asked_by is not None:
        text = f"{signal.Signals(asked_by).name} came, and the run could not save:\n{text}"
    record = f"{folder}, not complete ({unwritten})" if unwritten else folder
    return f"{text}\nflight recorder and stacks: {record}\nnothing of the steps since the last checkpoint is saved"


def kill(report: RankReport) -> None:
    """Kill a rank of this host. A stopped process, too, ends by SIGKILL."""
    if report.pid > 0:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(report.pid, signal.SIGKILL)
