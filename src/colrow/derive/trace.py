"""Trace a model's operators, with a marker at every module's inputs and outputs.

Batch and sequence are extents that no dimension of the model has, so that shapes tell the axes apart. The markers are
an identity operator `colrow_plan::boundary(x, label, ...)`; they say which argument of which module an edge of the
graph is, and the trace on local shapes (see local.py) changes extents there as the plan's styles would.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from colrow.derive.failure import TraceError, cannot_trace
from colrow.derive.flattened import NotFlattenedError, Program, exported_program, flattened
from colrow.derive.opaque import NOTHING_OPAQUE, OpaqueModules
from colrow.derive.outside import watching_reads
from colrow.derive.recorded import NotRecordedError, Recording, record
from colrow.derive.undecomposed import NOT_KEPT, Undecomposed
from colrow.dryrun.calls import Inputs, call_model, example_inputs, most_positions
from colrow.dryrun.code_caches import caches_of_one_call
from colrow.errors import PlanError
from colrow.parallel.outputs import auxiliary_losses, main_tensor
from colrow.torch_compat import graphs_alone, masks_without_values, quiet_fake_tensors

_LIBRARY = torch.library.Library("colrow_plan", "DEF")
_LIBRARY.define("boundary(Tensor x, str label, int dim, int mul, int div) -> Tensor")

Scale = tuple[int, int, int]
"""Dimension, and the fraction by which its extent changes: (1, 1, 4) keeps a quarter of dimension 1."""
Rescale = Callable[[str], Scale | None]


def _boundary(x: Tensor, label: str, dim: int, mul: int, div: int) -> Tensor:
    shape = list(x.shape)
    if dim >= 0:
        if shape[dim] * mul % div:
            raise PlanError(f"extent {shape[dim]} at {label} is not divisible by {div}")
        shape[dim] = shape[dim] * mul // div
    return x.new_empty(shape)


def _boundary_real(x: Tensor, label: str, dim: int, mul: int, div: int) -> Tensor:
    return x.clone() if dim < 0 else _boundary(x, label, dim, mul, div)


_LIBRARY.impl("boundary", _boundary_real, "CompositeExplicitAutograd")
torch.library.register_fake("colrow_plan::boundary", _boundary, lib=_LIBRARY)


@dataclass(frozen=True)
class Label:
    """Where a marker stands: `direction` is in or out, `path` leads to the tensor among the arguments or results."""

    direction: str
    module: str
    path: str

    @classmethod
    def parse(cls, text: str) -> Label:
        direction, module, path = text.split("|")
        return cls(direction, module, path)

    def __str__(self) -> str:
        return f"{self.direction}|{self.module}|{self.path}"


@dataclass
class Trace:
    """A traced program and what its placeholders and nodes stand for."""

    program: Program
    batch: int
    seq: int
    parameters: dict[str, str]
    """Placeholder name to the parameter's name in the model."""
    constants: dict[str, Tensor]
    """Buffers and constants by placeholder name."""
    inputs: tuple[str, ...]
    ties: dict[str, str]
    """A tied parameter's other names to its first one, which stands for all of them here."""
    buffers: dict[str, str] = field(default_factory=dict)
    """Placeholder name to the buffer's name in the model."""
    positional: dict[str, int] = field(default_factory=dict)
    """How many positional arguments each module is called with."""
    results: dict[str, int] = field(default_factory=dict)
    """How many results each module returns: 0 for a single tensor."""
    single_output: bool = True
    """Whether the model returns a tensor, and nothing around it."""
    outside: frozenset[str] = frozenset()
    """Parameters that code of other modules reads too, whether the value is used or not."""
    opaque: OpaqueModules = NOTHING_OPAQUE
    """The modules that could not be traced."""
    exports: bool = False
    """Whether only torch.export can trace the model: see [Note: recorded graphs]."""
    undecomposed: Undecomposed = NOT_KEPT
    reads: dict[frozenset[str], list[tuple[str, str, int]]] = field(default_factory=dict)
    """The integers that code around some modules reads, once they were asked for: see `reads.reads`."""
    sized: dict[str, Node] | None = None
    """The results of calls that write sizes, by their labels; None until `sizes.find_sizes` looks."""

    @property
    def nodes(self) -> list[Node]:
        return list(self.program.graph.nodes)

    def output(self) -> Node:
        """The node that the model returns; the first of several."""
        out = next(n for n in self.nodes if n.op == "output").args[0]
        while isinstance(out, (tuple, list)):
            out = out[0]
        assert isinstance(out, Node)
        return out


def is_boundary(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.colrow_plan.boundary.default


def label_of(node: Node) -> Label:
    return Label.parse(str(node.args[1]))


class _Called(nn.Module):
    """The model as `dryrun.calls` calls it: its main output, and the losses that it returns beside it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], calls: Calls) -> None:
        super().__init__()
        self.m, self.names, self.calls = model, names, calls

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        output = call_model(self.m, Inputs(inputs).named(self.names))
        self.calls.single_output = isinstance(output, Tensor)
        main, losses = main_tensor(output), auxiliary_losses(output)
        return (main, *losses.values())


def _prime_sizes(model: nn.Module, tp: int) -> tuple[int, int]:
    """Batch and sequence extents that no dimension of a parameter has; the sequence is a multiple of tp."""
    taken = {int(n) for p in model.parameters() for n in p.shape}
    limit = most_positions(model) or 1 << 20
    # Small, because tensors of this size are made; primes, so that no product of the model's sizes is one of them.
    for batch in (3, 5, 7, 11, 13):
        for prime in (17, 13, 19, 23, 11, 29, 31, 7, 37):
            seq = tp * prime
            if seq <= limit and not taken & {batch, seq, batch * seq, prime} and batch != seq:
                return batch, seq
    return 3, 17 * tp


def default_inputs(model: nn.Module, tp: int) -> Inputs:
    """What the model takes by [Note: example inputs], on its device: zeros, of distinct sizes."""
    batch, seq = _prime_sizes(model, tp)
    device = next(iter(model.parameters())).device
    return example_inputs(model, batch, seq, torch.Generator()).map(lambda x: torch.zeros_like(x, device=device))


@contextlib.contextmanager
def _traceable(model: nn.Module, rescale: Rescale | None, opaque: OpaqueModules) -> Iterator[Calls]:
    """Within, the model's code runs as a trace needs it; what the markers see."""
    # Evaluation: dropout would add operators that say nothing of how a model is split. `model.train()` could not bring
    # the modes back: a user may have set some modules to evaluation.
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with (
            quiet_fake_tensors(),
            graphs_alone(),
            masks_without_values(),
            caches_of_one_call(model),
            markers(model, rescale) as calls,
            opaque.within(model),
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),  # where export fails it prints the graph so far
        ):
            warnings.simplefilter("ignore")
            yield calls
    except NotRecordedError:
        raise
    except Exception as error:
        raise cannot_trace(model, error) from error
    finally:
        for module, mode in training.items():
            module.training = mode


@dataclass(frozen=True)
class Run:
    """How a model's code is run for its operators.

    Attributes:
        rescale: what the markers change.
        within: around the model's code alone: each call that is watched costs.
        opaque: modules that are not looked into.
        exports: by torch.export, and not recorded: see [Note: recorded graphs].
    """

    rescale: Rescale | None = None
    within: contextlib.AbstractContextManager[None] = field(default_factory=contextlib.nullcontext)
    opaque: OpaqueModules = NOTHING_OPAQUE
    exports: bool = False

    def operators(self, model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Recording | ExportedProgram, Calls]:
        """What the model's code calls, without decompositions, and what the markers saw.

        Raises:
            TraceError: as `trace`.
            NotRecordedError: only an export can tell.
        """
        inputs = Inputs.of(inputs)
        with _traceable(model, self.rescale, self.opaque) as calls:
            called = _Called(model, inputs.names, calls).eval()
            with self.within:
                if not self.exports:
                    return record(model, inputs, called.forward), calls
                # not strict: the model's Python code runs as it is, so that hooks and function modes take part
                return torch.export.export(called, tuple(inputs), strict=False), calls


def operators_like(
    traced: Trace,
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    rescale: Rescale | None = None,
    within: contextlib.AbstractContextManager[None] | None = None,
) -> tuple[Recording | ExportedProgram, Calls]:
    """The operators of `model`, the traced one or a copy for a rank, without decompositions."""
    run = Run(rescale, within or contextlib.nullcontext(), traced.opaque, traced.exports)
    try:
        return run.operators(model, inputs)
    except NotRecordedError:  # what the model itself does not do
        return replace(run, exports=True).operators(model, inputs)


def decomposed(found: Recording | ExportedProgram) -> Program:
    """The program with regions under `no_grad` inlined, and without writes in place.

    Raises:
        NotFlattenedError: of a recording, which then has to be exported.
    """
    if isinstance(found, Recording):
        return flattened(found)
    with quiet_fake_tensors(), graphs_alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return exported_program(found.run_decompositions({}))


def trace(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    opaque: OpaqueModules = NOTHING_OPAQUE,
) -> Trace:
    """Trace `model` in evaluation mode; it is left as it was.

    Args:
        opaque: modules that are not looked into.

    Raises:
        TraceError: torch.export cannot trace the model; the text names the module and says why, and the error is
            raised from torch's.
    """
    try:
        return _trace(model, Inputs.of(inputs), opaque, exports=False)
    except (NotRecordedError, NotFlattenedError, TraceError):  # an error has the text that it has in an export
        return _trace(model, Inputs.of(inputs), opaque, exports=True)


def _trace(model: nn.Module, inputs: Inputs, opaque: OpaqueModules, *, exports: bool) -> Trace:
    outside = set[str]()
    found, calls = Run(None, watching_reads(model, outside), opaque, exports).operators(model, inputs)
    program = decomposed(found)
    parameters, ties = _parameters_of(model, program)
    # scalars and masks without a batch may come first
    lead = next((x for x in inputs.tensors if x.dim() >= 2), inputs.tensors[0])
    return Trace(
        program,
        batch=int(lead.shape[0]),
        seq=int(lead.shape[1]) if lead.dim() > 1 else 1,
        parameters=parameters,
        constants=_constants_of(model, program),
        inputs=program.inputs,
        ties=ties,
        buffers=program.buffers,
        positional=calls.positional,
        results=calls.results,
        single_output=calls.single_output,
        outside=frozenset(outside),
        opaque=opaque,
        exports=exports,
        undecomposed=Undecomposed.of(found.graph, program.graph),
    )


def _parameters_of(model: nn.Module, program: Program) -> tuple[dict[str, str], dict[str, str]]:
    """The parameter of each placeholder that is used, and the first names of tied ones: `Trace.parameters` and
    `Trace.ties`."""
    state = dict(model.named_parameters(remove_duplicate=False))
    first_name = {id(param): name for name, param in model.named_parameters()}
    used = {n.name for n in program.graph.nodes if n.op == "placeholder" and n.users}
    parameters = {ph: first_name[id(state[name])] for ph, name in program.parameters.items() if ph in used}
    ties = {name: first_name[id(param)] for name, param in state.items() if first_name[id(param)] != name}
    return parameters, ties


def _constants_of(model: nn.Module, program: Program) -> dict[str, Tensor]:
    """`Trace.constants`."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return program.constants | {ph: buffers[name] for ph, name in program.buffers.items() if name in buffers}


@dataclass
class Calls:
    """What the markers saw: shapes in order, and how modules were called."""

    shapes: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    positional: dict[str, int] = field(default_factory=dict)
    results: dict[str, int] = field(default_factory=dict)
    single_output: bool = True


@contextlib.contextmanager
def markers(model: nn.Module, rescale: Rescale | None = None) -> Iterator[Calls]:
    """Mark the tensors that enter and leave every module that holds parameters."""
    calls, handles = Calls(), []
    for name, module in model.named_modules():
        if name and any(True for _ in module.parameters()):
            marker = _Marker(name, calls, rescale)
            # transformers records router logits by hooks that it adds in a model's first call: they get marked tensors
            first = all(hook.__module__.startswith("transformers.") for hook in module._forward_hooks.values())
            handles.append(module.register_forward_pre_hook(marker.before, with_kwargs=True))
            handles.append(module.register_forward_hook(marker.after, prepend=first))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class _Marker:
    """Marks what one module gets and returns, and notes how it is called."""

    name: str
    calls: Calls
    rescale: Rescale | None

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        self.calls.positional[self.name] = len(args)
        marked = tuple(self._mark(arg, "in", str(i)) for i, arg in enumerate(args))
        return marked, {key: self._mark(value, "in", key) for key, value in kwargs.items()}

    def after(self, _: nn.Module, args: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return self._mark(out, "out", "0")
        if type(out) in (tuple, list):
            self.calls.results[self.name] = len(out)
            return type(out)(self._mark(value, "out", str(i)) for i, value in enumerate(out))
        return out

    def _mark(self, value: Any, direction: str, path: str) -> Any:
        if isinstance(value, Tensor):
            label = str(Label(direction, self.name, path))
            dim, mul, div = (self.rescale(label) if self.rescale else None) or (-1, 1, 1)
            self.calls.shapes.append((label, tuple(value.shape)))
            return torch.ops.colrow_plan.boundary(value, label, dim, mul, div)
        if type(value) in (tuple, list):
            return type(value)(self._mark(item, direction, f"{path}.{i}") for i, item in enumerate(value))
        if type(value) is dict:
            return {key: self._mark(item, direction, f"{path}.{key}") for key, item in value.items()}
        return value
