"""One step of the parallelised model on fake tensors: one process, no weights, no communication.

It shows every collective with its bytes and cause, the shapes of the modules' outputs beside the unsharded model's, and
every placement that does not fit its tensor.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.dryrun.block_kinds import BlockTraces, trace_blocks
from colrow.dryrun.calls import (
    GivenInputs,
    Inputs,
    Loss,
    call_model,
    default_loss,
    give_targets,
    head_loss,
)
from colrow.dryrun.code_caches import caches_forgotten
from colrow.dryrun.fake_world import fake_tp_mesh, materialize_fake
from colrow.dryrun.flops import FlopCounter
from colrow.dryrun.lockstep import StepPair, judges_runs_of
from colrow.dryrun.module_tracker import LOSS, ModuleTracker
from colrow.dryrun.planned_step import PlannedStep
from colrow.dryrun.recorded_calls import CallRecorder
from colrow.dryrun.reduced_copy import KEPT, ReducedCopy, reduced_copy
from colrow.dryrun.result import Collective, DryRun, Failure, Output
from colrow.dryrun.watch import Watch
from colrow.mesh import Mesh
from colrow.models.blocks import block_stacks
from colrow.parallel.loss import loss_context
from colrow.parallel.outputs import main_tensor
from colrow.parallel.parallelize import parallelize
from colrow.parallel.random_state import Generators
from colrow.plans.patterns import is_within
from colrow.plans.plan import Plan
from colrow.sharding.layout import PACKED
from colrow.styles.base import Style
from colrow.styles.rank_tensors import RANK_TABLES
from colrow.torch_compat import fake_tensors, forget_shardings, is_transformed, version


def traces_of_step(step: PlannedStep) -> BlockTraces:
    """What tells blocks apart; nothing where none would be left out."""
    if all(len(stack.blocks) <= KEPT for stack in block_stacks(step.model)):
        return BlockTraces()
    return trace_blocks(step.model, step.fake_inputs, step.dtype)


def dry_run(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh,
    batch_size: int = 1,
    seq_len: int = 128,
    *,
    inputs: GivenInputs | None = None,
    loss: Loss = default_loss,
    dtype: torch.dtype | None = None,
) -> DryRun:
    """Run one forward and backward of a copy of `model` under `plan`, on fake tensors, as the first of `mesh.tp` ranks.

    Of the blocks of one kind, two are run ([Note: kinds of blocks]). The model may be on the meta device; it is not
    changed. An existing process group is left alone.

    Args:
        batch_size: sequences on one rank.
        inputs: example arguments; unless given, what the model takes by [Note: example inputs].
        loss: of the model's output, as it returns it, and the inputs; `calls.default_loss` by default.
        dtype: of floating-point parameters and buffers; the model's own by default.

    Raises:
        PlanError: the plan does not fit the model at this degree.
    """
    return dry_run_of(PlannedStep(model, plan, mesh.tp, batch_size, seq_len, inputs, loss, dtype))


def dry_run_of(
    step: PlannedStep, traces_of: Callable[[PlannedStep], BlockTraces] = traces_of_step, *, judged: bool = False
) -> DryRun:
    """`dry_run` of a step.

    Args:
        traces_of: may give traces of the model's blocks that are known already, for they do not depend on the plan.
        judged: say what the step leaves unproven too, where the same runs show it.
    """
    traces = traces_of(step)
    if traces.dtype is not None:
        step = replace(step, dtype=traces.dtype)
    run = _run(step, traces, judged)
    if run.reference_failure is not None and "BF16" in str(run.reference_failure.error):
        step = replace(step, dtype=torch.bfloat16)  # torch's grouped matmuls take no other type
        run = _run(step, traces, judged)
    if run.reference_failure is not None:  # the model may index its blocks by number: try with all of them
        run = _run(step, traces, judged, keep=sys.maxsize)
    return run


def _run(step: PlannedStep, traces: BlockTraces, judged: bool, keep: int = KEPT) -> DryRun:
    run = DryRun(dtype=step.dtype)
    styles = step.plan.styles_of(step.model)
    reference, sharded = (reduced_copy(step.model, styles, traces, keep) for _ in range(2))
    plan = sharded.renamed_plan(step.plan, styles)
    pair = None
    if judged and judges_runs_of(step, sharded):
        pair = StepPair(step, plan, reference.model, sharded.model, sharded.original)
    with warnings.catch_warnings(), caches_forgotten(step.model), fake_tp_mesh(step.tp) as tp_mesh:
        warnings.simplefilter("ignore")
        parallelize(sharded.model, plan, tp_mesh)
        with fake_tensors():
            for copy in (reference, sharded):
                materialize_fake(copy.model, step.dtype)
            inputs = step.fake_inputs(reference.model)
            # code may decide by what it draws: the sharded run draws the same, and takes the same way
            with Generators([step.model], "cpu").preserved(torchs=False):
                _run_unsharded(step, run, reference, inputs, pair.unsharded(inputs) if pair else nullcontext(_ignore))
            if run.reference_failure is None:
                beside = pair.sharded(inputs, tp_mesh) if pair else nullcontext(_ignore)
                _run_sharded(step, run, sharded, inputs, plan, tp_mesh, beside)
                run.unproven = pair.walk().unproven if pair else None
    _compare_gradients(run, reference, sharded)
    run.collectives = [replace(c, cause=_cause(c, styles)) for c in run.collectives]
    return run


_Judge = AbstractContextManager[Callable[[Tensor], None]]
"""Around a run, of whose loss it is told."""


def _ignore(loss: Tensor) -> None:
    """Nobody judges the run."""


def _run_unsharded(step: PlannedStep, run: DryRun, reference: ReducedCopy, inputs: Inputs, judge: _Judge) -> None:
    modules = ModuleTracker(reference.model, reference.original)
    _record_outputs(reference, run.reference_outputs)
    recorder, counter = CallRecorder(modules), FlopCounter(modules)
    try:
        with judge as is_loss:
            with recorder, counter:
                output = call_model(reference.model, inputs)
            run.reference_logits = _output(main_tensor(output))
            loss = step.loss(output, inputs.given)
            is_loss(loss)
            if loss.requires_grad:
                loss.backward()
    except Exception as error:
        run.reference_failure = Failure(error, modules.innermost(), backward=False)
    run.reference_calls = dict(recorder.calls)
    run.reference_flops = _total(counter.by_module, reference)


def _run_sharded(
    step: PlannedStep,
    run: DryRun,
    sharded: ReducedCopy,
    inputs: Inputs,
    plan: Plan,
    tp_mesh: DeviceMesh,
    judge: _Judge,
) -> None:
    model, original = sharded.model, sharded.original
    params = {id(param): original(name) for name, param in model.named_parameters()}
    modules = ModuleTracker(model, original)
    watch = Watch(modules, step.tp, params)
    _mark_known_values(watch, model)
    _record_outputs(sharded, run.outputs)
    _record_async_inputs(sharded, run.async_inputs, watch.in_flight)
    recorder = CallRecorder(modules, watch.packed, watch.varies)
    before = {name: (buffer, version(buffer)) for name, buffer in model.named_buffers()}
    backward = False
    try:
        with watch, watch.declarations(), judge as is_loss, loss_context(plan, tp_mesh):
            with recorder:
                loss = _loss(step, run, model, inputs, plan)
            is_loss(loss)
            run.varying_buffers = [original(name) for name in _written(watch, model, before)]
            if loss.requires_grad:
                backward = True
                loss.backward()
    except Exception as error:
        run.failure = Failure(error, "" if backward else modules.innermost(), backward)
        forget_shardings()
    if plan.loss == "linear":  # the head's output is the loss: nothing to compare with the reference's logits
        for name in [name for name, style in plan.modules.items() if style.returns_loss]:
            run.outputs.pop(original(name), None)
    run.calls = dict(recorder.calls)
    run.mismatches = watch.mismatches
    run.flops = _total(watch.flops, sharded)
    run.unmatched_log_softmaxes = watch.unmatched_log_softmaxes
    run.collectives = [replace(c, times=sharded.count(c.where)) for c in watch.collectives]


def _loss(step: PlannedStep, run: DryRun, model: nn.Module, inputs: Inputs, plan: Plan) -> Tensor:
    if plan.loss == "linear":  # the head returns the loss, and there are no logits
        give_targets(model, plan, inputs)
        return head_loss(call_model(model, inputs))
    output = call_model(model, inputs)
    run.logits = _output(main_tensor(output))
    return step.loss(output, inputs.given)


def _total(flops: Mapping[str, int], copy: ReducedCopy) -> int:
    """Of the complete model: a kept block stands for several."""
    times = {copy.original(block): count for block, count in copy.repeats.items()}
    inside = ((n, next((t for b, t in times.items() if is_within(where, b)), 1)) for where, n in flops.items())
    return sum(n * repeats for n, repeats in inside)


def _written(watch: Watch, model: nn.Module, before: Mapping[str, tuple[Tensor, int]]) -> Iterator[str]:
    """Buffers that forward has written, in place or by assignment, with values that differ between ranks."""
    for name, buffer in model.named_buffers():
        if buffer.layout is not torch.strided:
            continue  # a sparse table has no storage to watch
        same = name in before and buffer is before[name][0] and version(buffer) == before[name][1]
        if (not same or watch.written(buffer)) and watch.varies(buffer):
            yield name


def _mark_known_values(watch: Watch, model: nn.Module) -> None:
    """What no operation shows: fused weights split segment by segment, and index tables that differ by rank."""
    for module in model.modules():
        for name in module.__dict__.get(PACKED, ()):
            param = module._parameters[name]  # the attribute may be a view of it
            assert param is not None
            watch.mark_packed(param)
    for table in list(RANK_TABLES):
        watch.mark_varying(table)


def _cause(collective: Collective, styles: Mapping[str, Style]) -> str:
    if collective.where == LOSS:
        owner = "the loss"
    elif (style := styles.get(collective.where)) is not None:
        owner = style.name
    else:
        owner = "the module's own code"
    return f"{owner}: {collective.cause}" if collective.cause else owner


def _record_outputs(copy: ReducedCopy, outputs: dict[str, list[Output]]) -> None:
    """Append each module's output to `outputs[name]`, call by call."""

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(name, []).append(_output(output))

        return record

    for name, module in copy.model.named_modules():
        if name:
            module.register_forward_hook(hook(copy.original(name)))


def _record_async_inputs(copy: ReducedCopy, names: list[str], in_flight: Callable[[Tensor], bool]) -> None:
    """Append to `names` the blocks that take the result of a collective which nothing has waited for."""

    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and not is_transformed(x)]
            if name not in names and any(x.requires_grad and in_flight(x) for x in tensors):
                names.append(name)

        return record

    for stack in block_stacks(copy.model):
        for fqn, block in stack.named_blocks():
            block.register_forward_pre_hook(hook(copy.original(fqn)), with_kwargs=True)


def _output(tensor: Tensor) -> Output:
    return Output(tuple(tensor.shape), isinstance(tensor, DTensor))


def _compare_gradients(run: DryRun, reference: ReducedCopy, sharded: ReducedCopy) -> None:
    if run.failure is None and run.reference_failure is None:
        want = {name for name, param in reference.model.named_parameters() if param.grad is not None}
        got = {name for name, param in sharded.model.named_parameters() if param.grad is not None}
        run.no_gradient = [sharded.original(name) for name in sorted(want - got)]
