"""The unsharded and the sharded model beside each other, operator by operator, forward and backward, on fake tensors.

For each local tensor it is known what it is of the unsharded run's (`sharding.local_layout`), and every operator on
local tensors has to be proven ([Note: proven operators]).
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from colrow.dryrun.block_kinds import BlockTraces, runs_known_code
from colrow.dryrun.calls import Inputs, Loss, call_model, give_targets, head_loss
from colrow.dryrun.code_caches import caches_forgotten
from colrow.dryrun.fake_world import fake_tp_mesh, materialize_fake
from colrow.dryrun.module_tracker import LOSS
from colrow.dryrun.numbered import NumberedRun, NumberedValue
from colrow.dryrun.paired_runs import ShardedRun
from colrow.dryrun.planned_step import PlannedStep
from colrow.dryrun.reduced_copy import KEPT, ReducedCopy, reduced_copy
from colrow.dryrun.sequence_sizes import sizes_of_sequences
from colrow.dryrun.unproven import Unproven
from colrow.dryrun.unsharded_run import UnshardedRun
from colrow.parallel.loss import loss_context
from colrow.parallel.parallelize import parallelize
from colrow.parallel.random_state import Generators
from colrow.plans.plan import Plan
from colrow.sharding.draws import Draw
from colrow.sharding.layout import packed_of
from colrow.sharding.local_layout import REPLICATED, STYLE, UNKNOWN, layout_of, sharded
from colrow.styles.fast.unflatten import complete_sequences, views_complete_sequences
from colrow.styles.local_sizes import project_apart
from colrow.styles.rank_tensors import RANK_TABLES
from colrow.styles.site import Site
from colrow.torch_compat import fake_tensors, forget_shardings

ModuleDraws = dict[str, tuple[Draw, ...]]
"""By a module's name, what its own code draws in a call."""


def unproven_operators(step: PlannedStep) -> list[Unproven]:
    """What nothing proves in the step; empty where all is proven. Of a model that does not run on fake tensors, that is
    the one finding."""
    found = walk(step)
    if isinstance(found, Exception):
        return [Unproven("model", "", "", f"the unsharded run raises {type(found).__name__}: {str(found)[:120]}")]
    if not _flattens_tokens(step) or runs_known_code(step.model):
        return found.unproven
    # a user's code between blocks with flattened tokens: see [Note: two views of flattened tokens]
    with complete_sequences():
        again = walk(_of_sequences_for_all(step))
    if isinstance(again, Exception):
        return found.unproven
    listed = {(each.operator, each.where, each.line) for each in found.unproven}
    more = [each for each in again.unproven if (each.operator, each.where, each.line) not in listed]
    return found.unproven + more + _unlike_draws(_told_apart(found.draws, again.draws), again.draws)


def _unlike_draws(first: ModuleDraws, second: ModuleDraws) -> list[Unproven]:
    """The draws that are for other elements in the two views of flattened tokens: for sequences, as in one process, and
    for a shard of each."""
    found = []
    for name, drawn in first.items():
        pairs = zip(drawn, second.get(name, ()), strict=False)
        views = [(sharded(0) if draw.flattened else draw.layout, other.layout) for draw, other in pairs]
        if not all(draw.is_known for draw in drawn) or any(a != b for a, b in views):
            reason = "nothing says which tokens or sequences its random numbers are for"
            found.append(Unproven("dropout", name, "", reason))
    return found


def draws_by_module(step: PlannedStep) -> PairedWalk | Exception:
    """What a forward draws, in every block."""
    found = walk(step, all_blocks=True, backward=False)
    if isinstance(found, Exception) or all(draw.is_known for drawn in found.draws.values() for draw in drawn):
        return found
    if not _flattens_tokens(step):
        return found
    with complete_sequences():
        again = walk(_of_sequences_for_all(step), all_blocks=True, backward=False)
    return found if isinstance(again, Exception) else replace(found, draws=_told_apart(found.draws, again.draws))


def _told_apart(first: ModuleDraws, second: ModuleDraws) -> ModuleDraws:
    """The draws of the first view of flattened tokens. What may be tokens or heads there is a shard of dim 0 in the
    second view where it is tokens, and of dim 1 where it is heads."""
    known = {sharded(0): Draw(sharded(1), flattened=True), sharded(1): Draw(sharded(1))}
    found = {}
    for name, drawn in first.items():
        others = second.get(name, ())
        if len(others) == len(drawn):
            pairs = zip(drawn, others, strict=True)
            drawn = tuple(draw if draw.is_known else known.get(other.layout, draw) for draw, other in pairs)
        found[name] = drawn
    return found


def _flattens_tokens(step: PlannedStep) -> bool:
    return any(style.token_order == "flattened" for style in step.plan.styles_of(step.model).values())


def _of_sequences_for_all(step: PlannedStep) -> PlannedStep:
    """With three sequences for each rank: of one, a dim of one element would stretch, and of two, pairs of sequences
    would lie on one rank."""
    if step.inputs is None:
        return replace(step, batch_size=3 * step.tp)
    inputs = Inputs.of(step.inputs)
    batches = {x.shape[0] for x in inputs.tensors if x.dim()}
    times = 1 if all(n % (3 * step.tp) == 0 for n in batches) else 3 * step.tp
    longer = inputs.map(lambda x: x.repeat_interleave(times, 0) if isinstance(x, Tensor) and x.dim() else x)
    return replace(step, inputs=longer)


@dataclass(frozen=True)
class PairedWalk:
    """What the two runs beside each other have shown.

    Attributes:
        draws: what each module's own code draws by element in one of its calls, in order, in forward.
    """

    unproven: list[Unproven]
    draws: ModuleDraws


def walk(step: PlannedStep, *, all_blocks: bool = False, backward: bool = True) -> PairedWalk | Exception:
    """Both runs, or the exception with which the unsharded model fails.

    Args:
        all_blocks: keep every block where all code is known too; else every one is kept anyway.
        backward: run it too.
    """
    # where all code is known, equal blocks compute the same, and two show everything
    keep = KEPT if runs_known_code(step.model) and not all_blocks else sys.maxsize
    # of one sequence, a shard of the flattened tokens is a shard of dim 1; else two sequences tell 1 from "any"
    one = _flattens_tokens(step) and not views_complete_sequences()
    several = replace(step, batch_size=max(step.batch_size, 2))
    first = replace(step, batch_size=1) if one else several
    found = _walked(first, keep, backward)
    if isinstance(found, Exception) and one:  # a batch norm does not take one element
        found = _walked(several, keep, backward)
    if isinstance(found, Exception) and "BF16" in str(found):  # torch's grouped matmuls take no other type
        found = _walked(replace(first, dtype=torch.bfloat16), keep, backward)
    return found


def _walked(step: PlannedStep, keep: int, backward: bool) -> PairedWalk | Exception:
    styles = step.plan.styles_of(step.model)
    copies = [reduced_copy(step.model, styles, BlockTraces(), keep) for _ in range(2)]
    unsharded, parallel = (copy.model for copy in copies)
    plan = copies[1].renamed_plan(step.plan, styles)
    pair = StepPair(step, plan, unsharded, parallel, copies[1].original)
    with warnings.catch_warnings(), caches_forgotten(step.model), fake_tp_mesh(step.tp) as mesh:
        warnings.simplefilter("ignore")
        parallelize(parallel, plan, mesh)
        with fake_tensors():
            for model in (unsharded, parallel):
                materialize_fake(model, step.dtype)
            given = step.fake_inputs(unsharded)
            # code may decide by what it draws: the sharded run draws the same, and takes the same way
            draws = Generators([step.model], "cpu").preserved(torchs=False)
            try:
                with draws, pair.unsharded(given) as is_loss:
                    _run_step(is_loss, unsharded, given, step.loss, None, backward)
            except Exception as error:
                return error
            try:
                with pair.sharded(given, mesh) as is_loss, loss_context(plan, mesh):
                    _run_step(is_loss, parallel, given, step.loss, plan, backward)
            except Exception:  # it is a finding
                forget_shardings()  # of a run that ended early an embedding's mask would stay in DTensor's cache
            return pair.walk()


def _run_step(
    is_loss: Callable[[Tensor], None], model: nn.Module, inputs: Inputs, loss: Loss, plan: Plan | None, backward: bool
) -> None:
    """A forward and a backward, under a plan or of the unsharded model."""
    if plan is not None and plan.loss == "linear":  # the head returns the loss
        give_targets(model, plan, inputs)
        value = head_loss(call_model(model, inputs))
    else:
        value = loss(call_model(model, inputs), inputs.given)
    is_loss(value)
    if value.requires_grad and backward:
        value.backward()


def judges_runs_of(step: PlannedStep, copy: ReducedCopy) -> bool:
    """Whether `unproven_operators` runs the step itself, on the blocks that this copy has: one pair of runs is enough
    for it and for a dry run then."""
    if _flattens_tokens(step) or (step.inputs is None and step.batch_size < 2):
        return False
    if not runs_known_code(step.model):
        return not copy.repeats
    kept = reduced_copy(step.model, step.plan.styles_of(step.model), BlockTraces(), KEPT)
    return (kept.repeats, kept.original_names) == (copy.repeats, copy.original_names)


class StepPair:
    """An unsharded and a sharded run of a step, each within its context; the first comes first.

    Each context gives a function, which is to be called with the loss before its backward.

    Args:
        plan: the step's, under the names of the copies.
        unsharded, parallel: copies of the model, neither of them parallelised yet.
        original: gives a module's name in the step's model.
    """

    def __init__(
        self,
        step: PlannedStep,
        plan: Plan,
        unsharded: nn.Module,
        parallel: nn.Module,
        original: Callable[[str], str],
    ) -> None:
        self._step, self._plan, self._original = step, plan, original
        self._models = unsharded, parallel
        sites = {name: Site(parallel, name, step.tp) for name in plan.modules}
        self._segments = {name: style.output_segments(sites[name]) for name, style in plan.modules.items()}
        self._losses: list[NumberedValue] = []
        self._reference: UnshardedRun
        self._run: ShardedRun
        self._ended = False
        for name, style in plan.modules.items():
            if style.sizes and isinstance(attention := unsharded.get_submodule(name), nn.MultiheadAttention):
                project_apart(attention)

    @contextmanager
    def unsharded(self, inputs: Inputs) -> Iterator[Callable[[Tensor], None]]:
        """Around a run of the unsharded copy, on fake tensors."""
        self._reference = UnshardedRun(self._models[0])
        _number_known_values(self._reference, self._models[0], inputs)
        # what the sharded run does not make itself, but takes from a cache, would have no number
        with caches_forgotten(self._step.model), self._reference:
            yield lambda loss: self._losses.append(self._reference.value(loss))

    @contextmanager
    def sharded(self, inputs: Inputs, mesh: DeviceMesh) -> Iterator[Callable[[Tensor], None]]:
        """Around a run of the copy that is parallelised by now; its exception is a finding, and passes."""
        length, counted = _counts_of_tokens(self._step, inputs)
        flattened = 0 if counted[0] else length
        model, styles = self._models[1], self._plan.modules
        run = self._run = ShardedRun(model, self._reference, mesh, styles, self._segments, flattened, counted)
        sizes = sizes_of_sequences(run, counted, length) if counted[0] and length else nullcontext()
        _number_known_values(run, model, inputs)
        try:
            with sizes, run.conversions(), run:
                yield lambda loss: self._losses.append(run.value(loss))
        except Exception as error:
            run.report("model", f"the sharded run raises {type(error).__name__}: {str(error)[:120]}", run.module())
            raise
        self._ended = True

    def walk(self) -> PairedWalk:
        """What the two have shown; while their tensors are fake."""
        run = self._run
        if self._ended:
            wanted, (number, layout) = self._losses
            known = number == wanted.number and layout in (REPLICATED, UNKNOWN, STYLE)
            if self._plan.loss != "linear" and not known:
                run.report("loss", f"it is {layout}, or another value than in the unsharded model", LOSS)
            _compare_gradients(run, self._reference, *self._models)
            run.reports.add_kept()
        drawn = _draws_of_modules(run)
        return PairedWalk(
            [replace(found, where=self._original(found.where)) for found in run.reports.found],
            {self._original(name): found for name, found in drawn.items()},
        )


def _number_known_values(run: NumberedRun, model: nn.Module, inputs: Inputs) -> None:
    """Parameters, buffers and inputs have their names as numbers."""
    first: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        number = ("state", first.setdefault(id(tensor), name))
        packed = packed_of(model, name) if isinstance(tensor, DTensor) else None
        layout = sharded(packed.dim, packed.segments) if packed else REPLICATED
        if packed is None and isinstance(tensor, DTensor):
            layout = layout_of(tensor.placements[0], tuple(tensor.shape)) or STYLE
        run.set_value(tensor, number, layout)
    for i, x in enumerate(inputs.tensors):
        run.set_value(x, ("input", i), REPLICATED)
    for table in list(RANK_TABLES):
        run.set_value(table, ("rank table", id(table)), STYLE)


def _counts_of_tokens(step: PlannedStep, inputs: Inputs) -> tuple[int, tuple[int, int]]:
    """Tokens of a sequence where shards are of flattened tokens, in either view, else 0; sequences on a rank and in the
    unsharded run where complete sequences are viewed, else zeros."""
    tensors = inputs.tensors
    lengths = [x.shape[1] for x in tensors if x.ndim > 1]
    batches = [x.shape[0] for x in tensors if x.ndim]
    length = lengths[0] if _flattens_tokens(step) and lengths else 0
    return length, (batches[0] // step.tp, batches[0]) if views_complete_sequences() and batches else (0, 0)


def _draws_of_modules(run: ShardedRun) -> dict[str, tuple[Draw, ...]]:
    """By module; where its calls draw for other layouts it is reported, for nothing tells a rank which call runs."""
    by_module: dict[str, list[tuple[Draw, ...]]] = defaultdict(list)
    for (name, _), draws in run.draws.items():
        by_module[name].append(tuple(draws))
    for name, calls in by_module.items():
        if len(set(calls)) > 1:  # in which order each of them draws cannot be told either
            calls[:] = [tuple(draw._replace(order=None) for draw in call) for call in calls]
        if len(set(calls)) > 1 and any(draw.layout != REPLICATED for call in calls for draw in call):
            run.report("dropout", "the module's calls drop elements of tensors with several layouts", name)
    return {name: calls[0] for name, calls in by_module.items()}


def _compare_gradients(run: ShardedRun, reference: UnshardedRun, unsharded: nn.Module, parallel: nn.Module) -> None:
    for (name, want), (_, got) in zip(unsharded.named_parameters(), parallel.named_parameters(), strict=True):
        if want.grad is not None and got.grad is not None:
            number = run.value(got.grad).number
            run.read(number)
            if number not in (None, reference.value(want.grad).number):
                run.report("gradient", "it is another value than in the unsharded model", name)
        elif want.grad is not None:
            run.report("gradient", "it gets none", name)
