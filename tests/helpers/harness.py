"""Groups of ranks for tests: processes that start once, import torch once, and then run many cases.

A case is a module-level function `fn(device, *args)`, called on every rank under an initialised default process group
(gloo on CPUs, NCCL with `--device cuda`). What it returns comes back, one value a rank; what it raises on any rank
fails the test with that rank's traceback, and the group is started again for the next case.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import multiprocessing as mp
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

TIMEOUT = 500.0
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "pydantic",
    "tokenizers",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "colrow.run.rank",
    "torch._functorch.partitioners",
    "networkx",
    "pytest",
]
"""What takes seconds to import, and starts neither threads nor CUDA."""


def forkserver() -> Any:
    """The context whose processes are forked from one that has imported what they need."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class RankError(AssertionError):
    """A case failed on a rank; the text is that rank's traceback."""


class Group:
    """`world` processes that stay alive between cases."""

    def __init__(self, world: int, device: str, limit: float = float("inf")) -> None:
        self.world, self.device, self.limit = world, device, limit
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """fn(device, *args) on every rank; the list of what the ranks returned.

        After `timeout` seconds, or the group's limit where that is less, it fails with the stacks of the silent ranks.
        """
        timeout = min(timeout, self.limit)
        if not self._processes:
            self._start()
        try:
            for pipe in self._pipes:
                pipe.send((fn, args))
        except BrokenPipeError as error:  # the next case must not meet what is left of this group
            self.stop()
            raise RankError(f"a rank of {self.world} died before the case began") from error
        results: dict[int, Any] = {}
        end = time.monotonic() + timeout
        while len(results) < self.world:
            open_pipes = [p for i, p in enumerate(self._pipes) if i not in results]
            ready = wait(open_pipes, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                missing = [i for i in range(self.world) if i not in results]
                stacks = self._stacks(missing)
                self.stop()
                raise RankError(f"ranks {missing} gave no answer within {timeout:.0f} s\n{stacks}")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    ok, value = False, "the process died"
                if not ok:
                    self.stop()
                    raise RankError(f"rank {rank} of {self.world}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world)]

    def stop(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._processes, self._pipes = [], []

    def _stacks(self, ranks: list[int]) -> str:
        """Where these ranks are in their Python code."""
        files = {rank: file for rank in ranks if (file := self._stack_file(rank)).exists()}
        for rank in files:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(1.0)
        return "\n".join(f"rank {rank}: {file.read_text(encoding='utf-8')}" for rank, file in files.items())

    def _stack_file(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank-{rank}"

    def _start(self) -> None:
        import torch.distributed as dist

        # the store is here, on a port that the system chose: ranks that look for a free one may both find it
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._folder = tempfile.TemporaryDirectory()
        context = forkserver()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            args = (theirs, rank, self.world, self._store.port, self.device, self._stack_file(rank))
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


class Ranks:
    """`ranks(4)` is a group of four processes, started at first use and shared by the tests of a module."""

    def __init__(self, device: str, limit: float = float("inf")) -> None:
        self.device, self.limit = device, limit
        self._groups: dict[int, Group] = {}

    def __call__(self, world: int) -> Group:
        if self.device == "cuda":
            import pytest
            import torch

            if world > torch.cuda.device_count():
                pytest.skip(f"{world} ranks need {world} GPUs, and {torch.cuda.device_count()} are there")
        return self._groups.setdefault(world, Group(world, self.device, self.limit))

    def stop(self) -> None:
        for group in self._groups.values():
            group.stop()


def _serve(pipe: Connection, rank: int, world: int, port: int, device: str, stack_file: Path) -> None:
    gc.freeze()  # a collection would look through what was imported, and copy its pages
    faulthandler.register(signal.SIGUSR1, file=stack_file.open("w"))
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    import torch
    import torch.distributed as dist
    from torch.distributed import device_mesh

    # Equal meshes are one. Each axis is a process group, and each gloo group is threads that wake a hundred times a
    # second for as long as the process lives: hundreds of meshes would slow all ranks to a crawl.
    device_mesh.init_device_mesh = functools.cache(device_mesh.init_device_mesh)
    torch.set_num_threads(1)
    options: dict[str, Any] = {}
    if device == "cuda":
        # A process has a communicator for each axis of each mesh, up to a hundred. Of NCCL's usual buffers each takes
        # some 0.3 GiB of the GPU, which several test processes share.
        for name, value in {"MAX_NCHANNELS": 2, "MAX_P2P_NCHANNELS": 2, "BUFFSIZE": 1 << 18}.items():
            os.environ.setdefault(f"NCCL_{name}", str(value))
        torch.cuda.set_device(rank)
        options["device_id"] = torch.device("cuda", rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.TCPStore("127.0.0.1", port, is_master=False),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
        **options,
    )
    while True:
        try:
            fn, args = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, fn(device, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
