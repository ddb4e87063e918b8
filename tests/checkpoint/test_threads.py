"""Threads that read and write tensors, in a process that was forked from one that has used torch's thread pool."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from colrow.checkpoint.tensor_file import THREADS, in_threads

Run = Callable[[Callable[[Any], Any], Iterable[Any]], Any]


def fails_when_forked(run: Run) -> bool:
    source, barrier = torch.ones(300_000), Barrier(THREADS)  # large enough for the pool

    def copy(_: int) -> Tensor:
        target = torch.empty_like(source)
        barrier.wait()
        return target.copy_(source)

    child = os.fork()
    if child == 0:
        try:
            run(copy, range(THREADS))
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1] != 0


def plain_threads(work: Callable[[Any], Any], values: Iterable[Any]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, values))


def test_threads_of_a_forked_process_share_its_pool() -> None:
    torch.set_num_threads(torch.get_num_threads())  # makes this process's pool
    assert not any(fails_when_forked(in_threads) for _ in range(30))
    assert any(fails_when_forked(plain_threads) for _ in range(30))  # what torch does alone: nine of ten fail
