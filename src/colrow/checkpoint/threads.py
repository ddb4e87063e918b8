"""Reading and writing several files at a time: checksums and copies release the interpreter's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = 4


def in_threads(work: Callable[[T], R], values: Iterable[T]) -> list[R]:
    """`work` of each value, in their order. The first failure is raised once no thread works any more."""
    values = list(values)
    if len(values) < 2:
        return [work(value) for value in values]
    with ThreadPoolExecutor(min(THREADS, len(values))) as pool:
        futures = [pool.submit(work, value) for value in values]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
