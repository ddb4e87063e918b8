"""Documents to ids, in this process or in several, in the order in which they came.

Worker processes import this module and what it needs, not torch.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers

from colrow.data.tokenizer import Tokenizer
from colrow.errors import DataError

_IN_FLIGHT = 2
"""Chunks queued for each worker: enough to keep it busy, few enough for constant memory."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Some documents as ids, one after another, and what is known of each."""

    ids: np.ndarray
    """[tokens]"""
    lengths: np.ndarray
    """[documents] int64, tokens of each"""
    fractions: np.ndarray
    """[documents] float64 in [0, 1), from a hash of the text: held out where the validation fraction is greater"""
    text_bytes: np.ndarray
    """[documents] int64, UTF-8"""
    special: int
    """Documents that spell a special token."""


def encode(texts: list[str], tokenizer: Tokenizer, dtype: str) -> Encoded:
    """`texts` as ids of `dtype`."""
    encoded = tokenizer.encode_batch(texts)
    raw = [text.encode("utf-8") for text in texts]
    hashes = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in raw)
    lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
    return Encoded(
        ids=np.fromiter(itertools.chain.from_iterable(encoded), dtype=dtype, count=int(lengths.sum())),
        lengths=lengths,
        # 53 bits: all that a float64 holds exactly, so that a fraction is never rounded up to 1.0
        fractions=(np.frombuffer(hashes, dtype="<u8") >> np.uint64(11)) * 2.0**-53,
        text_bytes=np.array([len(text) for text in raw], dtype=np.int64),
        special=sum(map(tokenizer.spells_special, texts)),
    )


def encode_in_order(chunks: Iterator[list[str]], tokenizer: Tokenizer, dtype: str, workers: int) -> Generator[Encoded]:
    """Each chunk of documents encoded, in the order of `chunks`, by `workers` processes (1: this one).

    Raises:
        DataError: a worker process died.
    """
    if workers == 1:
        for chunk in chunks:
            yield encode(chunk, tokenizer, dtype)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # fork would copy the locks of running threads
        initializer=_start_worker,
        initargs=(tokenizer.backend.to_str(), tokenizer.eos_id, tokenizer.special, dtype),
    )
    pending: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:  # results are taken in the order of submission: the shards do not depend on `workers`
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) >= workers * _IN_FLIGHT:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {workers} tokenizing processes died (out of memory, or started by a script that does its work "
            f'outside `if __name__ == "__main__":`): set data.workers to a smaller number; 1 starts none'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_worker: tuple[Tokenizer, str]
"""What _start_worker made; it exists in worker processes alone."""


def _start_worker(backend: str, eos_id: int, special: bool, dtype: str) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent ends its workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker = (Tokenizer(tokenizers.Tokenizer.from_str(backend), eos_id, {}, special), dtype)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _encode_in_worker(texts: list[str]) -> Encoded:
    return encode(texts, *_worker)


def _exit_with_parent() -> None:
    """A killed parent cannot end its workers, and the executor's worker loop would wait for its next task forever."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    os._exit(1)
