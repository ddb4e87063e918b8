"""`colrow train CONFIG.yaml [--mesh.tp 4 ...]`: start or continue a run.

Under torchrun this process is a rank. Otherwise it resolves and checks the plan, prepares the data, and starts
torchrun's launcher with as many local ranks as the mesh has.
"""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from colrow.config import RunConfig, load_config, read_flags
from colrow.errors import ColrowError, ConfigError

if TYPE_CHECKING:  # `colrow train --help` need not wait for torch
    from colrow.run.host_log import HostLog
    from colrow.run.rank import RankInfo

PLAN_DIGEST = "COLROW_PLAN_DIGEST"
"""SHA-256 of the run folder's plan.yaml, for ranks whose launcher resolved and checked the plan; torchrun does not."""

USAGE = """usage: colrow train CONFIG.yaml [--KEY VALUE ...]

Starts the run that CONFIG.yaml describes, or continues it from its newest checkpoint.
Every key is a flag: colrow train configs/laptop.yaml --mesh.tp 4 --train.steps 20
`colrow train CONFIG.yaml --help` lists the keys with their values."""


def main(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise ConfigError(f"the config file comes first: colrow train CONFIG.yaml {' '.join(argv)}")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _rank(argv)
    try:
        return _start(argv)
    except KeyboardInterrupt:  # before the ranks were started: the data that is prepared stays in the cache
        print("colrow train: interrupted before the first step", file=sys.stderr)
        return 130


def read_config(argv: list[str]) -> RunConfig:
    """The config of `CONFIG.yaml --key value ...`, with all that is chosen for the user filled in."""
    from colrow.run.preflight import resolve

    return resolve(_requested(argv))


def _requested(argv: list[str]) -> RunConfig:
    if "-h" in argv or "--help" in argv:
        _print_keys(argv[0])
    from colrow.run.run_folder import is_of_a_run
    from colrow.run.trust import require_trusted

    flags, file = read_flags(argv[1:]), Path(argv[0])
    config = load_config(file, flags)
    if is_of_a_run(file):
        require_trusted(config, file, flags.get("model.trust_code") is True)
    return config


def _print_choices(requested: RunConfig, config: RunConfig) -> None:
    most, taken = requested.train.micro_batch, config.train.micro_batch
    if taken != most:
        print(f"chosen     train.micro_batch {taken}: the largest up to {most} that fits {config.mesh}")


def _print_keys(path: str) -> NoReturn:
    """Print every key with what it means and its value in this file, and exit."""
    import tyro

    tyro.cli(
        RunConfig,
        prog=f"colrow train {path}",
        default=load_config(path),
        args=["--help"],
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    raise AssertionError("tyro exits after --help")


def _start(argv: list[str]) -> int:
    from colrow.data.prepare import prepare
    from colrow.run import preflight
    from colrow.run.forecast_line import forecast_lines
    from colrow.run.hang_guard import LauncherGuard
    from colrow.run.host_log import last_lines
    from colrow.run.launch import launch
    from colrow.run.outputs import output_lines
    from colrow.run.rank import finished_line
    from colrow.run.run_folder import require_free, write_plan

    requested = _requested(argv)
    config = preflight.resolve(requested)
    _print_choices(requested, config)
    require_free(config.run.dir)
    checked = preflight.check(config)
    if checked.finished(config):
        assert checked.newest is not None
        print(finished_line(config, checked.newest.step))
        return 0
    for line in checked.changes:
        print(f"changed    {line}")
    for line in preflight.check_plan(config, checked.source, checked.plan, checked.judgement):
        print(line)
    for line in output_lines(config, checked.source):
        print(line)
    for line in forecast_lines(config, checked.source.model, checked.plan):
        print(line)
    data = prepare(config.data, checked.source.vocab_size, progress=True)
    preflight.check_checkpoint(checked, data.tokenizer)
    ranks = config.mesh.world_size
    os.environ.setdefault("OMP_NUM_THREADS", str(preflight.threads_for(ranks)))
    os.environ[PLAN_DIGEST] = write_plan(config.run.dir, checked.plan)
    guard = LauncherGuard(config.train, config.run.dir, ranks)
    ended = launch(["-m", "colrow", "train", *argv], ranks, guard=guard)
    if ended.failure is not None and ended.status != 128 + signal.SIGPIPE:
        text = ended.failure.text.strip()
        if ended.failure.is_silent and (lines := last_lines(config.run.dir, ended.failure.rank)):
            text += "\n" + "\n".join(["its last lines:", *lines])
        print(f"colrow train: error: {text}", file=sys.stderr)
    return ended.status


def _rank(argv: list[str]) -> NoReturn:
    from colrow.run.heartbeat import end_with_launcher

    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:  # torchrun's agent, here or in a launcher of its own, has started this process and waits for it
        end_with_launcher()
    with reporting_errors(Path(error_file) if error_file else None) as ending:
        import torch

        from colrow.run import preflight
        from colrow.run.hang_guard import RankGuard
        from colrow.run.host_log import HostLog
        from colrow.run.rank import run_rank
        from colrow.run.run_folder import read_plan
        from colrow.run.stop import StopRequest

        requested, info = _requested(argv), rank_info()
        config = preflight.resolve(requested)
        ending.log = HostLog(config.run.dir, info.rank)
        ending.log.copy_stderr()
        folder = Path(error_file).parent if error_file else None
        with StopRequest(folder) as stop:
            guard = RankGuard(
                *(config.train, config.run.dir, info.rank, info.world_size, folder),
                asked_to_end=lambda: stop.requested,
                give_up=lambda text, seconds: _report_hang(text, time.time() - seconds, error_file, ending.log),
            )
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(preflight.threads_for(info.local_world_size))
            digest = os.environ.get(PLAN_DIGEST)
            if info.rank == 0 and digest is None:
                _print_choices(requested, config)
            plan = read_plan(config.run.dir, digest) if digest else None
            command = shlex.join(["colrow", "train", *argv])
            with guard:
                run_rank(config, info, command, lambda: stop.requested, plan, guard, ending.log.write)
            ending.log.write("ended")
    # A thread of torch that still runs at the interpreter's end can abort the process, after all is saved and said.
    ending.exit(0)


def rank_info() -> RankInfo:
    """What torchrun's environment variables say of this process."""
    from colrow.run.rank import RankInfo

    world_size = int(os.environ["WORLD_SIZE"])
    return RankInfo(
        rank=int(os.environ["RANK"]),
        local_rank=int(os.environ.get("LOCAL_RANK", os.environ["RANK"])),
        world_size=world_size,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
    )


class Ending:
    """How this process ends. `log`: its host's, once the run's folder is known."""

    log: HostLog | None = None

    def exit(self, status: int) -> NoReturn:
        """End at once, with all that was written where it belongs."""
        sys.stdout.flush()
        sys.stderr.flush()
        if self.log is not None:
            self.log.close()
        os._exit(status)


@contextmanager
def reporting_errors(error_file: Path | None) -> Iterator[Ending]:
    """On an error, end this process at once, with the text in the launcher's error file, or on stderr without one.

    os._exit, because a normal exit would destroy the process group, and so wait for ranks that are gone.
    """
    from colrow.run.launch import EXIT_USER_ERROR, write_error

    ending = Ending()
    try:
        yield ending
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        when = time.time()
        is_closed = isinstance(error, BrokenPipeError)  # `colrow train ... | head`: an end without an error
        is_user_error = isinstance(error, ColrowError) or _disk_is_full(error)
        text = "the output is closed" if is_closed else str(error) if is_user_error else traceback.format_exc()
        if _disk_is_full(error):
            text += ": free some space, then start the same command again; it continues from the newest checkpoint"
        status = 128 + signal.SIGPIPE if is_closed else EXIT_USER_ERROR if is_user_error else 1
        if error_file is not None and not is_user_error and "onnection" in text:
            # Lost connections follow from another rank's failure: let that rank write its error, and be the first.
            end = time.monotonic() + 2.0
            if ending.log is not None and (cause := _cause_elsewhere(ending.log.run, when, end)):
                print(
                    f"colrow train: {cause}", file=sys.stderr, flush=True
                )  # now: torchrun may end this rank meanwhile
                text += f"\n{cause}"
            time.sleep(max(0.0, end - time.monotonic()))
        if ending.log is not None:
            ending.log.write_failure(when, text)
        if error_file is None:
            print(f"colrow train: error: {text}", file=sys.stderr)
        else:
            write_error(error_file, text, when, status)
        ending.exit(status)


def _cause_elsewhere(run: Path, when: float, end: float) -> str:
    """What a rank of another agent's, whose error torchrun does not show here, has said of its failure, as soon as it
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


def _report_hang(text: str, when: float, error_file: str | None, log: HostLog | None) -> None:
    """Say that the run hangs: in the host's log and the launcher's error file, or on stderr without one.

    Args:
        when: it began. torchrun shows the earliest of several failures, and the other ranks end for this one.
    """
    from colrow.run.launch import write_error

    if log is not None:
        log.write_failure(when, text)
    if error_file is None:
        print(f"colrow train: error: {text}", file=sys.stderr, flush=True)
    else:
        write_error(Path(error_file), text, when, 1)


def _disk_is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
