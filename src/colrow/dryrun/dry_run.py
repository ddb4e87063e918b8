"""A step of the parallelised model on fake tensors: one process, no weights, nothing sent.

It tells every collective with its bytes and cause, the shapes of the modules' outputs beside the unsharded model's,
and where what DTensor was told about a tensor does not fit what the tensor is.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.dryrun.calls import Loss, call, example_input, loss_of
from colrow.dryrun.cut import Copy, cut_copy, towers
from colrow.dryrun.fake_world import fake_tensors, fake_tp_mesh
from colrow.dryrun.views import View, Views
from colrow.dryrun.watch import Event, Slip, Watch
from colrow.dryrun.where import LOSS, Where
from colrow.mesh import Mesh
from colrow.parallel.loss import logits_of, loss_context
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.layout import PACKED, local_tensor
from colrow.styles.base import Style
from colrow.styles.linear_head import Expected, expect_targets
from colrow.styles.local import TABLES

Pass = Literal["forward", "backward"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
        op: all_gather, reduce_scatter, all_reduce, all_to_all or broadcast.
        where: the module that it belongs to, `loss` for the loss.
        pass_: forward or backward.
        bytes: of the larger side, on one rank: what an all-gather gives, what a reduce-scatter takes.
        dtype: of the tensor that travels.
        cause: which style and change of placement asked for it.
        axis: the mesh axis.
        times: how many modules of the model it stands for; equal blocks are run once or twice, not all.
        implicit: DTensor moved the data for an operation's sake, unasked.
        again: the same tensor was gathered before in this pass.
    """

    op: str
    where: str
    pass_: Pass
    bytes: int
    dtype: str
    cause: str
    axis: str = "tp"
    times: int = 1
    implicit: bool = False
    again: bool = False

    def to_data(self) -> dict[str, Any]:
        """What `--json` says."""
        return {"op": self.op, "where": self.where, "pass": self.pass_, "bytes": self.bytes, "dtype": self.dtype,
                "cause": self.cause, "axis": self.axis, "times": self.times}  # fmt: skip


@dataclass(frozen=True)
class Output:
    """What a module returned first: its global shape as DTensor knows it, or the local one of a plain tensor."""

    shape: Shape
    is_dtensor: bool
    placements: tuple[str, ...] = ()
    varies: bool = False


@dataclass(frozen=True)
class Failure:
    """The run ended with an exception in this module."""

    error: Exception
    where: str
    backward: bool


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. Activations: what autograd keeps from forward to backward."""

    parameters: int = 0
    gradients: int = 0
    activations: int = 0


@dataclass
class DryRun:
    """What a step showed.

    Attributes:
        collectives: in order, for the blocks that were run (see `times`).
        slips: wrong declarations; names of the parameters in `slip_params`, in the same order.
        outputs, reference_outputs: each module's outputs in the sharded and in the unsharded run, one entry a call.
        views, reference_views: reshapes and splits of the model's own code.
        failure: the sharded run's exception, if any.
        reference_failure: the unsharded run's; then nothing else is known.
        no_gradient: parameters that got a gradient in the unsharded run alone.
        plain: parameters that are no DTensors after the plan.
        logits, reference_logits: the model's output, sharded and not.
        class_losses: log-softmaxes of split logits that no cross entropy took.
        unfinished: blocks whose input is what a collective gave, with nothing but views between.
    """

    collectives: list[Collective] = field(default_factory=list)
    slips: list[Slip] = field(default_factory=list)
    slip_params: list[str] = field(default_factory=list)
    outputs: dict[str, list[Output]] = field(default_factory=dict)
    reference_outputs: dict[str, list[Output]] = field(default_factory=dict)
    views: dict[str, list[View]] = field(default_factory=dict)
    reference_views: dict[str, list[View]] = field(default_factory=dict)
    failure: Failure | None = None
    reference_failure: Failure | None = None
    no_gradient: list[str] = field(default_factory=list)
    plain: list[str] = field(default_factory=list)
    logits: Output | None = None
    reference_logits: Output | None = None
    class_losses: int = 0
    unfinished: list[str] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    def count(self, op: str, pass_: Pass | None = None, where: str = "") -> int:
        """Collectives of this kind in `where` and the modules inside it, as they happened in the blocks that ran."""
        return sum(
            c.op == op
            and pass_ in (None, c.pass_)
            and (not where or c.where == where or c.where.startswith(where + "."))
            for c in self.collectives
        )


def dry_run(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh,
    batch_size: int = 1,
    seq_len: int = 128,
    *,
    inputs: tuple[Any, ...] | None = None,
    loss: Loss = loss_of,
    dtype: torch.dtype | None = None,
) -> DryRun:
    """Run one forward and backward of a copy of `model` under `plan`, on fake tensors, as the first of `mesh.tp` ranks.

    Towers of equal blocks are run as two blocks. The model may lie on the meta device; it is not changed. A process
    group that exists is left alone.

    Args:
        batch_size: sequences on one rank.
        inputs: example arguments instead of token ids [batch_size, seq_len].
        loss: of the model's output and the inputs; next-token cross entropy unless given.
        dtype: what parameters are computed in; their own type unless given.

    Raises:
        PlanError: the plan does not fit the model at this degree.
    """
    request = _Request(model, plan, mesh.tp, batch_size, seq_len, inputs, loss, dtype)
    run = _run(request)
    if run.reference_failure is not None and "BF16" in str(run.reference_failure.error):
        request = replace(request, dtype=torch.bfloat16)  # torch's grouped products know no other type
        run = _run(request)
    if run.reference_failure is not None:  # the model may count its blocks: try with all of them
        run = _run(request, keep=sys.maxsize)
    return run


@dataclass(frozen=True)
class _Request:
    model: nn.Module
    plan: Plan
    tp: int
    batch_size: int
    seq_len: int
    inputs: tuple[Any, ...] | None
    loss: Loss
    dtype: torch.dtype | None = None
    """Of floating-point parameters and buffers; the model's own unless given."""


def _run(request: _Request, keep: int = 2) -> DryRun:
    run = DryRun()
    styles = {name: style for name, (_, style) in request.plan.resolve(request.model).items()}
    plain, small = (cut_copy(request.model, styles, keep) for _ in range(2))
    names = {name: small.original(name) for name, _ in small.model.named_modules() if name}
    plan = replace(request.plan, modules={new: styles[old] for new, old in names.items() if old in styles})
    with warnings.catch_warnings(), fake_tp_mesh(request.tp) as tp_mesh:
        warnings.simplefilter("ignore")
        parallelize(small.model, plan, tp_mesh)
        with fake_tensors():
            for copy in (plain, small):
                _materialise(copy.model, request.dtype)
            inputs = request.inputs or (example_input(plain.model, request.batch_size, request.seq_len),)
            inputs = tuple(torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x for x in inputs)
            _run_unsharded(request, run, plain, inputs)
            if run.reference_failure is None:
                _run_sharded(request, run, small, inputs, plan, tp_mesh)
    _compare_gradients(run, plain, small)
    run.collectives = [replace(c, cause=_cause(c, styles)) for c in run.collectives]
    return run


def _run_unsharded(request: _Request, run: DryRun, copy: Copy, inputs: tuple[Any, ...]) -> None:
    where = Where(copy.model, copy.original)
    _record_outputs(copy, run.reference_outputs, lambda _: False)
    views = Views(where)
    try:
        with views:
            output = call(copy.model, inputs)
        run.reference_logits = _output(output, lambda _: False)
        loss = request.loss(output, inputs)
        if loss.requires_grad:
            loss.backward()
    except Exception as error:
        run.reference_failure = Failure(error, where.innermost(), backward=False)
    run.reference_views = dict(views.calls)


def _run_sharded(
    request: _Request, run: DryRun, copy: Copy, inputs: tuple[Any, ...], plan: Plan, tp_mesh: DeviceMesh
) -> None:
    where = Where(copy.model, copy.original)
    watch = Watch(where, request.tp)
    views = Views(where, watch.packed, watch.varies)
    for module in copy.model.modules():
        for name in module.__dict__.get(PACKED, ()):
            param = module._parameters[name]  # the attribute may be a view of it
            assert param is not None
            watch.mark_packed(param)
    for table in list(TABLES):
        watch.mark(table, True)
    _record_outputs(copy, run.outputs, watch.varies)
    _record_unfinished(copy, run.unfinished, watch.gathering)
    params = {id(param): copy.original(name) for name, param in copy.model.named_parameters()}
    run.plain = [params[id(p)] for p in copy.model.parameters() if not isinstance(p, DTensor)]
    saved = _Saved(copy, where)
    backward = False
    try:
        with watch, watch.declarations(), loss_context(plan, tp_mesh):
            with views, torch.autograd.graph.saved_tensors_hooks(saved.pack, _same):
                if plan.loss == "linear":  # the head returns the loss, and there are no logits
                    expect_targets(copy.model, [Expected(inputs[0], None, -100)])
                    loss = logits_of(call(copy.model, inputs))
                else:
                    output = call(copy.model, inputs)
                    run.logits = _output(output, watch.varies)
                    loss = request.loss(output, inputs)
            if loss.requires_grad:
                backward = True
                loss.backward()
    except Exception as error:
        run.failure = Failure(error, "" if backward else where.innermost(), backward)
    if plan.loss == "linear":  # its head gives the loss in the place of logits
        for name in [name for name, style in plan.modules.items() if style.name == "linear_head"]:
            run.outputs.pop(copy.original(name), None)
    run.views = dict(views.calls)
    run.slips = watch.slips
    run.class_losses = watch.class_losses
    run.slip_params = [params.get(id(slip.param), "") for slip in watch.slips]
    run.collectives = [_collective(event, copy) for event in watch.events]
    run.memory = _memory(copy, saved)


def _collective(event: Event, copy: Copy) -> Collective:
    return Collective(
        op=event.op,
        where=event.where,
        pass_="backward" if event.backward else "forward",
        bytes=event.nbytes,
        dtype=event.dtype,
        cause=f"implicit in {event.implicit}: {event.change}" if event.implicit else event.change,
        times=copy.count(event.where),
        implicit=bool(event.implicit),
        again=event.again,
    )


def _cause(collective: Collective, styles: Mapping[str, Style]) -> str:
    style = styles.get(collective.where)
    asked = "the loss" if collective.where == LOSS else style.name if style else "the module's own code"
    return f"{asked}: {collective.cause}" if collective.cause else asked


def _record_outputs(copy: Copy, into: dict[str, list[Output]], varies: Callable[[Tensor], bool]) -> None:
    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                into.setdefault(name, []).append(_output(output, varies))

        return record

    for name, module in copy.model.named_modules():
        if name:
            module.register_forward_hook(hook(copy.original(name)))


def _record_unfinished(copy: Copy, into: list[str], gathering: Callable[[Tensor], bool]) -> None:
    def hook(name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensors = [leaf for leaf in (*args, *kwargs.values()) if isinstance(leaf, Tensor)]
            if name not in into and any(leaf.requires_grad and gathering(leaf) for leaf in tensors):
                into.append(name)

        return record

    for tower_name, tower in towers(copy.model, more_than=0):
        for key, block in tower.named_children():
            block.register_forward_pre_hook(hook(copy.original(f"{tower_name}.{key}")), with_kwargs=True)


def _output(tensor: Tensor, varies: Callable[[Tensor], bool]) -> Output:
    placements = tuple(str(p) for p in tensor.placements) if isinstance(tensor, DTensor) else ()
    return Output(tuple(tensor.shape), isinstance(tensor, DTensor), placements, varies(tensor))


class _Saved:
    """Bytes of the distinct storages that autograd keeps, parameters left out."""

    def __init__(self, copy: Copy, where: Where) -> None:
        self._copy, self._where = copy, where
        self._seen = {_storage(param)._cdata for param in copy.model.parameters()}
        self._alive: list[Any] = []
        self.total = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(storage)
            self.total += storage.nbytes() * self._copy.count(self._where.module())
        return tensor


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    tensor = local_tensor(tensor)
    return getattr(tensor, "elem", tensor).untyped_storage()


def _memory(copy: Copy, saved: _Saved) -> Memory:
    parameters = gradients = 0
    for name, param in copy.model.named_parameters():
        local, times = local_tensor(param.detach()), copy.count(name)
        parameters += local.numel() * local.element_size() * times
        # a gradient may be larger than its parameter: of a vocabulary-parallel embedding it is whole at first
        grad = local if param.grad is None else local_tensor(param.grad)
        gradients += grad.numel() * grad.element_size() * times * param.requires_grad
    return Memory(parameters, gradients, saved.total)


def _compare_gradients(run: DryRun, plain: Copy, small: Copy) -> None:
    if run.failure is None and run.reference_failure is None:
        want = {name for name, param in plain.model.named_parameters() if param.grad is not None}
        got = {name for name, param in small.model.named_parameters() if param.grad is not None}
        run.no_gradient = [small.original(name) for name in sorted(want - got)]


def _materialise(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Fake CPU tensors in place of those on the meta device. Ties stay."""

    def fake(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device="cpu")
        return made.to(dtype) if dtype is not None and made.is_floating_point() else made

    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if id(param) not in made:
                    made[id(param)] = nn.Parameter(fake(param.detach()), param.requires_grad)
                module._parameters[name] = made[id(param)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
