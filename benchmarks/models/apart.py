"""Each model in a process of its own, under a limit of CPU time: a crash or a loop costs one model."""

from __future__ import annotations

import multiprocessing
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any

import torch

Row = dict[str, Any]
Examine = Callable[[str, Sequence[int], Callable[[str], None]], Iterator[Row]]
"""Rows of a model at each degree; the last argument is called with what comes next."""


def _child(examine: Examine, model: str, degrees: Sequence[int], limit: int, to: Connection) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    for row in examine(model, degrees, lambda text: to.send(text)):
        to.send(row)
    to.send(None)


def run_one(examine: Examine, model: str, degrees: Sequence[int], limit: int) -> list[Row]:
    """The rows of one model, with `seconds`; one for each degree, also where the process ended without it."""
    context = multiprocessing.get_context("fork")  # what is imported here need not be imported again
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(examine, model, degrees, limit, theirs))
    start = time.monotonic()
    process.start()
    theirs.close()
    rows: list[Row] = []
    phase, why = "starting", ""
    while True:
        try:
            message = ours.recv()
        except EOFError:
            process.join()
            late = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            why = f"no result within {limit} s of CPU" if late else f"the process ended with {process.exitcode}"
            why = f"{why}, while {phase}"
            break
        if message is None:
            break
        if isinstance(message, str):
            phase = message
        else:
            rows.append(message)
    process.join()
    verdict = {"starting": "not built", "building": "not built", "tracing": "untraceable"}.get(phase, "fails")
    done = {row["tp"] for row in rows}
    rows += [{"model": model, "tp": tp, "verdict": verdict, "reason": why} for tp in degrees if tp not in done]
    seconds = round(time.monotonic() - start, 1)
    return [{"seconds": seconds} | row for row in rows]


def run_all(
    jobs: Sequence[tuple[str, Sequence[int]]],
    examine: Examine,
    *,
    at_once: int = 1,
    limit: int = 120,
    budget: float = float("inf"),
) -> Iterator[list[Row]]:
    """The rows of each model, in the order in which they come; no model is started after `budget` seconds."""
    with ProcessPoolExecutor(at_once, multiprocessing.get_context("fork")) as pool:
        futures = [pool.submit(run_one, examine, model, degrees, limit) for model, degrees in jobs]
        seen: set[Future[list[Row]]] = set()
        try:
            for future in as_completed(futures, timeout=None if budget == float("inf") else budget):
                seen.add(future)
                yield future.result()
        except TimeoutError:
            pool.shutdown(cancel_futures=True)  # waits for those that run
        yield from (f.result() for f in futures if f not in seen and not f.cancelled())
