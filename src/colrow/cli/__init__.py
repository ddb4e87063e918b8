"""The `colrow` command: one module for each verb, imported when it is called, so that `--help` is quick."""

from __future__ import annotations

import importlib
import os
import signal
import sys

from colrow.cli.ranks import is_rank, reporting_errors, signal_of, user_error
from colrow.errors import ColrowError, did_you_mean

VERBS = {
    "train": "start or continue a run",
    "plan": "show a plan: each parameter, each collective of a layer",
    "check": "find what is wrong with a plan, without a GPU",
    "forecast": "say what each mesh will cost in memory and time, without a GPU",
    "verify": "prove on a CPU that the sharded model has the loss and gradients of one process",
    "checkpoints": "list a run's checkpoints and their state",
    "export": "write a run's weights as a Hugging Face folder",
    "generate": "sample text from a run or an export",
    "bench": "measure step time and memory of several plans in turn",
    "calibrate": "measure the GPUs of a host, for forecasts",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Exit status: see `docs/guide/exit-codes.md`."""
    args = sys.argv[1:] if argv is None else argv
    try:
        status = _run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as error:
        number = signal_of(error)
        print(f"colrow {args[0]}: stopped by {number.name}", file=sys.stderr)
        return 128 + number
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 128 + signal.SIGPIPE


def _run(args: list[str]) -> int:
    """Run the verb that these words begin with, or print the list. Returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print("usage: colrow VERB ...\n")
        for verb, what in VERBS.items():
            print(f"  {verb:12} {what}")
        print("\n`colrow VERB --help` lists its flags.")
        return 0 if args else 2
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        near = did_you_mean(verb, VERBS)
        print(
            f"colrow: unknown verb {verb!r}{near if '?' in near else ': `colrow --help` lists them'}", file=sys.stderr
        )
        return 2
    try:
        module = importlib.import_module(f"colrow.cli.{verb}")
        if is_rank():  # its error goes to the launcher, in whatever verb
            with reporting_errors(verb):
                return int(module.main(rest))
        return int(module.main(rest))
    except (ColrowError, OSError) as error:
        if isinstance(error, BrokenPipeError) or (text := user_error(error)) is None:
            raise
        print(f"colrow {verb}: error: {text}", file=sys.stderr)
        return 2
