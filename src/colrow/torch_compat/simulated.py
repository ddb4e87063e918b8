"""Tensors without memory, and all ranks in one process."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from colrow.torch_compat.dtensors import StridedShard
from colrow.torch_compat.names import private, replaced
from colrow.torch_compat.tensors import is_transformed


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Within, an operation that fails on fake tensors, or in an export, is not logged: callers take the failure as a
    result."""
    names = ("torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes")
    levels = [(logger, logger.level) for logger in map(logging.getLogger, names)]
    for logger, _ in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)


def fake_tensor_mode(**options: Any) -> Any:
    """A FakeTensorMode: tensors of shapes, dtypes and devices without memory."""
    return private("torch._subclasses.fake_tensor:FakeTensorMode", "for the dry run")(**options)


def fake_mode_of(tensor: Any) -> Any:
    """The mode that a fake tensor belongs to; None of any other value."""
    return tensor.fake_mode if is_fake(tensor) else None


def is_decomposed_in_export(target: Any) -> bool:
    """Whether torch makes the operator of others and `run_decompositions({})` takes it apart: those stay whole of which
    no result can be a view."""
    stays = private("torch._export.utils:_is_preservable_cia_op", "to flatten exported graphs")
    composed = private("torch._export.utils:_is_cia_op", "to flatten exported graphs")
    return bool(composed(target)) and not stays(target)


def python_dispatcher() -> contextlib.AbstractContextManager[Any]:
    """Within, operators run by their Python decompositions where torch has some, as in an export."""
    entered: contextlib.AbstractContextManager[Any] = private(
        "torch._dispatch.python:enable_python_dispatcher", "to flatten exported graphs"
    )()
    return entered


def as_in_export() -> contextlib.AbstractContextManager[None]:
    """Within, `torch.compiler.is_exporting()` is true: code that asks runs as torch.export runs it."""
    state = private("torch._export.utils:_compiling_state_context", "to run code on fake tensors as it is exported")
    entered: contextlib.AbstractContextManager[None] = state()
    return entered


class PreDispatchMode(private("torch.fx.experimental.proxy_tensor:ProxyTorchDispatchMode", "to record graphs")):  # type: ignore[misc]
    """A dispatch mode that sees operators as torch.export does: before autograd, autocast and decompositions. It has to
    be entered within `python_dispatcher()`."""

    def __init__(self) -> None:
        # torch takes no mode of another base there; all that the base would do with a tracer a subclass does itself
        super().__init__(None, "real", pre_dispatch=True)


def fake_state(module: Any, tensors: dict[str, Any]) -> contextlib.AbstractContextManager[None]:
    """Within, the module has these parameters and buffers."""
    within = private("torch.nn.utils.stateless:_reparametrize_module", "to record graphs")
    entered: contextlib.AbstractContextManager[None] = within(module, tensors)
    return entered


def attributes_put_back(module: Any) -> contextlib.AbstractContextManager[None]:
    """Afterwards the modules inside have the attributes that they had, buffers and parameters aside."""
    within = private("torch.export._trace:_detect_attribute_assignment", "to record graphs")
    entered: contextlib.AbstractContextManager[None] = within(module)
    return entered


@contextmanager
def masks_without_values() -> Iterator[None]:
    """Within, torch's encoder and decoder take a mask as it is. They compare it with a causal one, to leave it to the
    kernel then, and a mask without values cannot be compared. The attention is the same."""
    name = "_detect_is_causal_mask"
    private(f"torch.nn.modules.transformer:{name}", "to run torch's encoder on fake tensors")

    def detected(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    with replaced(torch.nn.modules.transformer, **{name: detected}):
        yield


@contextmanager
def graphs_alone() -> Iterator[None]:
    """Within, torch traces graphs without what is only read by people: the Python code of each graph module, which is
    written when its forward is called, and the stack trace of each node. That is a fifth of the time of an export."""
    lazy = private("torch.fx._lazy_graph_module:_use_lazy_graph_module", "to trace without writing Python code")
    switch = "do_not_emit_stack_traces"  # torch 2.11 has none
    off = {switch: True} if hasattr(torch.fx.config, switch) else {}
    with lazy(True), replaced(torch.fx.config, **off):
        yield


def is_fake(tensor: Any) -> bool:
    """Whether the tensor, or that of a simulated rank, has a shape and no memory."""
    first = next(iter((tensors_of_ranks(tensor) or {}).values()), tensor)
    return isinstance(first, private("torch._subclasses.fake_tensor:FakeTensor", "for the dry run"))


def constant_index(tensor: Any) -> int | None:
    """The value of a fake tensor of one integer that code wrote down (`x[:, [-1]]`); None of any other tensor."""
    value = getattr(tensor, "constant", None)
    if value is None or value.dtype != torch.int64 or tuple(value.shape) != (1,):
        return None
    # under the fake mode `item()` would be one of the fake tensors' operators, which have no values
    with private("torch.utils._mode_utils:no_dispatch", "to read an index that code wrote down")():
        return int(value.item())


def written_numbers(tensor: Any) -> tuple[Any, ...] | None:
    """The values of a small tensor that code made from numbers (`torch.tensor(0.5)`) within a fake mode; None of any
    other. What is not a number is `nan`, which equals itself."""
    value = tensor if type(tensor) is torch.Tensor else getattr(tensor, "constant", None)
    if value is None or value.is_meta or value.numel() > 64 or is_transformed(value):
        return None
    with private("torch.utils._mode_utils:no_dispatch", "to read a number that code wrote down")():
        return tuple("nan" if number != number else number for number in value.flatten().tolist())


def needs_values(error: BaseException) -> bool:
    """Whether code failed because fake tensors have no values: nothing is known of it with values."""
    names = ("DataDependentOutputException", "DynamicOutputShapeException")
    kinds = tuple(private(f"torch._subclasses.fake_tensor:{name}", "for the dry run") for name in names)
    return isinstance(error, kinds)


@contextmanager
def fake_tensors() -> Iterator[None]:
    """A FakeTensorMode in which DTensor works: it computes some offsets with tensors, and needs their values."""
    unset = private("torch._subclasses.fake_tensor:unset_fake_temporarily", "for the dry run")
    utils = importlib.import_module("torch.distributed.tensor._utils")
    names = {StridedShard: "local_shard_size_and_offset", utils: "_compute_local_shape_and_global_offset"}

    def with_values(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with unset():
                return function(*args, **kwargs)

        return run

    with (
        ExitStack() as stack,
        quiet_fake_tensors(),
        masks_without_values(),
        warnings.catch_warnings(),
        fake_tensor_mode(allow_non_fake_inputs=True),
    ):
        warnings.simplefilter("ignore")
        for owner, name in names.items():
            if callable(offsets := vars(owner).get(name)):
                stack.enter_context(replaced(owner, **{name: with_values(offsets)}))
        yield


_LOCAL = "torch.distributed._local_tensor"
_SIMULATE = "to simulate ranks in one process"


@contextmanager
def local_tensor_mode(ranks: int) -> Iterator[Any]:
    """torch's LocalTensorMode: each operation runs on the tensors of all ranks, side by side."""
    mode_cls = private(f"{_LOCAL}:LocalTensorMode", _SIMULATE)
    entered = private(f"{_LOCAL}:get_local_tensor_mode_list", _SIMULATE)
    try:
        with mode_cls(ranks) as mode, _cheaply(mode):
            yield mode
    finally:
        while entered():  # an exception can leave the mode on torch's list
            entered().pop()


@contextmanager
def _cheaply(mode: Any) -> Iterator[None]:
    """Within, an operation on the tensors of all ranks costs a third less.

    torch enters a mode of its own for each operation inside a DTensor's, and patches the functions of random numbers
    again, which `mode` has patched. And it gives the result of a view the storage of what it views, by operations that
    are dispatched again: these storages hold nothing.
    """
    cls, dispatch = type(mode), importlib.import_module("torch.utils._python_dispatch")

    def of_first_mode(method: Callable[[Any], None]) -> Callable[[Any], None]:
        return lambda each: method(each) if each is mode else None

    names = ("_patch_random_functions", "_unpatch_random_functions")
    patches = {name: of_first_mode(getattr(cls, name)) for name in names if hasattr(cls, name)}
    with ExitStack() as stack:
        if len(patches) == len(names):
            stack.enter_context(replaced(cls, **patches))
        if hasattr(dispatch, "_correct_storage_aliasing"):
            stack.enter_context(replaced(dispatch, _correct_storage_aliasing=lambda *args: None))
        yield


def tensors_of_ranks(tensor: Tensor) -> dict[int, Tensor] | None:
    """Each rank's tensor of a simulated one; None where all ranks hold the same."""
    return getattr(tensor, "_local_tensors", None)


def from_tensors_of_ranks(tensors: dict[int, Tensor]) -> Tensor:
    """One simulated tensor made of one tensor for each rank."""
    tensor: Tensor = private(f"{_LOCAL}:LocalTensor", _SIMULATE)(tensors)
    return tensor


def per_rank(function: Callable[[Tensor, int], Tensor], tensor: Tensor, rank: int) -> Tensor:
    """function(tensor, rank); where ranks are simulated, that of each rank's tensor and number."""
    modes = private(f"{_LOCAL}:get_local_tensor_mode_list", _SIMULATE)()
    tensors = tensors_of_ranks(tensor)
    if not modes and tensors is None:
        return function(tensor, rank)
    if tensors is None:
        tensors = dict.fromkeys(modes[-1].ranks, tensor)
    with private(f"{_LOCAL}:maybe_disable_local_tensor_mode", _SIMULATE)():
        made = {r: function(x, int(r)) for r, x in tensors.items()}
    return from_tensors_of_ranks(made)
