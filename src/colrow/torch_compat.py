"""torch's private interfaces: the only file that touches them, one wrapper each.

colrow is tested with torch 2.11 and 2.13. A name that another torch has moved raises TorchMovedError, which says what
is gone and what colrow needs it for; `tests/test_torch_compat.py` calls every wrapper. Nothing here imports colrow.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_unflatten as tree_unflatten

TESTED = ("2.11", "2.13")
"""The releases of torch that the test suite runs on; `pyproject.toml` allows those between."""


class TorchMovedError(ImportError):
    """This torch has no such private name: install a release that colrow was tested with."""


@cache
def private(path: str, purpose: str) -> Any:
    """The object at `path`, `package.module:attribute.attribute`.

    Raises:
        TorchMovedError: this torch has none; the text names it and its purpose here.
    """
    module, _, attributes = path.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in attributes.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise TorchMovedError(
            f"torch {torch.__version__} has no {path.replace(':', '.')}, which colrow needs {purpose}: "
            f"install torch {TESTED[0]} to {TESTED[1]}"
        ) from error
    return found


# -- tensors and autograd ------------------------------------------------------------------------------------------


def foreach(name: str, *args: Any, **kwargs: Any) -> Any:
    """`torch._foreach_{name}`: one launch for a list of tensors. Public lists of tensors exist for no other form."""
    return private(f"torch:_foreach_{name}", "to update lists of tensors in one launch")(*args, **kwargs)


def version(tensor: Tensor) -> int:
    """How often the tensor was written in place, by torch's count. Fused optimizers do not count."""
    return int(tensor._version)


def parameter_hooks(param: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """The parameter's own tables of `register_hook` and of `register_post_accumulate_grad_hook`."""
    return getattr(param, "_backward_hooks", None) or {}, getattr(param, "_post_accumulate_grad_hooks", None) or {}


def current_autograd_node() -> Any:
    """The backward node that runs on this thread; None in a forward."""
    return private("torch._C:_current_autograd_node", "to attribute gradients to modules")()


def forward_number(node: Any = None) -> int:
    """The number by which autograd orders backward nodes; without a node, of the one that this thread made last."""
    last = private("torch.autograd:_get_sequence_nr", "to attribute gradients to source lines")
    return int(node._sequence_nr()) if node is not None else int(last()) - 1


def is_higher_order(func: Any) -> bool:
    """Whether a dispatched function is a higher-order operator, whose arguments are graphs."""
    return isinstance(func, private("torch._ops:HigherOrderOperator", "to pass over operators that hold graphs"))


def apply_to_tensors(model: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
    """Replace every parameter and buffer of the model, in place: what `Module.to` is built on."""
    model._apply(change)


def scaled_product(*args: Any, **kwargs: Any) -> Tensor:
    """A matmul of 8-bit operands with their scales (`torch._scaled_mm`)."""
    y: Tensor = private("torch:_scaled_mm", "for 8-bit matmuls")(*args, **kwargs)
    return y


def attention_backend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, grouped: bool) -> int:
    """The number of the SDPBackend that attention of these tensors runs."""
    choose = private("torch:_fused_sdp_choice", "to say which attention kernel runs")
    return int(choose(q, k, v, None, 0.0, causal, enable_gqa=grouped))


def compiled_graph_count() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(private("torch._dynamo.utils:counters", "to say whether blocks were compiled")["stats"]["unique_graphs"])


# -- process groups ------------------------------------------------------------------------------------------------


def process_group_named(name: str) -> dist.ProcessGroup:
    """The group behind `group.group_name`: operators that torch.compile sees take names."""
    resolve = private("torch.distributed.distributed_c10d:_resolve_process_group", "to find a group by its name")
    group: dist.ProcessGroup = resolve(name)
    return group


def fake_store() -> Any:
    """The store of a process group in which nothing is sent."""
    return private("torch.testing._internal.distributed.fake_pg:FakeStore", "for ranks that do not exist")()


def fake_group_beside(name: str, ranks: Sequence[int], timeout: timedelta) -> dist.ProcessGroup:
    """A fake group of `ranks` beside the default group; this process is the first of them."""
    make = private("torch.distributed.distributed_c10d:_new_process_group_helper", "for a fake group beside a real one")
    world = private("torch.distributed.distributed_c10d:_world", "for a fake group beside a real one")
    group: dist.ProcessGroup
    group, _ = make(len(ranks), 0, list(ranks), "fake", fake_store(), name, timeout=timeout, group_desc="dry run")
    world.pg_group_ranks[group] = {rank: i for i, rank in enumerate(ranks)}
    return group


def finished_work() -> Any:
    """The handle of a collective that is done."""
    purpose = "for collectives of a rank that is measured alone"
    work, fake = (private(f"torch._C._distributed_c10d:{name}", purpose) for name in ("Work", "FakeWork"))
    return work.boxed(fake())


# -- functional collectives ----------------------------------------------------------------------------------------

AsyncCollectiveTensor: Any = private(
    "torch.distributed._functional_collectives:AsyncCollectiveTensor", "to wait for DTensor's collectives"
)
"""What DTensor hands on while a collective runs."""


def is_async(tensor: Any) -> bool:
    """Whether the tensor is the result of a collective that may still run."""
    return isinstance(tensor, AsyncCollectiveTensor)


def _functional(*names: str) -> Any:
    """The functional collective with the first name that this torch knows: 2.13 renamed some."""
    module = importlib.import_module("torch.distributed._functional_collectives")
    found = next((getattr(module, name) for name in names if hasattr(module, name)), None)
    if found is None:
        raise TorchMovedError(f"torch {torch.__version__} has no functional collective {' or '.join(names)}")
    return found


# Found at import: torch.compile traces what calls them, and cannot trace a search.
_wait, _all_reduce = _functional("wait_tensor"), _functional("all_reduce")
_all_gather = _functional("all_gather_single", "all_gather_tensor")
_reduce_scatter = _functional("reduce_scatter_single", "reduce_scatter_tensor")


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of `x` over a 1-D mesh. Without a gradient: autograd Functions call it."""
    y: Tensor = _wait(_all_reduce(x.contiguous(), "sum", mesh))
    return y


def all_gather(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """The shards of all ranks, one after the other along `dim`."""
    y: Tensor = _wait(_all_gather(x.contiguous(), dim, mesh))
    return y


def reduce_scatter(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """This rank's shard along `dim` of the sum over ranks."""
    y: Tensor = _wait(_reduce_scatter(x.contiguous(), "sum", dim, mesh))
    return y


# -- DTensor -------------------------------------------------------------------------------------------------------

StridedShard: Any = private(
    "torch.distributed.tensor.placement_types:_StridedShard", "to read shards that FSDP2 took of a tensor-parallel one"
)
"""The placement that FSDP2 gives to a dim which tensor parallelism has sharded before it."""


def tell_specs_apart(placement_class: type) -> None:
    """Make specs of DTensors unequal if one has a placement of this class where the other has none."""
    spec: Any = private("torch.distributed.tensor._dtensor_spec:DTensorSpec", "to place packed parameters")
    equal = spec.__eq__

    def same_classes(a: Any, b: Any) -> bool:
        pairs = zip(a.placements, b.placements, strict=True)
        return all(isinstance(x, placement_class) == isinstance(y, placement_class) for x, y in pairs)

    spec.__eq__ = lambda a, b: equal(a, b) and same_classes(a, b)


def local_shard(tensor: DTensor) -> Tensor:
    """The tensor that this rank holds, out of autograd's sight: `to_local` costs twenty times as much on the CPU."""
    local: Tensor = tensor._local_tensor
    return local


def dtensor_handlers() -> dict[Any, Any]:
    """DTensor's table of operators with handlers of their own, as it is: changes take effect."""
    path = "torch.distributed.tensor:DTensor._op_dispatcher._custom_op_handlers"
    handlers: dict[Any, Any] = private(path, "to leave loss_parallel by an exception")
    return handlers


@contextmanager
def watched_to_local_backward(declared: Callable[[Tensor, Any], None]) -> Iterator[None]:
    """Within, `declared(gradient, placements)` is called when backward of `to_local` makes a DTensor.

    torch 2.13 does so by `DTensor.from_local`, which callers watch themselves; 2.11 makes the DTensor in place.
    """
    if "grad_placements" in inspect.signature(DTensor.from_local).parameters:
        yield
        return
    function = private("torch.distributed.tensor._api:_ToTorchTensor", "to see how gradients of to_local are placed")
    backward = function.backward

    def watched(ctx: Any, grad: Tensor) -> Any:
        given = backward(ctx, grad)
        declared(grad, given[0].placements)
        return given

    function.backward = staticmethod(watched)
    try:
        yield
    finally:
        function.backward = staticmethod(backward)


class NoRuleError(Exception):
    """DTensor's sharding propagation does not say that an operator on local tensors is enough."""


def propagated(func: Any, leaves: Sequence[Any], tree: Any, mesh: DeviceMesh) -> list[tuple[Any, tuple[int, ...]]]:
    """By DTensor's rules, the placement of each result of an operator and the shape of a rank's part of it. `leaves`
    are the flat (args, kwargs), nested as `tree`; of a tensor, (placement, unsharded shape, stride, dtype).

    Raises:
        NoRuleError: there is no rule, or it moves data.
    """
    package, purpose = "torch.distributed.tensor", "to ask for sharding rules"
    spec_cls, meta_cls = (private(f"{package}._dtensor_spec:{n}", purpose) for n in ("DTensorSpec", "TensorMeta"))
    schema_cls, info_cls = (private(f"{package}._op_schema:{n}", purpose) for n in ("OpSchema", "RuntimeSchemaInfo"))
    rules: Any = private(f"{package}:DTensor._op_dispatcher.sharding_propagator", purpose)
    shard_shape = private(f"{package}._utils:compute_local_shape_and_global_offset", purpose)
    if func in dtensor_handlers():
        raise NoRuleError("DTensor runs it by a handler that communicates")

    def spec_of(placement: Any, shape: Any, stride: Any, dtype: Any) -> Any:
        return spec_cls(mesh, (placement,), meta_cls(torch.Size(shape), stride, dtype))

    def specs_in(found: Any) -> list[Any]:
        return [leaf for leaf in tree_leaves(found) if isinstance(leaf, spec_cls)]

    args, kwargs = tree_unflatten([spec_of(*leaf) if isinstance(leaf, tuple) else leaf for leaf in leaves], tree)
    info = (rules.op_to_schema_info | getattr(rules, "op_to_schema_info_for_single_dim_strategy", {})).get(func)
    if info is None and any(isinstance(arg, list) and specs_in(arg) for arg in args):
        info = info_cls(needs_pytree=True)
    try:
        answer = rules.propagate_op_sharding_non_cached(schema_cls(func, tuple(args), kwargs, schema_info=info))
    except Exception as error:  # NotImplementedError without a rule; rules raise many kinds
        raise NoRuleError(f"DTensor has no rule for it ({type(error).__name__})") from error
    if answer.needs_redistribute:  # also set where a size argument alone is made local
        wanted = specs_in((answer.redistribute_schema.args_schema, answer.redistribute_schema.kwargs_schema))
        if [spec.placements[0] for spec in wanted] != [leaf[0] for leaf in leaves if isinstance(leaf, tuple)]:
            raise NoRuleError("DTensor's rule moves data first")
    return [
        (spec.placements[0], tuple(shard_shape(spec.shape, mesh, spec.placements, skip_offset=True)[0]))
        for spec in specs_in([answer.output_spec])
    ]


@contextmanager
def watched_conversions(watch: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Within, `watch(NAME, function)` stands for each function (ctx, tensor, ...) by which values enter, leave and move
    in DTensors: `from_local`, `to_local`, each with its `_backward`, and `redistribute` in both directions."""
    package, purpose = "torch.distributed.tensor", "to see where values enter and leave DTensors"
    enter, leave = (private(f"{package}._api:{n}", purpose) for n in ("_FromTorchTensor", "_ToTorchTensor"))
    change = private(f"{package}._redistribute:Redistribute", purpose)
    nested = getattr(importlib.import_module(f"{package}._redistribute"), "NestedRedistribute", None)  # since 2.12
    back = (nested, "forward") if nested else (change, "backward")
    places = [(enter, "forward", "from_local"), (enter, "backward", "from_local_backward"),
              (leave, "forward", "to_local"), (leave, "backward", "to_local_backward"),
              (change, "forward", "redistribute"), (*back, "redistribute")]  # fmt: skip
    before = [cls.__dict__[method] for cls, method, _ in places]
    try:
        for (cls, method, name), function in zip(places, before, strict=True):
            setattr(cls, method, staticmethod(watch(name, function.__func__)))
        yield
    finally:
        for (cls, method, _), function in zip(places, before, strict=True):
            setattr(cls, method, function)


def implicit_redistribution(frames: Iterator[FrameType]) -> tuple[Any, Any, str]:
    """(placements before, after, the operator that needed the change) of the redistribution that these frames run.

    DTensor redistributes arguments of an operator without being asked; only its own frames know which operator. Each
    entry is empty where the frames hold none.
    """
    before = after = None
    operator = ""
    for frame in frames:
        name, known = frame.f_code.co_name, frame.f_locals
        if name == "redistribute_local_tensor" and before is None:
            before, after = known["current_spec"].placements, known["target_spec"].placements
        elif name == "redistribute_local_args":
            schemas = (known.get("suggested_input_schema"), getattr(known.get("op_info"), "schema", None))
            operator = next((str(schema.op) for schema in schemas if schema is not None), "an operation")
    return before, after, operator


def inside_dtensor(frames: Iterator[FrameType]) -> bool:
    """Whether one of these frames is DTensor's own code."""
    return any("/distributed/tensor/_" in frame.f_code.co_filename.replace("\\", "/") for frame in frames)


_TORCH = str(Path(torch.__file__).parent)


def frames() -> Iterator[FrameType]:
    """The Python frames at work, from the caller's outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def path_in_torch(frame: FrameType) -> str | None:
    """The frame's file below torch's folder, `/nn/functional.py`; None for code of others."""
    file = frame.f_code.co_filename
    return file.removeprefix(_TORCH).replace("\\", "/") if file.startswith(_TORCH) else None


def replicas_of_fsdp2() -> Callable[..., Any]:
    """Data-parallel replicas built on FSDP2. DDP refuses DTensors, and the older `replicate` leaves the model without
    parameters after the first forward (pytorch#152712)."""
    path = "torch.distributed._composable.replicate_with_fsdp:replicate"
    replicate: Callable[..., Any] = private(path, "for mesh.dp_replicate")
    return replicate


# -- fake tensors --------------------------------------------------------------------------------------------------


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Within, an operation that fails on fake tensors is not logged: callers take the failure as a result."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def fake_tensor_mode(**options: Any) -> Any:
    """A FakeTensorMode: tensors of shapes, dtypes and devices without memory."""
    return private("torch._subclasses.fake_tensor:FakeTensorMode", "for the dry run")(**options)


def is_fake(tensor: Any) -> bool:
    """Whether the tensor has a shape and no memory."""
    return isinstance(tensor, private("torch._subclasses.fake_tensor:FakeTensor", "for the dry run"))


@contextmanager
def fake_tensors() -> Iterator[None]:
    """A FakeTensorMode in which DTensor works: it computes some offsets with tensors, and needs their values."""
    unset = private("torch._subclasses.fake_tensor:unset_fake_temporarily", "for the dry run")
    offsets: Any = StridedShard.__dict__.get("local_shard_size_and_offset")

    def with_values(*args: Any, **kwargs: Any) -> Any:
        with unset():
            return offsets(*args, **kwargs)

    if callable(offsets):
        StridedShard.local_shard_size_and_offset = with_values
    try:
        with quiet_fake_tensors(), warnings.catch_warnings(), fake_tensor_mode(allow_non_fake_inputs=True):
            warnings.simplefilter("ignore")
            yield
    finally:
        if callable(offsets):
            StridedShard.local_shard_size_and_offset = offsets


# -- all ranks in one process --------------------------------------------------------------------------------------

_LOCAL = "torch.distributed._local_tensor"
_SIMULATE = "to simulate ranks in one process"


@contextmanager
def local_tensor_mode(ranks: int) -> Iterator[Any]:
    """torch's LocalTensorMode: each operation runs on the tensors of all ranks, side by side."""
    mode_cls = private(f"{_LOCAL}:LocalTensorMode", _SIMULATE)
    entered = private(f"{_LOCAL}:get_local_tensor_mode_list", _SIMULATE)
    try:
        with mode_cls(ranks) as mode:
            yield mode
    finally:
        while entered():  # an exception can leave the mode on torch's list
            entered().pop()


def tensors_of_ranks(tensor: Tensor) -> dict[int, Tensor] | None:
    """Each rank's tensor of a simulated one; None where all ranks hold the same."""
    return getattr(tensor, "_local_tensors", None)


def from_tensors_of_ranks(tensors: dict[int, Tensor]) -> Tensor:
    """One simulated tensor made of one tensor for each rank."""
    tensor: Tensor = private(f"{_LOCAL}:LocalTensor", _SIMULATE)(tensors)
    return tensor


# -- GPUs ----------------------------------------------------------------------------------------------------------


def raw_stream(device_index: int) -> int:
    """The handle of the device's current CUDA stream, for the driver's own functions."""
    return int(private("torch._C:_cuda_getCurrentRawStream", "to enqueue copies between GPUs")(device_index))


def symmetric_memory() -> Any:
    """The module by which ranks of one host share GPU memory: `empty`, `rendezvous`."""
    return importlib.import_module("torch.distributed._symmetric_memory")
