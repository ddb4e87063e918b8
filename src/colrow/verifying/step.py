"""One step: forward, loss, backward, gradients redistributed to their parameters' placements, AdamW; and the next
forward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from colrow.dryrun.calls import GivenInputs, Inputs, Loss, call_model, give_targets, head_loss
from colrow.dryrun.random_draws import DrawsSeen
from colrow.parallel.loss import loss_context
from colrow.parallel.parallelize import parallelize
from colrow.parallel.random_draws import arrange_draws
from colrow.plans.plan import Plan
from colrow.sharding.draws import Draw
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import packed_of, waited_local
from colrow.verifying.clocks import Clocks
from colrow.verifying.comparison import Observed, Reference, Sharded, Shards
from colrow.verifying.counters import Counts, Kept, courses, grows, set_counts
from colrow.verifying.double_casts import DoubleCasts
from colrow.verifying.dropout import without_dropout
from colrow.verifying.host_draws import HostDraws
from colrow.verifying.kept_values import kept_values_restored, replay_all_iterators

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """The input of every rank: the unsharded model, its inputs, and the loss."""

    model: nn.Module
    inputs: GivenInputs
    loss: Loss
    tp: int
    seed: int = 0
    """The seed of random numbers that forward draws: where all ranks draw for a complete tensor, they draw what one
    process does."""
    written_buffers: tuple[str, ...] = ()
    """Buffers that forward changes (`reference_step` finds them)."""
    draws: Mapping[str, tuple[Draw, ...]] | None = None
    """The draws of modules that draw for shards (`arrange_draws`); None: dropout is off."""
    double_casts: bool = False
    """Where the model's code casts to fp32, it gets fp64."""
    rounds: bool = False
    """The model rounds to fp32 all the same."""
    next_forward: bool = True
    """Run another forward after the step: what a module keeps in an attribute reaches that one first."""
    forwards: int = 0
    """Forwards before the step, for a model that keeps what grows with each."""
    counts: Counts = field(default_factory=dict)
    """What the model counts behind those forwards; of numbers that it keeps outside, also what they are at the start of
    a step, since other processes have their own."""
    draws_at: tuple[float, ...] = ()
    """Where the first random numbers lie that code draws on the host ([Note: deciding draws])."""


def reference_step(task: Task, model: nn.Module) -> Reference:
    """The step of the unsharded model, which is changed in place."""
    with kept_values_restored(model), Clocks(model) as clocks:
        found = _reference_step(task, model)
    return replace(found, clocks=tuple(sorted(clocks.read)))


def _reference_step(task: Task, model: nn.Module) -> Reference:
    inputs = Inputs.of(task.inputs)
    off = task.draws is None
    with without_dropout(model, off=off) as dropout, HostDraws(model, task.seed, task.draws_at) as host:
        for _ in range(task.forwards):
            call(task, model)
        set_counts(model, task.counts)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        first = Kept.of(model)
        state = torch.get_rng_state()
        with DrawsSeen() as seen:
            output = call(task, model)
        drew = seen.drew or not torch.equal(torch.get_rng_state(), state)
        written = tuple(name for name, buffer in model.named_buffers() if _changed(before.get(name), buffer))
        after_forward = _copies(model, written)
        loss = task.loss(output, inputs.given)
        loss.backward()
    second = Kept.of(model)
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    _optimizer(model).step()
    parameters = {name: param.detach() for name, param in model.named_parameters()}
    buffers = _at(AFTER_FORWARD, after_forward) | _at(AFTER_STEP, _copies(model, written))
    found = Reference(loss.item(), gradients, parameters, buffers, written, dropout.seen, drew, host.drew)
    found.bounds, found.rounds = frozenset(host.bounds), task.rounds
    found.outside = {path: n for path, n in first.outside.items() if second.counts.get(path) != n}
    if task.next_forward:
        with HostDraws(model, task.seed + 1, task.draws_at), without_dropout(model, off=off):
            loss = task.loss(call(task, model), inputs.given)
            found.next_loss = loss.item()
            if first.counts != second.counts:  # backward may count too
                loss.backward()
            third = Kept.of(model)
            found.grows = grows(first.sizes, second.sizes, third.sizes)
            found.late = bool(second.counts.keys() - first.counts.keys())
            if found.late:
                task.loss(call(task, model), inputs.given).backward()
                first, second, third = second, third, Kept.of(model)
        found.counters = courses(first.counts, second.counts, third.counts)
        found.starts = {path: first.counts[path] for path in found.counters}
    return found


AFTER_FORWARD, AFTER_STEP = "after forward", "after a step"


def _changed(before: Tensor | None, after: Tensor) -> bool:
    # a buffer that forward makes, or makes again in another shape, is a cache: a rank's may be smaller
    if before is None or after.layout is not torch.strided:  # a sparse table
        return False
    return before.shape == after.shape and not torch.equal(before, after)


def _copies(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: model.get_buffer(name).detach().clone() for name in names}


def _at(when: str, values: dict[str, T]) -> dict[str, T]:
    return {f"{name} {when}": value for name, value in values.items()}


def sharded_step(
    task: Task,
    model: nn.Module,
    plan: Plan,
    mesh: DeviceMesh,
    shards_of: Callable[[Tensor], Shards],
) -> Observed:
    """The step of the parallelised model, which is changed in place.

    `shards_of` returns a local tensor's value on each rank that runs in this process.
    """
    replay_all_iterators(model)  # another process has its own
    with kept_values_restored(model):
        return _sharded_step(task, model, plan, mesh, shards_of)


def _sharded_step(
    task: Task, model: nn.Module, plan: Plan, mesh: DeviceMesh, shards_of: Callable[[Tensor], Shards]
) -> Observed:
    parallelize(model, plan, mesh)
    arrange_draws(model, task.draws or {}, mesh)
    off = task.draws is None
    with HostDraws(model, task.seed, task.draws_at), loss_context(plan, mesh), without_dropout(model, off=off):
        for _ in range(task.forwards):
            _forward(task, model, plan)
        set_counts(model, task.counts)
        output = _forward(task, model, plan)
        buffers = _at(AFTER_FORWARD, _buffers(model, task.written_buffers, shards_of))
        loss = _loss(task, output, plan)
        loss.backward()
    align_gradients(model.parameters())  # as a training step does before its update
    observed = Observed(losses={rank: value.item() for rank, value in shards_of(waited_local(loss)).items()})
    observed.buffers = buffers | _at(AFTER_STEP, _buffers(model, task.written_buffers, shards_of))
    for name, param in model.named_parameters():
        if param.grad is not None:
            observed.gradients[name] = _sharded(model, name, param.grad, shards_of)
    _optimizer(model).step()
    for name, param in model.named_parameters():
        observed.parameters[name] = _sharded(model, name, param, shards_of)
    if task.next_forward:
        with HostDraws(model, task.seed + 1, task.draws_at), loss_context(plan, mesh), without_dropout(model, off=off):
            loss = _loss(task, _forward(task, model, plan), plan)
        observed.next_losses = {rank: value.item() for rank, value in shards_of(waited_local(loss)).items()}
    return observed


def _forward(task: Task, model: nn.Module, plan: Plan) -> Any:
    give_targets(model, plan, Inputs.of(task.inputs))
    return call(task, model)


def call(task: Task, model: nn.Module) -> Any:
    with DoubleCasts() if task.double_casts else nullcontext():
        return call_model(model, Inputs.of(task.inputs))


def _loss(task: Task, output: Any, plan: Plan) -> Tensor:
    return head_loss(output) if plan.loss == "linear" else task.loss(output, Inputs.of(task.inputs).given)


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with an eps far above rounding: otherwise a gradient of 1e-17 gives a step of full size."""
    trainable = [param for param in model.parameters() if param.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-3, eps=1e-3, foreach=False)


def _buffers(model: nn.Module, names: Iterable[str], shards_of: Callable[[Tensor], Shards]) -> dict[str, Sharded]:
    found = {}
    for name in names:
        buffer = model.get_buffer(name)
        placements = tuple(buffer.placements) if isinstance(buffer, DTensor) else (Replicate(),)
        values = {rank: value.clone() for rank, value in shards_of(waited_local(buffer)).items()}
        found[name] = Sharded(tuple(buffer.shape), placements, None, values)
    return found


def _sharded(model: nn.Module, name: str, tensor: Tensor, shards_of: Callable[[Tensor], Shards]) -> Sharded:
    tensor = tensor.detach()
    assert isinstance(tensor, DTensor)
    values = {rank: value.clone() for rank, value in shards_of(waited_local(tensor)).items()}
    return Sharded(tuple(tensor.shape), tuple(tensor.placements), packed_of(model, name), values)
