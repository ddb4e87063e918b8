"""Ranks without GPUs: all of them in this process (LocalTensorMode), or a gloo process each."""

from __future__ import annotations

import multiprocessing as mp
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from colrow.dryrun.calls import is_huggingface
from colrow.dryrun.simulated import simulated_ranks
from colrow.errors import ColrowError, PlanError, first_line
from colrow.plans.plan import Plan
from colrow.sharding.parameter_state import copied_model, set_states, states_of
from colrow.verifying.comparison import Observed
from colrow.verifying.step import Task, sharded_step

_TIMEOUT = 300.0  # seconds in which all ranks must have answered


class RankFailure(Exception):
    """The sharded step raised, with this text."""


def can_simulate() -> bool:
    """Whether ranks can be simulated in this process: not where it has a process group."""
    return not dist.is_initialized()


def run_local(task: Task, plan: Plan) -> Observed:
    """The sharded step on all ranks, simulated. Raises RankFailure when it raises."""
    model = copied_model(task.model)
    try:
        with simulated_ranks(task.tp) as simulation:
            simulation.copy_to_ranks(model, task.written_buffers)
            return sharded_step(task, model, plan, simulation.mesh, simulation.local_tensors)
    except ColrowError:
        raise
    except Exception as error:
        raise RankFailure(f"{type(error).__name__}: {error}") from error


def run_gloo(task: Task, plan: Plan) -> Observed:
    """The sharded step in tp processes of this machine. The model and plan are pickled.

    Raises:
        RankFailure: a rank raised, died, or gave no answer in time.
    """
    # port 0: the system chooses, and this process listens from then on, so that no other can take the port
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    methods = mp.get_all_start_methods()  # a fork of this process would copy the locks of running threads
    context: Any = mp.get_context("forkserver" if "forkserver" in methods else "spawn")
    answers = context.Queue()
    payload = _pickle(task, plan)
    ranks = [
        context.Process(target=_gloo_rank, args=(rank, task.tp, store.port, payload, answers), daemon=True)
        for rank in range(task.tp)
    ]
    complete = False
    try:
        with _main_left_out(payload), _interrupts_blocked():
            for process in ranks:
                process.start()
        observed = _gathered(answers, ranks)
        complete = True
    finally:
        for process in ranks:
            if process.pid is None:  # it could not be started, as in a daemonic process
                continue
            if process.is_alive() and not complete:  # it waits for the ranks that failed
                process.kill()
            process.join()
    return observed


def _gathered(answers: Any, ranks: Sequence[Any]) -> Observed:
    """What all ranks observed. Raises RankFailure."""
    observed, answered, end = Observed(), 0, time.monotonic() + _TIMEOUT
    while answered < len(ranks):
        try:
            rank, ok, value = answers.get(timeout=0.5)
        except queue.Empty as error:
            dead = [i for i, process in enumerate(ranks) if process.exitcode not in (None, 0)]
            if dead or time.monotonic() > end:
                what = f"ranks {dead} died" if dead else f"the ranks gave no answer within {_TIMEOUT:.0f} s"
                raise RankFailure(what) from error
            continue
        if not ok:
            raise RankFailure(f"rank {rank}: {value}")
        observed.merge(pickle.loads(value))
        answered += 1
    return observed


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes that start within know no Ctrl-C: this one gets it, and ends them. Their tracebacks would say nothing.

    One that comes meanwhile waits until they have started: a process that is half started could not be ended.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    came: list[int] = []
    # the mask is what processes inherit; a signal may still come through another thread of this process
    handler = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
        if came:
            signal.raise_signal(signal.SIGINT)


def _pickle(task: Task, plan: Plan) -> bytes:
    try:
        return pickle.dumps((task, plan, states_of(task.model)))  # torch pickles no hooks
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:  # the last: parametrized modules
        raise PlanError(
            "backend gloo sends the model, the plan and the loss to other processes, and cannot "
            f"({first_line(error)}): use backend local, or define them at the top of a module, without parametrizations"
        ) from error


@contextmanager
def _main_left_out(payload: bytes) -> Iterator[None]:
    """Keep started processes from running the caller's script again, unless the payload needs what it defines."""
    main: Any = sys.modules["__main__"]
    if b"__main__" in payload:
        yield
        return
    kept = {name: getattr(main, name) for name in ("__spec__", "__file__") if hasattr(main, name)}
    main.__spec__ = None
    if "__file__" in kept:
        del main.__file__
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(main, name, value)


def _initialise_class(model: nn.Module) -> None:
    """Let a class of transformers register what it records in forward (router logits): it does so when it is built, for
    the process, and pickle builds nothing."""
    if is_huggingface(model):
        config: Any = model.config
        with torch.device("meta"):
            type(model)(config)


def _gloo_rank(rank: int, tp: int, port: int, payload: bytes, answers: Any) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=tp, timeout=timeout)
    try:
        task, plan, states = pickle.loads(payload)
        _initialise_class(task.model)
        set_states(task.model, states)
        mesh = init_device_mesh("cpu", (tp,), mesh_dim_names=("verify",))
        observed = sharded_step(task, task.model, plan, mesh, lambda tensor: {rank: tensor})
        answers.put((rank, True, pickle.dumps(observed)))
    except Exception as error:
        answers.put((rank, False, f"{type(error).__name__}: {error}"))
    answers.close()
    answers.join_thread()
    dist.destroy_process_group()
