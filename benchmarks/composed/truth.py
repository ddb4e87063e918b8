"""What a case is: two ranks train one step in fp64, and loss, every gradient and every buffer are compared with one
process. Nothing of `verify` is used.

A plan is right where it is right for all numbers. Some are for half of them: where every rank takes what rank 0 has, a
largest element is found if it lies there. So each case is computed with several draws of its weights.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import colrow
from colrow.dryrun.calls import call_model, default_loss
from colrow.dryrun.random_draws import model_draws, random_draws
from colrow.parallel.random_draws import arrange_draws
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients

RIGHT, WRONG = 1e-8, 1e-5
"""Relative errors: at most that of a right plan, at least that of a wrong one. In between, single precision rounds."""
DRAWS = 2
"""Of the weights, for a case that is right with the first ones."""
Verdict = Literal["right", "wrong", "raises", "unclear", "invalid"]
"""`raises`: the ranks stop with an exception. `invalid`: the model does not run, or its numbers are not finite."""


class Judged(Protocol):
    """A case: a model, the same at each call under the same seed, and a plan."""

    def model(self) -> nn.Module: ...

    def plan(self) -> Plan: ...


class Truth(NamedTuple):
    verdict: Verdict
    error: float = 0.0
    """The largest relative error."""
    where: str = ""
    """Where that is: `loss`, or a parameter's or buffer's name; the exception of one that raises."""


def truth(case: Judged, ids: Tensor, mesh: DeviceMesh, draws: Sequence[int] = range(DRAWS)) -> Truth:
    """Of one case, on each rank of `mesh`, with the weights of these draws: the first that is not right, else the
    largest error. All ranks get the same."""
    found = _truth(case, ids, mesh, draws[0])
    for draw in draws[1:]:
        if found.verdict != "right":
            break
        again = _truth(case, ids, mesh, draw)
        found = found if again.verdict == "invalid" else worse(found, again)
    return found


def worse(a: Truth, b: Truth) -> Truth:
    """That of two which is not right, else the one with the larger error."""
    return max(a, b, key=lambda each: (each.verdict != "right", each.error))


def _truth(case: Judged, ids: Tensor, mesh: DeviceMesh, draw: int) -> Truth:
    unsharded = _made(case, draw)
    try:
        want_loss, want = _step(unsharded, ids)
    except Exception as error:
        return Truth("invalid", where=f"{type(error).__name__}: {error}"[:300])
    if not all(t.isfinite().all() for t in (torch.tensor(want_loss), *want.values())):
        return Truth("invalid", where="numbers that are not finite")
    buffers = dict(unsharded.named_buffers())
    parallel, plan = _made(case, draw), case.plan()
    try:
        draws = model_draws(case.model(), *ids.shape)
        # as training arranges it, each rank draws its shard of one process's dropout masks
        drawn = random_draws(case.model(), plan, mesh.size(), *ids.shape).modules if draws is not False else {}
        colrow.parallelize(parallel, plan, mesh)
        arrange_draws(parallel, drawn, mesh)
        with colrow.loss_context(plan, mesh):
            loss, _ = _step(parallel, ids)
        align_gradients(parallel.parameters())
    except Exception as error:
        return Truth("raises", where=f"{type(error).__name__}: {error}"[:300])
    errors = {"loss": abs(loss - want_loss) / max(abs(want_loss), 1e-300)}
    scale = max([g.abs().max().item() for g in want.values()] or [1.0])
    for name, param in parallel.named_parameters():
        got = None if param.grad is None else colrow.full_tensor(param.grad)
        errors[name] = _error(got, want.get(name), max(1e-6 * scale, 1e-300))
    for name, buffer in parallel.named_buffers():
        errors[name] = _error(buffer, buffers.get(name), 1e-300)
    worst = max(errors, key=lambda name: errors[name])
    all_ranks: list[Any] = [None] * mesh.size()
    dist.all_gather_object(all_ranks, (errors[worst], worst))
    error, where = max(all_ranks)
    verdict: Verdict = "right" if error <= RIGHT else "wrong" if error >= WRONG else "unclear"
    return Truth(verdict, error, where)


def _made(case: Judged, draw: int) -> nn.Module:
    torch.manual_seed(1000 * draw)
    model = case.model().double()
    with torch.no_grad():  # a one or a zero would hide a missing factor or bias
        for param in model.parameters():
            # larger ones with each draw: below a threshold all elements are alike
            param.add_(torch.randn_like(param) * (0.2 if param.ndim < 2 else 0.05) * (1 + 2 * draw))
    return model


def _step(model: nn.Module, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
    torch.manual_seed(1)
    loss = default_loss(call_model(model, (ids,)), (ids,))
    loss.backward()
    found = loss.full_tensor() if isinstance(loss, DTensor) else loss
    return found.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _error(got: Tensor | None, want: Tensor | None, least: float) -> float:
    if got is None or want is None:
        return 0.0 if got is want else float("inf")
    got = got.full_tensor() if isinstance(got, DTensor) else got
    if got.shape != want.shape:
        return float("inf")
    scale = max(want.double().abs().max().item(), least)
    error = (got.double() - want.double()).abs().max().item() / scale if got.numel() else 0.0
    return error if error == error else float("inf")


def truths(device: str, cases: Sequence[tuple[Judged, Tensor]], draws: Sequence[int] = range(DRAWS)) -> list[Truth]:
    """Of each case, on this rank of an initialised group."""
    mesh = init_device_mesh(device, (dist.get_world_size(),), mesh_dim_names=("tp",))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [truth(case, ids, mesh, draws) for case, ids in cases]


def on_two_ranks(cases: Sequence[tuple[Judged, Tensor]], draws: Sequence[int] = range(DRAWS)) -> list[Truth]:
    """Of each case, by two processes that start for all of them."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        ranks = [
            context.Process(target=_rank, args=(rank, folder, cases, draws, queue), daemon=True) for rank in range(2)
        ]
        for process in ranks:
            process.start()
        found: list[Truth] = queue.get(timeout=1800)
        for process in ranks:
            process.join()
    return found


def _rank(rank: int, folder: str, cases: Sequence[tuple[Judged, Tensor]], draws: Sequence[int], queue: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = truths("cpu", cases, draws)
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()
