"""What a process is that a launcher has started as a rank, and how it ends: for all verbs."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from colrow.errors import ColrowError, ConfigError

if TYPE_CHECKING:  # `colrow train --help` need not wait for torch
    from colrow.run.host_log import HostLog
    from colrow.run.process_group import RankInfo


def rank_folder() -> Path | None:
    """The folder that the launcher gave this rank; None without a launcher."""
    file = _error_file()
    return None if file is None else file.parent


def _error_file() -> Path | None:
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(path) if path else None


def rank_info() -> RankInfo:
    """What torchrun's environment variables say of this process.

    Raises:
        ConfigError: they are not torchrun's.
    """
    from colrow.run.process_group import RankInfo

    world_size = world_size_here()
    rank = _number("RANK")
    return RankInfo(
        rank=rank,
        local_rank=_number("LOCAL_RANK", rank),
        world_size=world_size,
        local_world_size=_number("LOCAL_WORLD_SIZE", world_size),
    )


def world_size_here() -> int:
    """The number of ranks that torchrun has started; 1 where it has started none.

    Raises:
        ConfigError: the environment variables are not torchrun's: left over, or set by hand.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return 1
    size = _number("WORLD_SIZE")
    if size < 1 or not 0 <= _number("RANK") < size:
        raise ConfigError(f"RANK={os.environ['RANK']} and WORLD_SIZE={size} of the environment do not fit: {_UNSET}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing and size > 1:
        raise ConfigError(f"RANK and WORLD_SIZE are set in the environment, {missing[0]} is not: {_UNSET}")
    return size


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text[:24]!r} of the environment is no number: {_UNSET}")
    return int(text)


_UNSET = "start by torchrun, or unset them"


def is_rank() -> bool:
    """Whether torchrun, or a launcher of colrow's, has started this process."""
    return "RANK" in os.environ and _error_file() is not None


def signal_of(error: KeyboardInterrupt) -> signal.Signals:
    """The signal that stops this process."""
    return signal.Signals(error.args[0]) if error.args else signal.SIGINT


def user_error(error: BaseException) -> str | None:
    """What to print of an error that its reader can correct: one of colrow's, or of a file or a disk. Else None."""
    if isinstance(error, ColrowError):
        return str(error)
    if type(error).__module__.startswith(_COMPILER):  # its errors carry the system's as text
        for number, fix in _FILE_ERRORS.items():
            if number in _OF_A_CACHE and (reason := os.strerror(number)) in str(error):
                return f"torch.compile cannot write its cache: {reason}{fix} (TORCHINDUCTOR_CACHE_DIR names its folder)"
    if not isinstance(error, OSError) or error.errno not in _FILE_ERRORS:
        return None
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{names or 'a file'}: {error.strerror}{_FILE_ERRORS[error.errno]}"


_PERMISSIONS = ": see who owns it and who may write there"
_FULL = ": free some space, then start the same command again"
_FILE_ERRORS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: ": the file system or `ulimit -f` bounds the size of a file",
    errno.EACCES: _PERMISSIONS,
    errno.EPERM: _PERMISSIONS,
    errno.EROFS: ": give a folder on another disk",
    errno.ENOENT: ": give a path that exists",
    errno.ENOTDIR: ": one of its folders is a file",
    errno.EISDIR: ": give a file",
    errno.ENAMETOOLONG: "",
    errno.ELOOP: "",
    errno.EMFILE: ": raise `ulimit -n`",
    errno.ENFILE: "",
    errno.EIO: ": the disk is damaged",
    errno.ESTALE: ": the network's disk has lost it",
}
"""What to do about each error of the operating system that is none of colrow's."""
_COMPILER = ("torch._inductor", "torch._dynamo")
_OF_A_CACHE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)

_FIRST_SECONDS = 3.0
"""Each rank may find the same error, such as a wrong config: others wait so long, and the host's first rank says it."""


class Ending:
    """How this process ends. `log`: its host's, once the run's folder is known."""

    log: HostLog | None = None

    def __init__(self, verb: str) -> None:
        self._verb = verb

    def report(self, text: str, when: float, status: int) -> None:
        """Say that this process fails: in the host's log and the launcher's error file, or on stderr without one.

        Args:
            when: seconds of the epoch.
        """
        from colrow.run.launch import write_error

        if self.log is not None:
            self.log.write_failure(when, text)
        if (file := _error_file()) is None:
            print(f"colrow {self._verb}: error: {text}", file=sys.stderr, flush=True)
        else:
            write_error(file, text, when, status)

    def exit(self, status: int) -> NoReturn:
        """End at once, with all that was written where it belongs."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.log is not None:
            self.log.close()
        os._exit(status)


@contextmanager
def reporting_errors(verb: str = "train") -> Iterator[Ending]:
    """On an error, end this process at once, with the text in the launcher's error file, or on stderr without one.
    It ends with its launcher, too.

    os._exit, because a normal exit would destroy the process group, and so wait for ranks that are gone.
    """
    from colrow.run.launch import EXIT_USER_ERROR  # now: after an error (too many open files) no import may work

    if _error_file() is not None:  # torchrun's agent, here or in a launcher of its own, has started this process
        from colrow.run.heartbeat import end_with_launcher

        end_with_launcher()
    ending = Ending(verb)
    try:
        yield ending
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        when = time.time()
        if isinstance(error, BrokenPipeError):  # `colrow train ... | head`: an end without an error
            text, status = "the output is closed", 128 + signal.SIGPIPE
        elif (what := user_error(error)) is not None:
            text, status = what, EXIT_USER_ERROR
        else:
            text, status = traceback.format_exc(), 1
            if _error_file() is not None and "onnection" in text:
                text += _cause_of_lost_connection(ending, when)
        if status == EXIT_USER_ERROR and is_rank() and os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(_FIRST_SECONDS)  # torchrun ends this rank meanwhile: it shows the text of each rank's error
        ending.report(text, when, status)
        ending.exit(status)


def _cause_of_lost_connection(ending: Ending, when: float) -> str:
    """A line on the failure that made this rank lose a connection, where it is known; takes two seconds, in which the
    rank that failed writes its error and is the first to have one."""
    end, text = time.monotonic() + 2.0, ""
    if ending.log is not None and (cause := _cause_elsewhere(ending.log.run, when, end)):
        print(f"colrow train: {cause}", file=sys.stderr, flush=True)  # now: torchrun may end this rank soon
        text = f"\n{cause}"
    time.sleep(max(0.0, end - time.monotonic()))
    return text


def _cause_elsewhere(run: Path, when: float, end: float) -> str:
    """The failure that a rank of another agent, whose error torchrun does not show here, has reported, as soon as it
    has; empty where none has until `end`, in `time.monotonic()`."""
    from colrow.run.host_log import failed_rank, last_lines

    info = rank_info()
    first = info.rank - info.local_rank
    while time.monotonic() < end:
        failed = failed_rank(run, when - 10.0)
        if failed is not None:
            rank, host = failed
            if first <= rank < first + info.local_world_size:
                return ""
            return f"rank {rank} on {host} failed first; its last lines:\n" + "\n".join(last_lines(run, rank))
        time.sleep(0.1)
    return ""
