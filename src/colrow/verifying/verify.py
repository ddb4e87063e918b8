"""Verify: the sharded model against the unsharded one, on a CPU: loss, every gradient, one optimizer step."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from colrow.dryrun.calls import GivenInputs, Inputs, Loss, default_loss, example_inputs, vocabulary
from colrow.dryrun.fake_world import replace_parameters
from colrow.dryrun.random_draws import random_draws
from colrow.dryrun.reduced_model import reduced_model
from colrow.errors import PlanError, first_line
from colrow.plans.plan import Plan
from colrow.sharding.parameter_state import copied_model
from colrow.verifying.backends import RankFailure, can_simulate, run_gloo, run_local
from colrow.verifying.comparison import Errors, Observed, Reference, compare
from colrow.verifying.controls import negative_control
from colrow.verifying.diagnosis import likely_cause
from colrow.verifying.double_casts import Rounding
from colrow.verifying.kept_values import replay_all_iterators
from colrow.verifying.operators_run import decides_alone
from colrow.verifying.other_values import TOLERATED, other_values
from colrow.verifying.other_ways import other_ways
from colrow.verifying.report import Mode, Report, Verdict, Worst
from colrow.verifying.step import Task, reference_step

Backend = Literal["auto", "local", "gloo"]
EXACT, ROUNDED = 1e-9, 1e-5
"""Tolerances: of a model that computes in fp64 throughout, and of one that rounds to fp32 somewhere."""
_SMALL = 1 << 24
"""Parameters of a model whose matmuls one thread runs."""


def verify(
    build_model: Callable[[], nn.Module] | nn.Module,
    plan: Plan,
    tp: int,
    *,
    backend: Backend = "auto",
    batch_size: int = 2,
    seq_len: int | None = None,
    inputs: GivenInputs | None = None,
    loss: Loss = default_loss,
    tolerance: float | None = None,
    seed: int = 0,
    vary: bool = False,
) -> Report:
    """Compare the model under `plan` on `tp` ranks with the unsharded one, on the CPU, in fp64 where it can.

    Both start from the same random weights and get the same batch, in training mode; in evaluation mode too where the
    unsharded model computes something else there. Compared are the loss, every gradient on every rank, every parameter
    after a step of AdamW, every buffer that forward writes, after it and after the step, and the loss of the next
    forward. Hooks of parameters run.
    Random numbers come from one seed, and each rank draws its shard of the unsharded model's; where nothing says what
    it is a shard of, dropout is off (`Report.dropout_off`). Then the plan or the weights are changed so that the result
    must be wrong, to show that the comparison finds it: `Report.verdict`.

    Args:
        build_model: a function that returns the model, or the model; it may be on the meta device. A big one of a known
            family is replaced by a small one of the same modules, see `dryrun.reduced_model`.
        backend: `local` simulates the ranks in this process, `gloo` starts a process for each; `auto` simulates
            where torch can.
        inputs: example arguments, positional or a mapping by name; unless given, what the model takes by
            [Note: example inputs]. Of a reduced model, token ids are taken modulo its vocabulary.
        loss: of the model's output, as the model returns it, and the inputs. By default next-token cross entropy, or a
            weighted sum of an output that is not logits, plus the scalars of the output (auxiliary losses).
        tolerance: the largest relative error allowed; by default 1e-9, or 1e-5 for a model that rounds to fp32.
        vary: compare with large and with small weights too, unless the model runs in fp32 alone. What no rule proves
            may be wrong with other values only ([Note: what one batch does not show]).

    Raises:
        PlanError: the plan does not fit, tp is 1, or the model is too big.
    """
    started = time.monotonic()
    plan = as_cpus_run_it(plan)
    if tp < 2:
        raise PlanError(f"tp={tp} splits nothing: verify needs tp of 2 or more")
    model, reduced = reduced_model(build_model if isinstance(build_model, nn.Module) else build_model(), tp)
    model = prepared_model(model, seed)
    replay_all_iterators(model)
    with _few_threads(model):
        chosen = _inputs(model, inputs, batch_size, seq_len or -(-16 // tp) * tp, seed + 1, reduced=reduced is not None)
        task, reference, exact = _reference(Task(model, chosen, loss, tp, seed + 2))
        task, reference = _with_draws(task, reference, plan)
        if tolerance is None:
            tolerance = EXACT if exact else ROUNDED
        report = partial(Report, tp=tp, parameters=len(reference.parameters), tolerance=tolerance, reduced=reduced)
        found = _found(task, plan, reference, tolerance, backend, vary=vary)
    return report(**found, seconds=time.monotonic() - started)


@contextmanager
def _few_threads(model: nn.Module) -> Iterator[None]:
    """Within, torch runs a small model in one thread: others would wait for work most of the time, and wait busily (4
    times the CPU time of two layers was seen, where other processes wanted the cores)."""
    threads = torch.get_num_threads()
    if sum(param.numel() for param in model.parameters()) < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _found(
    task: Task, plan: Plan, reference: Reference, tolerance: float, backend: Backend, *, vary: bool
) -> dict[str, Any]:
    """The comparison and its negative control, as fields of a report."""
    modes, values = list[Mode](), list[str]()
    cases = list(_modes(task, reference))
    for _, in_mode, unsharded in cases:
        if unsharded.clocks and decides_alone(in_mode, unsharded.clocks):
            clocks = " and ".join(unsharded.clocks)
            failure = (
                f"what the model computes depends on {clocks}, which each rank reads for itself: let it count its "
                "calls, or draw from random, numpy.random or torch, which have the same seeds on all ranks"
            )
            return {"verdict": "inconclusive", "backend": "local" if backend == "auto" else backend, "failure": failure}
    try:
        seen = _worst_mode(cases, plan, tolerance, backend, modes)
        right = seen.errors.worst <= tolerance
        branches = (other_ways(in_mode, unsharded) for _, in_mode, unsharded in cases)
        others = itertools.chain(*branches, other_values(task) if vary else ())
        for other in others if right else ():
            values.append(other.name)
            with_ranks = backend if seen.backend == "local" else seen.backend
            compared = _compare(other.task, plan, other.reference, TOLERATED, with_ranks)
            if other.refute(compared.errors, tolerance):
                seen = replace(compared, values=other.name)
                break
    except (RankFailure, _NoRanksError) as error:
        ran = isinstance(error, RankFailure)
        return {
            "verdict": "wrong" if ran else "inconclusive",
            "backend": "gloo" if backend == "auto" else backend,
            "cause": "the sharded model raises: `colrow check` names the module" if ran else "",
            "failure": str(error).strip(),
            "modes": tuple(modes),
            "values": tuple(values),
        }
    verdict: Verdict = "wrong"
    control = None
    # Equality proves nothing where an error would not show (a gradient of zero): a broken plan must be seen as such.
    if seen.errors.worst <= tolerance:
        control = negative_control(task, plan, reference, tolerance, run_local if seen.backend == "local" else run_gloo)
        verdict = "proved" if control is not None and control.caught else "inconclusive"
    return {
        "verdict": verdict,
        "backend": seen.backend,
        "modes": tuple(modes),
        "values": tuple(values),
        "training_failure": reference.training_failure,
        "dropout_off": reference.dropout_off,
        "control": control,
        **seen.fields(tolerance, task.tp),
    }


def _worst_mode(
    cases: Sequence[tuple[Mode, Task, Reference]], plan: Plan, tolerance: float, backend: Backend, modes: list[Mode]
) -> _Comparison:
    """The comparison with the largest error of all modes. `modes` gets each one that was started."""
    compared = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "CR105")  # an empty plan splits nothing, which a report shows
        warnings.simplefilter("ignore", FutureWarning)  # torch's on its own names: a user cannot act on them
        for mode, in_mode, unsharded in cases:
            modes.append(mode)
            compared.append(_compare(in_mode, plan, unsharded, tolerance, backend))
    return max(compared, key=lambda comparison: comparison.errors.worst)


def _inputs(
    model: nn.Module, given: GivenInputs | None, batch_size: int, seq_len: int, seed: int, *, reduced: bool
) -> Inputs:
    """The example arguments, floats in fp64; where nobody gave any, what the model takes."""
    torch.manual_seed(seed)
    chosen = example_inputs(model, batch_size, seq_len) if given is None else Inputs.of(given)
    if reduced and given is not None:
        chosen = chosen.within(vocabulary(model))
    return chosen.map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x)


def _with_draws(task: Task, reference: Reference, plan: Plan) -> tuple[Task, Reference]:
    """Both with dropout on, where it is known which part of the unsharded model's draws each rank needs."""
    if not (reference.dropout_off or reference.drew):
        return task, reference
    found = random_draws(task.model, plan, task.tp, 1, 1, inputs=task.inputs, loss=task.loss)
    if found.unknown:
        return task, reference
    task = replace(task, draws=found.modules)
    again = reference_step(task, copied_model(task.model))
    return task, replace(again, training_failure=reference.training_failure)


class _NoRanksError(Exception):
    """Ranks could be neither simulated nor started, so nothing is known of the plan."""


@dataclass(frozen=True)
class _Comparison:
    """Attributes:
    values: those of the weights and tokens where they are not the task's.
    """

    backend: Literal["local", "gloo"]
    observed: Observed
    reference: Reference
    errors: Errors
    values: str = ""

    def fields(self, tolerance: float, tp: int) -> dict[str, Any]:
        """The errors, and where they are largest, as fields of a report."""
        errors, observed = self.errors, self.observed
        worst = sorted(errors.gradients, key=lambda name: -errors.gradients[name])[:5]
        return {
            "loss_rel_err": errors.loss,
            "max_grad_rel_err": max(errors.gradients.values(), default=0.0),
            "max_step_rel_err": max(errors.parameters.values(), default=0.0),
            "max_buffer_rel_err": max(errors.buffers.values(), default=0.0),
            "next_loss_rel_err": errors.next_loss,
            "worst": tuple(Worst(name, errors.gradients[name], observed.ranks_differ(name)) for name in worst),
            "cause": (f"with {self.values}: " if self.values else "")
            + likely_cause(errors, observed, self.reference, tolerance, tp),
        }


def _compare(task: Task, plan: Plan, reference: Reference, tolerance: float, backend: Backend) -> _Comparison:
    used, observed = _observe(task, plan, reference, tolerance, backend)
    return _Comparison(used, observed, reference, compare(observed, reference, task.tp))


def _modes(task: Task, reference: Reference) -> Iterator[tuple[Mode, Task, Reference]]:
    """The modes to compare: the model's own; then evaluation, unless the unsharded model computes there what it does
    in training, bit for bit, or computes no loss."""
    yield "train" if task.model.training else "eval", task, reference
    if not task.model.training:
        return
    in_eval = replace(task, model=copied_model(task.model).eval())
    try:
        found = reference_step(in_eval, copied_model(in_eval.model))
    except Exception:  # in evaluation it may return no loss, or want other arguments: training alone is compared
        return
    if not found.equals(reference):
        yield "eval", _with_written(in_eval, found), found


def parity(model: nn.Module, plan: Plan, tp: int, inputs: GivenInputs) -> Errors:
    """The comparison alone: the model as it is, in evaluation mode and its own dtype, on simulated ranks.

    Raises:
        PlanError: the plan does not fit, or ranks cannot be simulated here.
        RankFailure: the sharded model raises.
    """
    task = Task(copied_model(model).eval(), inputs, default_loss, tp, next_forward=False)
    reference = reference_step(task, copied_model(task.model))
    return compare(run_local(replace(task, written_buffers=reference.written), plan), reference, tp)


def as_cpus_run_it(plan: Plan) -> Plan:
    """The plan without what CPUs have not: the same chunks, however few rows they have, sent by the process group
    instead of copy engines; and matmuls that round as the unsharded model's do, not to fp8."""
    modules: dict[str, Any] = dict(plan.modules)
    for key, style in modules.items():
        if getattr(style, "overlap", None) == "copy_engine":
            style = replace(style, overlap="point_to_point", chunk_rows=1)
        modules[key] = replace(style, fp8="") if getattr(style, "fp8", "") else style
    return replace(plan, modules=modules)


def _reference(task: Task) -> tuple[Task, Reference, bool]:
    """The task, its unsharded step, and whether that is exact to fp64.

    Code that casts its inputs to fp32 is run with casts to fp64. Some operations have no fp64, such as the grouped
    matmuls of experts: then everything runs in fp32. So it does, where the loss is a number in fp32 alone: fp64's
    smallest number times a mask of zeros in fp32 is nan.

    Raises:
        PlanError: the model itself does not run, or its loss is no number.
    """
    for double_casts in (False, True):
        wanted, rounding = replace(task, double_casts=double_casts), Rounding()
        try:
            with rounding:
                reference = reference_step(wanted, copied_model(task.model))
            reference.rounds = rounding.seen
            if math.isfinite(reference.loss):
                return _with_written(wanted, reference), reference, not rounding.seen
        except PlanError:
            raise
        except Exception:
            continue
    single = replace(task, model=copied_model(task.model).float(), inputs=Inputs.of(task.inputs).map(_to_fp32))
    try:
        reference = reference_step(replace(single, rounds=True), copied_model(single.model))
    except Exception as error:
        if task.model.training:  # it may train with arguments that nobody gave
            in_eval, reference, exact = _reference(replace(task, model=copied_model(task.model).eval()))
            reference.training_failure = f"{type(error).__name__}: {first_line(error)}"
            return in_eval, reference, exact
        raise PlanError(
            f"{type(task.model).__name__} itself does not run on the CPU, neither in fp64 nor in fp32 "
            f"({type(error).__name__}: {error}): pass inputs=(...) that it takes"
        ) from error
    if not math.isfinite(reference.loss):
        raise PlanError(
            f"the loss of the unsharded {type(task.model).__name__} is {reference.loss}, in fp64 and in fp32, with "
            "random weights: pass inputs=(...) or loss=... with which it is a number"
        )
    return _with_written(single, reference), reference, False


def _with_written(task: Task, reference: Reference) -> Task:
    return replace(task, written_buffers=reference.written, counts=reference.outside, rounds=reference.rounds)


def _to_fp32(x: Any) -> Any:
    return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def _observe(
    task: Task, plan: Plan, reference: Reference, tolerance: float, backend: Backend
) -> tuple[Literal["local", "gloo"], Observed]:
    """The backend that was used, and the sharded step.

    The simulation cannot run everything (code that asks for its own rank, for one), but a pass there is a pass. So
    `auto` simulates first, and real ranks decide where that fails.
    """
    if backend == "gloo" or plan.loss == "linear" or not can_simulate():
        if backend == "local":
            raise PlanError(
                "backend local needs torch's LocalTensorMode, no process group, and a loss on logits: use backend gloo"
            )
        return "gloo", run_gloo(task, plan)
    observed, failure = None, ""
    try:
        observed = run_local(task, plan)
        if backend == "local" or compare(observed, reference, task.tp).worst <= tolerance:
            return "local", observed
    except RankFailure as error:
        if backend == "local":
            raise
        failure = str(error)
    try:
        return "gloo", run_gloo(task, plan)
    except PlanError as error:  # it cannot be pickled for other processes
        if observed is None:
            raise _NoRanksError(f"in simulated ranks the model raises {failure}; real ranks: {error}") from error
        return "local", observed


def prepared_model(model: nn.Module, seed: int) -> nn.Module:
    """A copy in fp64 with random weights: a one or a zero would hide a missing factor or bias."""
    torch.manual_seed(seed)
    if any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()]):
        model = _off_meta(model)
    else:
        model = copied_model(model)
    model = model.double()
    if not model.training:  # else a user may have parts in evaluation mode on purpose
        model.train()
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
    made = copied_model(model)
    replace_parameters(made, _from_meta)  # a buffer that has values keeps them
    return made


def _from_meta(param: torch.Tensor) -> torch.Tensor:
    return torch.full_like(param, 1.0 if param.ndim == 1 else 0.0, device="cpu") if param.is_meta else param
