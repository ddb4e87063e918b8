"""Private interfaces of DTensor: shards, sharding rules, redistribution, and the frames of its code."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves, tree_unflatten

from colrow.torch_compat.names import private, replaced

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

    # Hashes may stay: equal specs have equal ones, and unequal ones that collide are told apart here.
    spec.__eq__ = lambda a, b: equal(a, b) and same_classes(a, b)


def forget_shardings() -> None:
    """Empty DTensor's caches of what it has worked out.

    An embedding sharded by vocabulary gives a sum with a mask, which lies in the cached answer until the sum is formed.
    Where an exception came first, the next run of that embedding meets the old mask, and raises.
    """
    private("torch.distributed.tensor.debug:_clear_sharding_prop_cache", "to leave nothing of a run that failed")()


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

    with replaced(function, backward=staticmethod(watched)):
        yield


def seed_dtensors(seed: int, mesh: DeviceMesh) -> None:
    """Seed this rank's GPU, and let DTensor draw from there. By itself torch broadcasts rank 0's state to the default
    group at DTensor's first draw: data ranks get one state, and a pipeline stage that draws nothing never comes."""
    private("torch.distributed.tensor._random:manual_seed", "to seed DTensor's random operators")(seed, mesh)


class NoDTensorRuleError(Exception):
    """DTensor's sharding propagation does not say that an operator on local tensors is enough."""


def propagated(func: Any, leaves: Sequence[Any], tree: Any, mesh: DeviceMesh) -> list[tuple[Any, tuple[int, ...]]]:
    """The placement of each result of an operator, by DTensor's rules, and the shape of a rank's part of it. `leaves`
    are the flat (args, kwargs), nested as `tree`; of a tensor, (placement, unsharded shape, stride, dtype).

    Raises:
        NoDTensorRuleError: there is no rule, or it moves data.
    """
    package, purpose = "torch.distributed.tensor", "to ask for sharding rules"
    spec_cls, meta_cls = (private(f"{package}._dtensor_spec:{n}", purpose) for n in ("DTensorSpec", "TensorMeta"))
    schema_cls, info_cls = (private(f"{package}._op_schema:{n}", purpose) for n in ("OpSchema", "RuntimeSchemaInfo"))
    rules: Any = private(f"{package}:DTensor._op_dispatcher.sharding_propagator", purpose)
    shard_shape = private(f"{package}._utils:compute_local_shape_and_global_offset", purpose)
    if func in dtensor_handlers():
        raise NoDTensorRuleError("DTensor runs it by a handler that communicates")

    def spec_of(placement: Any, shape: Any, stride: Any, dtype: Any) -> Any:
        return spec_cls(mesh, (placement,), meta_cls(torch.Size(shape), stride, dtype))

    def specs_in(found: Any) -> list[Any]:
        return [leaf for leaf in tree_leaves(found) if isinstance(leaf, spec_cls)]

    args, kwargs = tree_unflatten([spec_of(*leaf) if isinstance(leaf, tuple) else leaf for leaf in leaves], tree)
    # DTensor keeps the facts of its rules of one mesh dim in a table of their own
    info = (rules.op_to_schema_info | getattr(rules, "op_to_schema_info_for_single_dim_strategy", {})).get(func)
    if info is None and any(isinstance(arg, list) and specs_in(arg) for arg in args):
        info = info_cls(needs_pytree=True)  # DTensor's dispatcher would flatten lists of tensors for such an operator
    try:
        answer = rules.propagate_op_sharding_non_cached(schema_cls(func, tuple(args), kwargs, schema_info=info))
    except Exception as error:  # NotImplementedError without a rule; rules raise many kinds
        raise NoDTensorRuleError(f"DTensor has no rule for it ({type(error).__name__})") from error
    if answer.needs_redistribute:  # also set where a size argument alone is made local
        wanted = specs_in((answer.redistribute_schema.args_schema, answer.redistribute_schema.kwargs_schema))
        if [spec.placements[0] for spec in wanted] != [leaf[0] for leaf in leaves if isinstance(leaf, tuple)]:
            raise NoDTensorRuleError("DTensor's rule moves data first")
    results = specs_in([answer.output_spec])
    # torch 2.11: an element of a sharded vector, which has no dims, would be a shard of dim 0
    if any(getattr(spec.placements[0], "dim", -1) >= len(spec.shape) for spec in results):
        raise NoDTensorRuleError("DTensor's rule shards a dim that the result has not")
    return [
        (spec.placements[0], tuple(shard_shape(spec.shape, mesh, spec.placements, skip_offset=True)[0]))
        for spec in results
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
    with ExitStack() as stack:
        for cls, method, name in places:
            function = vars(cls)[method].__func__
            stack.enter_context(replaced(cls, **{method: staticmethod(watch(name, function))}))
        yield


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


def finds_output_shape(frames: Iterator[FrameType]) -> bool:
    """Whether these frames run an operator on global shapes alone, by which DTensor finds those of its output."""
    return any(frame.f_code.co_name.startswith("_propagate_tensor_meta") for frame in frames)


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
    return _path_in_torch(frame.f_code.co_filename)


@cache
def _path_in_torch(file: str) -> str | None:
    return file.removeprefix(_TORCH).replace("\\", "/") if file.startswith(_TORCH) else None


def replicas_of_fsdp2() -> Callable[..., Any]:
    """Data-parallel replicas built on FSDP2. DDP refuses DTensors, and the older `replicate` leaves the model without
    parameters after the first forward (pytorch#152712)."""
    path = "torch.distributed._composable.replicate_with_fsdp:replicate"
    replicate: Callable[..., Any] = private(path, "for mesh.dp_replicate (mesh.dp_shard does without)")
    return replicate


@contextmanager
def watched_propagation(started: Callable[[], None], ended: Callable[[], None]) -> Iterator[None]:
    """Within, `started` and `ended` are called around DTensor's propagation of shapes and placements, which runs
    operators on fake tensors of the unsharded sizes: no rank allocates those."""
    path = "torch.distributed.tensor._sharding_prop:ShardingPropagator"
    propagator = private(path, "to tell tensors of the unsharded sizes from a rank's")
    names = ("_propagate_tensor_meta_non_cached", "propagate_op_sharding_non_cached")

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            started()
            try:
                return function(*args, **kwargs)
            finally:
                ended()

        return run

    with replaced(propagator, **{name: watched(getattr(propagator, name)) for name in names}):
        yield
