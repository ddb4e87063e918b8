"""A step repeated from the same state: a difference is silent corruption, or a kernel that is not deterministic.

[Note: replay]
Forward and backward run twice with the same weights, batches, random numbers and buffers. Compared are the bits of
every module's output, of the loss, and of each gradient, before and after its reduction over data ranks. Where any rank
sees a difference, all run the step three times more. On a rank where four of the five runs agree, one run was
corrupted; where more differ, a kernel is not deterministic: deterministic kernels are switched on, and if the runs
still differ, the operator is named and the run ends.

Of the ranks of a tp or pp group, which send each other activations, the one is named whose trace differs first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.errors import ColrowError, first_line
from colrow.mesh import MeshAxes
from colrow.sharding.layout import waited_local
from colrow.torch_compat import FsdpUnit, fsdp_units, tensors_in
from colrow.train.buffers import BufferSnapshot
from colrow.train.fingerprint import fingerprints
from colrow.train.operator_trace import OperatorTrace, first_nondeterministic

if TYPE_CHECKING:
    from colrow.data.loader import Batch
    from colrow.train.step import ForwardBackward

RUNS = 5
"""Times that a step runs whose first two runs differ."""


class SilentCorruptionError(ColrowError):
    """A rank computed or kept other bits than it should; the text names it."""


class NondeterministicError(ColrowError):
    """A step cannot be repeated bit for bit; the text names the operator."""


class Phase(IntEnum):
    """What an entry of a trace is of, in the order of a step."""

    FORWARD = 0
    LOSS = 1
    GRADIENT = 2
    REDUCED = 3


Entry = tuple[Phase, str, int]
"""What, of which module or parameter, and the hash of its bits."""


@dataclass(frozen=True)
class _Report:
    """What a rank saw of several runs of one step."""

    rank: int
    data_rank: int
    distinct: int
    """Runs that differ from the most frequent one."""
    order: tuple[int, int, int]
    """Phase, stage and position of the first difference."""
    where: str


class StepReplay:
    """Runs forward and backward of a step, of every `every`th several times.

    Args:
        modules: the model, or this rank's pipeline stages, wrapped for training.
        opaque: compiled blocks: their outputs are seen, and none inside them, where a hook would be traced.

    Attributes:
        say: prints a line.
    """

    def __init__(
        self,
        every: int,
        run: ForwardBackward,
        modules: Sequence[nn.Module],
        axes: MeshAxes,
        opaque: Sequence[nn.Module] = (),
    ) -> None:
        self._every, self._run, self._modules, self._axes = every, run, modules, axes
        self.say: Callable[[str], None] = print
        self._names = {param: name for module in modules for name, param in module.named_parameters()}
        self._trace: list[tuple[Phase, str, Tensor]] | None = None
        self._units = [unit for module in modules for unit in fsdp_units(module)]
        for unit in self._units:  # afterwards a wrong gradient stands on every rank of its group
            unit.before_reduction(self._record_unreduced)
        hidden = {id(part) for block in opaque for part in block.modules() if part is not block}
        for module in modules:
            for name, part in module.named_modules():
                if id(part) not in hidden:
                    part.register_forward_hook(partial(self._record_output, name or "the model"))

    def due(self, step: int) -> bool:
        """Whether step `step` (from 0) is repeated."""
        return (step + 1) % self._every == 0

    def __call__(self, step: int, batches: Sequence[Batch], require_same_weights: Callable[[], None]) -> Tensor:
        """This rank's mean loss; gradients are left as by one run. Collective.

        Args:
            require_same_weights: called on every rank where runs differ on any; raises where weights have changed.

        Raises:
            SilentCorruptionError: on every rank, where one rank's runs differ once.
            NondeterministicError: on every rank, where they differ whatever kernels are used.
        """
        if not self.due(step):
            return self._run(batches)
        replayed = self._replay(batches)
        loss, first = replayed()
        loss, second = replayed()
        if not self._anywhere(first != second):
            return loss
        require_same_weights()  # else every rank that gathers them would be named
        # more runs show which of the two was the unusual one
        traces = [first, second, *(replayed()[1] for _ in range(RUNS - 2))]
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, self._report(traces))
        # a fault of the hardware strikes one run; code that is not deterministic differs more often
        if all(report.distinct <= 1 for report in reports):
            raise SilentCorruptionError(_corruption_text(step, reports))
        return self._with_deterministic_kernels(step, replayed)

    def _with_deterministic_kernels(self, step: int, replayed: Callable[[], tuple[Tensor, list[Entry]]]) -> Tensor:
        if not torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(True)
            try:
                loss, first = replayed()
                loss, second = replayed()
            except RuntimeError as error:
                if "deterministic" not in str(error):
                    raise
                raise NondeterministicError(_refusal(step, first_line(error))) from error
            if not self._anywhere(first != second):
                self.say(
                    f"replay     step {step + 1} ran twice with other bits: deterministic kernels are on from here"
                )
                return loss
        with OperatorTrace() as first_operators:
            replayed()
        with OperatorTrace() as second_operators:
            replayed()
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, first_nondeterministic(first_operators.entries, second_operators.entries))
        named = [f"{name} (rank {rank})" for rank, name in enumerate(found) if name is not None]
        raise NondeterministicError(_refusal(step, named[0] if named else "an operator that differs rarely"))

    def _replay(self, batches: Sequence[Batch]) -> Callable[[], tuple[Tensor, list[Entry]]]:
        """A function that runs the step from the state of now."""
        buffers = BufferSnapshot(self._modules)

        def replayed() -> tuple[Tensor, list[Entry]]:
            buffers.restore()
            self._drop_gradients()
            with self._recorded() as trace:
                loss = self._run(batches)
                trace.append((Phase.LOSS, "the loss", fingerprints([loss])[0]))
                holders = {param: self._holder(param) for param in self._names}
                phase = Phase.REDUCED if self._units else Phase.GRADIENT
                self._record(phase, {self._names[param]: holder.grad for param, holder in holders.items()})
            # one copy to the host for all
            hashes = torch.stack([value for _, _, value in trace]).tolist()
            return loss, [(phase, name, value) for (phase, name, _), value in zip(trace, hashes, strict=True)]

        return replayed

    @contextmanager
    def _recorded(self) -> Iterator[list[tuple[Phase, str, Tensor]]]:
        trace: list[tuple[Phase, str, Tensor]] = []
        self._trace = trace
        try:
            yield trace
        finally:
            self._trace = None

    def _record(self, phase: Phase, tensors: dict[str, Any]) -> None:
        present = {name: waited_local(x) for name, x in tensors.items() if isinstance(x, Tensor)}
        if self._trace is not None:
            hashes = fingerprints(present.values())
            self._trace += [(phase, name, value) for name, value in zip(present, hashes, strict=True)]

    def _record_output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._trace is not None:
            for x in tensors_in(output):
                self._record(Phase.FORWARD, {name: x})

    def _record_unreduced(self, unit: FsdpUnit) -> None:
        if self._trace is not None:
            grads = unit.unreduced_gradients(fill=False)
            named = {self._names[p]: grad for p, grad in zip(unit.parameters(), grads, strict=True)}
            self._record(Phase.GRADIENT, named)

    def _holder(self, param: nn.Parameter) -> nn.Parameter:
        weights = self._run.weights
        return weights.grad_holder(param) if weights else param

    def _drop_gradients(self) -> None:
        for param in self._names:
            param.grad = None
        if self._run.weights:
            self._run.weights.drop_gradients()

    def _anywhere(self, flag: bool) -> bool:
        found = torch.tensor(int(flag), device=next(iter(self._names)).device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found.item())

    def _report(self, traces: Sequence[list[Entry]]) -> _Report:
        usual = max(traces, key=traces.count)
        unusual = [trace for trace in traces if trace != usual]
        order, where = (len(Phase), 0, 0), ""
        if unusual:
            position, (phase, name, _) = _first_difference(usual, unusual[0])
            stage = self._axes.rank("pp")
            # backward runs from the last stage to the first
            order, where = (int(phase), -stage if phase > Phase.LOSS else stage, position), _described(phase, name)
        return _Report(dist.get_rank(), self._axes.data_rank, len(unusual), order, where)


def _first_difference(usual: Sequence[Entry], other: Sequence[Entry]) -> tuple[int, Entry]:
    for position, (a, b) in enumerate(zip(usual, other, strict=False)):
        if a != b:
            return position, a
    longer = max(usual, other, key=len)
    return min(len(usual), len(other)), longer[min(len(usual), len(other))]


def _described(phase: Phase, name: str) -> str:
    match phase:
        case Phase.FORWARD:
            return f"the output of {name}"
        case Phase.LOSS:
            return name
        case Phase.GRADIENT:
            return f"the gradient of {name}"
        case Phase.REDUCED:
            return f"the reduced gradient of {name}"


def _corruption_text(step: int, reports: Sequence[_Report]) -> str:
    differing = [report for report in reports if report.distinct]
    # A reduction spreads a wrong gradient to all ranks of its group: what a rank computed before it names the rank.
    own = [report for report in differing if report.order[0] < Phase.REDUCED] or differing
    # ranks that read the same batches pass a fault on: the first of them to differ has it
    firsts = [min(r.order for r in own if r.data_rank == group) for group in sorted({r.data_rank for r in own})]
    named = [r for r in own if r.order in firsts]
    ranks = ", ".join(str(r.rank) for r in named)
    plural = len(named) > 1
    return (
        f"silent corruption: step {step + 1} was repeated from the same state, and on rank{'s' if plural else ''} "
        f"{ranks} one of {RUNS} runs has other bits, first in {named[0].where}. Replace or test the hardware of "
        f"{'these ranks' if plural else 'this rank'}, and continue from the newest checkpoint"
    )


def _refusal(step: int, operator: str) -> str:
    return (
        f"train.replay_every: step {step + 1} gives other bits each time it is repeated, with deterministic kernels "
        f"too: {operator}. Replace this operator by a deterministic one, or set train.replay_every to 0"
    )
