"""Verify: the sharded model beside the unsharded one, on a CPU: loss, every gradient, one optimizer step."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from colrow.dryrun.calls import Loss, default_loss, example_input
from colrow.dryrun.reduced_model import reduced_model
from colrow.errors import PlanError
from colrow.plans.plan import Plan
from colrow.styles.base import style_from_data
from colrow.torch_compat import TorchDispatchMode
from colrow.verifying.backends import RankFailure, can_simulate, run_gloo, run_local
from colrow.verifying.sharded import Errors, Observed, Reference, compare
from colrow.verifying.step import Task, reference_step

Backend = Literal["auto", "local", "gloo"]
EXACT, ROUNDED = 1e-9, 1e-5
"""Tolerances: of a model that computes in fp64, and of one that rounds to fp32 on its way."""


@dataclass(frozen=True)
class Worst:
    """A parameter, the relative error of its gradient, and whether ranks disagree about what each holds whole."""

    name: str
    rel_err: float
    ranks_differ: bool = False


@dataclass(frozen=True)
class Control:
    """The negative control: a plan broken on purpose, and the error that the same comparison gives for it."""

    change: str
    rel_err: float
    caught: bool


@dataclass(frozen=True)
class Report:
    """What was compared, and how near it came.

    Attributes:
        ok: everything within the tolerance, and the negative control was caught.
        parameters: how many parameters were compared.
        worst: the parameters with the largest errors of their gradients, largest first.
        cause: what such a pattern usually comes from; empty when all is well.
        failure: what the sharded model raised, if it did.
        twin: how the model was shrunk, or None when it was taken as it is.
    """

    ok: bool
    tp: int
    backend: str
    loss_rel_err: float
    max_grad_rel_err: float
    max_step_rel_err: float
    parameters: int
    worst: tuple[Worst, ...]
    tolerance: float
    cause: str
    failure: str
    control: Control | None
    twin: str | None
    seconds: float

    def to_data(self) -> dict[str, Any]:
        """What `--json` says."""
        worst = [{"name": w.name, "rel_err": w.rel_err, "ranks_differ": w.ranks_differ} for w in self.worst]
        control = None if self.control is None else vars(self.control)
        return {
            "ok": self.ok,
            "loss_rel_err": self.loss_rel_err,
            "max_grad_rel_err": self.max_grad_rel_err,
            "max_step_rel_err": self.max_step_rel_err,
            "parameters": self.parameters,
            "worst": worst,
            "tolerance": self.tolerance,
            "tp": self.tp,
            "backend": self.backend,
            "cause": self.cause,
            "failure": self.failure,
            "control": control,
            "twin": self.twin,
        }


def verify(
    build_model: Callable[[], nn.Module] | nn.Module,
    plan: Plan,
    tp: int,
    *,
    backend: Backend = "auto",
    batch_size: int = 2,
    seq_len: int | None = None,
    inputs: tuple[Any, ...] | None = None,
    loss: Loss = default_loss,
    tolerance: float | None = None,
    seed: int = 0,
) -> Report:
    """Compare the model under `plan` on `tp` ranks with the unsharded one, on the CPU, in fp64 where it can.

    Both start from the same random weights and see the same batch. Compared are the loss, every gradient on every
    rank, and every parameter after a step of AdamW. Dropout is off. Then the plan is broken on purpose, to show that
    the comparison can fail.

    Args:
        build_model: makes the model (or is it); it may be on the meta device. A big one of a known family is replaced
            by a small twin, see `dryrun.reduced_model`.
        backend: `local` simulates the ranks in this process, `gloo` starts a process for each; `auto` simulates
            where torch can.
        inputs: example arguments instead of token ids [batch_size, seq_len].
        loss: of the output (the logits, or the first tensor of what the model returns) and the inputs; next-token
            cross entropy unless given.
        tolerance: largest relative error; 1e-9, or 1e-5 for a model that rounds to fp32, unless given.

    Raises:
        PlanError: the plan does not fit, tp is 1, or the model is too big.
    """
    started = time.monotonic()
    plan = without_copy_engines(plan)
    if tp < 2:
        raise PlanError(f"tp={tp} splits nothing: verify needs tp of 2 or more")
    model, shrunk = reduced_model(build_model if isinstance(build_model, nn.Module) else build_model(), tp)
    model = _prepare(model, seed)
    torch.manual_seed(seed + 1)
    if inputs is None:
        inputs = (example_input(model, batch_size, seq_len or -(-16 // tp) * tp),)
    inputs = tuple(x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs)
    task, reference, exact = _reference(Task(model, inputs, loss, tp))
    limit = tolerance or (EXACT if exact else ROUNDED)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's on its own names: nothing that a reader can mend
            used, observed = _observe(task, plan, reference, limit, backend)
    except RankFailure as error:
        return Report(
            ok=False,
            tp=tp,
            backend="gloo" if backend == "auto" else backend,
            loss_rel_err=float("inf"),
            max_grad_rel_err=float("inf"),
            max_step_rel_err=float("inf"),
            parameters=len(reference.parameters),
            worst=(),
            tolerance=limit,
            cause="the sharded model raises: `colrow check` names the module",
            failure=str(error).strip(),
            control=None,
            twin=shrunk,
            seconds=time.monotonic() - started,
        )
    errors = compare(observed, reference, tp)
    control = _control(task, plan, reference, limit, run_local if used == "local" else run_gloo)
    worst = sorted(errors.gradients, key=lambda name: -errors.gradients[name])[:5]
    passed = errors.worst <= limit
    return Report(
        ok=passed and control is not None and control.caught,
        tp=tp,
        backend=used,
        loss_rel_err=errors.loss,
        max_grad_rel_err=max(errors.gradients.values(), default=0.0),
        max_step_rel_err=max(errors.parameters.values(), default=0.0),
        parameters=len(reference.parameters),
        worst=tuple(Worst(name, errors.gradients[name], _differ(observed, name)) for name in worst),
        tolerance=limit,
        cause="" if passed else _cause(errors, observed, reference, limit, tp),
        failure="",
        control=control,
        twin=shrunk,
        seconds=time.monotonic() - started,
    )


def without_copy_engines(plan: Plan) -> Plan:
    """The plan as CPUs can run it: the same chunks, however few their rows, carried by the process group."""
    modules = {
        key: replace(style, overlap="point_to_point", chunk_rows=1)  # type: ignore[call-arg]
        if getattr(style, "overlap", None) == "copy_engine"
        else style
        for key, style in plan.modules.items()
    }
    return replace(plan, modules=modules)


def _reference(task: Task) -> tuple[Task, Reference, bool]:
    """The unsharded step, the task that it ran, and whether it is exact to fp64.

    Some operations know no fp64, such as the grouped products of experts: then everything runs in fp32.

    Raises:
        PlanError: the model itself does not run.
    """
    rounding = _Rounding()
    try:
        with rounding:
            return task, reference_step(task, copy.deepcopy(task.model)), not rounding.seen
    except PlanError:
        raise
    except Exception:
        single = replace(task, model=copy.deepcopy(task.model).float(), inputs=tuple(map(_to_fp32, task.inputs)))
    try:
        return single, reference_step(single, copy.deepcopy(single.model)), False
    except Exception as error:
        raise PlanError(
            f"{type(task.model).__name__} itself does not run on the CPU, neither in fp64 nor in fp32 "
            f"({type(error).__name__}: {error}): pass inputs=(...) that it takes"
        ) from error


def _to_fp32(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _observe(
    task: Task, plan: Plan, reference: Reference, limit: float, backend: Backend
) -> tuple[Literal["local", "gloo"], Observed]:
    """The sharded step, and where it ran.

    The simulation does not know all that torch does (code that asks for its own rank, for one), but a pass there is a
    pass. So with `auto` it is asked first, and real ranks decide where it fails.
    """
    if backend == "gloo" or plan.loss == "linear" or not can_simulate():
        if backend == "local":
            raise PlanError(
                "backend local needs torch's LocalTensorMode, no process group, and a loss on logits: use backend gloo"
            )
        return "gloo", run_gloo(task, plan)
    try:
        observed = run_local(task, plan)
        if backend == "local" or compare(observed, reference, task.tp).worst <= limit:
            return "local", observed
    except RankFailure:
        if backend == "local":
            raise
    try:
        return "gloo", run_gloo(task, plan)
    except PlanError:  # what cannot be sent to other processes stays with the simulation
        return "local", run_local(task, plan)


def _differ(observed: Observed, name: str) -> bool:
    return name in observed.gradients and observed.gradients[name].disagreement()


def _prepare(model: nn.Module, seed: int) -> nn.Module:
    """A copy in fp64 whose weights are all at random: a one or a zero would hide a missing factor or bias."""
    torch.manual_seed(seed)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        model = _off_meta(model)
    else:
        model = copy.deepcopy(model)
    model = model.double().eval()
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * (0.2 if param.ndim == 1 else 0.05))
    return model


def _off_meta(model: nn.Module) -> nn.Module:
    if any(buffer.is_meta for buffer in model.buffers()):
        config = getattr(model, "config", None)
        if config is None:
            raise PlanError(f"{type(model).__name__} has buffers on the meta device: build it on the CPU for verify")
        return type(model)(config)
    made = copy.deepcopy(model).to_empty(device="cpu")
    from colrow.parallel.parallelize import tie, tied_parameters

    tie(made, tied_parameters(model))
    with torch.no_grad():
        for param in made.parameters():
            param.fill_(1.0 if param.ndim == 1 else 0.0)
    return made


class _Rounding(TorchDispatchMode):
    """Whether fp64 values are rounded to fp32 or less on the way."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            self.seen = self.seen or (out.is_floating_point() and out.dtype != torch.float64)
        return out


def _control(
    task: Task, plan: Plan, reference: Reference, limit: float, run: Callable[[Task, Plan], Observed]
) -> Control | None:
    """Break the plan in a way that bites on this model, and see the comparison fail."""
    last: Control | None = None
    for change, broken in _broken_plans(task.model, plan, task.tp)[:3]:
        try:
            worst = compare(run(task, broken), reference, task.tp).worst
        except (RankFailure, PlanError):
            worst = float("inf")
        last = Control(change, worst, worst > 100 * limit)
        if last.caught:
            return last
    return last


def _broken_plans(model: nn.Module, plan: Plan, tp: int) -> list[tuple[str, Plan]]:
    """Plans that differ from a sound one in a single module, whose gradient they get wrong."""
    styles = {fqn: style for fqn, (_, style) in plan.resolve(model).items()}
    layouts = plan.parameters(model, tp)
    summed, whole = [], []
    for fqn, module in model.named_modules():
        own = [name for name, param in module.named_parameters(recurse=False) if param.requires_grad]
        if not fqn or not own:
            continue
        style = styles.get(fqn)
        if style is not None and style.name in ("sequence", "grad_sum"):
            summed.append((f"{fqn}: style {style.name} left out", {**styles, fqn: style_from_data("replicate", fqn)}))
        elif (style is None or style.name == "replicate") and all(
            layouts[f"{fqn}.{name}"].placement.is_replicate() for name in own
        ):
            text = f"{fqn}: gradients summed over tp though every rank has them whole"
            whole.append((text, {**styles, fqn: style_from_data("grad_sum", fqn)}))
    return [(text, replace(plan, modules=modules, name="broken")) for text, modules in [*summed[:2], *whole[:2]]]


def _cause(errors: Errors, observed: Observed, reference: Reference, limit: float, tp: int) -> str:
    """What such a pattern of errors usually comes from."""
    bad = {name: error for name, error in errors.gradients.items() if error > limit}
    missing = [name for name in bad if name not in observed.gradients]
    if missing:
        return f"{missing[0]} gets no gradient under the plan: the module that uses it is cut off"
    if errors.loss > limit:
        return (
            "the loss itself differs: a fused weight split across its parts, a head count written into a view, or a "
            "layout that is declared wrongly (run `colrow check`)"
        )
    if not bad:
        return "gradients agree and the parameters after a step do not: the optimizer does not see the model's own"
    differ = [name for name in bad if _differ(observed, name)]
    if differ and len(differ) == len(bad):
        return (
            f"the loss is exact and the ranks differ ({differ[0]}): a replicated parameter used on a rank's part of "
            "the activations, such as a norm on sequence shards without style sequence, or a norm on local heads "
            "without style grad_sum"
        )
    times = [name for name in bad if name in reference.gradients and _is_times(observed, reference, name, tp)]
    if times and len(times) == len(bad):
        return f"the loss is exact and gradients are {tp} times too large ({times[0]}): summed over tp though equal"
    if len(bad) == len(errors.gradients):
        return "the loss is exact and every gradient is wrong: the loss's own backward (log-softmax on split logits)"
    return "the loss is exact and some gradients are wrong: an activation's gradient is not reduced over tp"


def _is_times(observed: Observed, reference: Reference, name: str, tp: int) -> bool:
    return abs(observed.gradients[name].ratio(reference.gradients[name]) - tp) < 1e-6
