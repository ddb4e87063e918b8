"""`colrow train CONFIG.yaml [--mesh.tp 4 ...]`: start or continue a run.

Under torchrun this process is a rank. Otherwise it resolves and checks the plan, prepares the data, and starts
torchrun's launcher with as many local ranks as the mesh has.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from colrow.cli.config_flags import read_flags
from colrow.cli.ranks import rank_folder, rank_info, reporting_errors, signal_of
from colrow.config import RunConfig, load_config
from colrow.errors import ConfigError
from colrow.run import startup
from colrow.run.standby import Standby

if TYPE_CHECKING:  # `colrow train --help` need not wait for torch
    from colrow.run.launch import Ended
    from colrow.run.preflight import Checked

USAGE = """usage: colrow train CONFIG.yaml [--KEY VALUE ...]

Starts the run that CONFIG.yaml describes, or continues it from its newest checkpoint.
Every key is a flag: colrow train configs/laptop.yaml --mesh.tp 4 --train.steps 20
`colrow train CONFIG.yaml --help` lists the keys with their values."""


def main(argv: list[str]) -> int:
    """Exit statuses: docs/guide/exit-codes.md."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0].startswith("-"):
        config = next((word for word in argv if word.endswith((".yaml", ".yml"))), "CONFIG.yaml")
        words = [config, *(word for word in argv if word != config)]
        raise ConfigError(f"the config file comes first: colrow train {shlex.join(words)}")
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        _rank(argv)
    try:
        return _start(argv)
    except KeyboardInterrupt as error:  # before the ranks were started: the data that is prepared stays in the cache
        print(f"colrow train: stopped by {signal_of(error).name} before the first step", file=sys.stderr)
        return 128 + signal_of(error)


def _requested(argv: list[str]) -> RunConfig:
    if "-h" in argv or "--help" in argv:
        _print_keys(argv[0])
    from colrow.run.run_folder import load_trusted

    flags = read_flags(argv[1:])
    return load_trusted(Path(argv[0]), flags, auto=True, trust_code=flags.get("model.trust_code") is True)


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
    """The launcher: resolve, check, prepare, start the ranks and wait for them. Returns the exit status."""
    startup.begin()
    from colrow.run import preflight
    from colrow.run.auto import choose
    from colrow.run.hang_guard import LauncherGuard
    from colrow.run.launch import Beside, on_standby
    from colrow.run.outputs import will_export
    from colrow.run.rank import finished_line
    from colrow.run.run_folder import require_free, write_plan
    from colrow.run.standby import Orders

    startup.mark("imports")
    choice = choose(_requested(argv))
    config = preflight.resolve(choice.config)
    _print_lines(choice.lines)
    _print_choices(choice.config, config)
    require_free(config.run.dir)
    checked = preflight.check(config)
    if checked.finished(config):
        assert checked.newest is not None
        print(finished_line(config, checked.newest.step, will_export(config, checked.source)))
        return 0
    startup.mark("model and plan")
    ranks = config.mesh.world_size
    # else torchrun gives each rank one thread
    os.environ.setdefault("OMP_NUM_THREADS", str(preflight.threads_for(ranks)))
    with on_standby(["-m", "colrow", "train", *argv, *choice.flags], ranks) as started:
        _check_run(config, checked)
        _prepare_data(config, checked)
        sys.stdout.flush()  # ranks print to it from here on
        plan = write_plan(config.run.dir, checked.plan)
        guard = LauncherGuard(config.train, config.run.dir, ranks)
        orders = Orders(plan, startup.reading())
        ended = started.run(orders=orders, guard=guard, beside=Beside(partial(_forecast, config, checked)))
    _print_failure(config, ended)
    return ended.status


def _check_run(config: RunConfig, checked: Checked) -> None:
    """Print what changed, what the check found, and what the run will write. Raises where a part of it refuses the
    run."""
    from colrow.run import plan_check
    from colrow.run.outputs import output_lines

    _print_lines(f"changed    {line}" for line in checked.changes)
    _print_lines(plan_check.check_plan(config, checked.source, checked.plan, checked.judgement))
    _print_lines(output_lines(config, checked.source, checked.stored))
    startup.mark("check")


def _forecast(config: RunConfig, checked: Checked) -> None:
    """Print what the run will cost, and keep it for the ranks, whose weights and compilation take longer. Raises where
    the run cannot fit."""
    from colrow.run.forecast_line import forecast_run, gpus_here, keep_forecast

    forecast, lines = forecast_run(config, checked.source.model, checked.plan, gpus_here(config))
    print("".join(f"{line}\n" for line in lines), end="", flush=True)
    keep_forecast(config, forecast)


def _prepare_data(config: RunConfig, checked: Checked) -> None:
    """Tokenize the corpus, once for all ranks. Raises where the run to continue has read another text."""
    from colrow.data.prepare import prepare
    from colrow.run import preflight

    same_text = partial(preflight.require_text_of, checked, config)
    data = prepare(config.data, checked.source.vocab_size, progress=True, accept=same_text)
    preflight.require_vocabulary_of(checked, config, data.tokenizer)
    startup.mark("data")


def _print_failure(config: RunConfig, ended: Ended) -> None:
    from colrow.run.host_log import last_lines

    # SIGPIPE: whoever read the output has gone, as `head` does, and nobody would read an error
    if ended.failure is None or ended.status == 128 + signal.SIGPIPE:
        return
    text = ended.failure.text.strip()
    if ended.failure.is_silent and (lines := last_lines(config.run.dir, ended.failure.rank)):
        text += "\n" + "\n".join(["its last lines:", *lines])
    print(f"colrow train: error: {text}", file=sys.stderr)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _rank(argv: list[str]) -> NoReturn:
    """One rank, started by torchrun or by the launcher. It ends the process."""
    startup.begin()
    folder, standby = rank_folder(), Standby.begin()
    with reporting_errors() as ending:
        import torch

        from colrow.run import preflight
        from colrow.run.auto import choose
        from colrow.run.hang_guard import RankGuard
        from colrow.run.host_log import HostLog
        from colrow.run.rank import run_rank
        from colrow.run.run_folder import read_plan
        from colrow.run.stop import StopRequest

        orders = None if standby is None else standby.wait()
        if orders is not None:
            startup.begin(orders.clock)
        startup.mark("imports of ranks")
        choice, info = choose(_requested(argv), in_launcher=False), rank_info()
        requested = choice.config
        config = preflight.resolve(requested)
        ending.log = HostLog(config.run.dir, info.rank)
        ending.log.copy_stderr()
        with StopRequest(folder) as stop:
            guard = RankGuard(
                config.train,
                config.run.dir,
                info.rank,
                info.world_size,
                folder,
                asked_to_end=lambda: stop.requested,
                # the earliest of several failures is the one that torchrun shows, and the other ranks end for this one
                give_up=lambda text, seconds: ending.report(text, time.time() - seconds, 1),
            )
            if "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(preflight.threads_for(info.local_world_size))
            if info.rank == 0 and orders is None:
                _print_choices(requested, config)
            plan = None if orders is None else read_plan(config.run.dir, orders.plan)
            command = shlex.join(["colrow", "train", *argv])
            with guard:
                run_rank(config, info, command, lambda: stop.requested, plan=plan, guard=guard, log=ending.log.write)
            ending.log.write("ended")
    # A thread of torch that still runs at the interpreter's end can abort the process, after all is saved and said.
    ending.exit(0)
