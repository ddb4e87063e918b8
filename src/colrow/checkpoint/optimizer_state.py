"""What an optimizer puts into a checkpoint, and how it gets its state back.

Tensors are stored as `optimizer.PARAMETER.KEY`, such as `optimizer.layers.0.mlp.up_proj.weight.exp_avg`. Everything
else is JSON.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from colrow.checkpoint.manifest import DTYPE_OF_NAME, GroupRecord, Index, OptimizerRecord, StoredTensor
from colrow.checkpoint.state import OPTIMIZER_PREFIX, NamedTensor
from colrow.errors import CheckpointError

# Options of how a step is computed, not of what: a checkpoint of a GPU run must not force `fused` on a CPU.
_EXECUTION_OPTIONS = frozenset({"params", "foreach", "fused", "capturable", "differentiable"})


def optimizer_tensors(optimizer: Optimizer, named: list[NamedTensor]) -> list[NamedTensor]:
    """The optimizer's tensors, each laid out as its parameter is. Collective where one of them is not."""
    return [
        NamedTensor(
            f"{OPTIMIZER_PREFIX}{owner.name}.{key}",
            _aligned(value, owner, key),
            owner.packed if value.shape == owner.tensor.shape else None,  # a step count has no segments
        )
        for owner, param in _owners(optimizer, named)
        for key, value in optimizer.state.get(param, {}).items()
        if isinstance(value, Tensor)
    ]


def optimized_names(optimizer: Optimizer, named: list[NamedTensor]) -> list[str]:
    """The parameters that the optimizer changes."""
    return list(dict.fromkeys(owner.name for owner, _ in _owners(optimizer, named)))


def optimizer_record(optimizer: Optimizer, named: list[NamedTensor]) -> OptimizerRecord:
    """The optimizer's parameter groups, and the numbers in its state."""
    names = {id(param): owner.name for owner, param in _owners(optimizer, named)}
    values: dict[str, dict[str, Any]] = {}
    for owner, param in _owners(optimizer, named):
        numbers = {k: _json_value(v, k) for k, v in optimizer.state.get(param, {}).items() if not isinstance(v, Tensor)}
        if numbers:
            values[owner.name] = numbers
    groups = [
        GroupRecord(
            names=list(dict.fromkeys(names[id(param)] for param in group["params"])),
            options={k: _json_value(v, k) for k, v in group.items() if k not in _EXECUTION_OPTIONS},
        )
        for group in optimizer.param_groups
    ]
    return OptimizerRecord(kind=type(optimizer).__name__, groups=groups, values=values)


def merge_records(records: Sequence[OptimizerRecord]) -> OptimizerRecord:
    """One record of what several pipeline stages hold: groups are joined by position and options."""
    groups: list[GroupRecord] = []
    for position in range(max(len(record.groups) for record in records)):
        joined: dict[str, GroupRecord] = {}  # by options: a stage may have other groups than the next
        for record in records:
            for group in record.groups[position : position + 1]:
                key = repr(group.options)
                names = joined[key].names + group.names if key in joined else group.names
                joined[key] = GroupRecord(names=list(dict.fromkeys(names)), options=group.options)
        groups += joined.values()
    values = {name: value for record in records for name, value in record.values.items()}
    return OptimizerRecord(kind=records[0].kind, groups=groups, values=values)


def make_optimizer_state(optimizer: Optimizer, named: list[NamedTensor], index: Index) -> None:
    """Give the optimizer tensors to load into, laid out as its parameters are, without taking a step.

    State that the checkpoint lacks is removed: the optimizer will be what it was when it was saved.

    Raises:
        CheckpointError: a stored tensor has neither its parameter's shape nor a single element.
    """
    stored: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in index.tensors.items():
        if name.startswith(OPTIMIZER_PREFIX):
            owner_name, _, key = name.removeprefix(OPTIMIZER_PREFIX).rpartition(".")
            stored.setdefault(owner_name, {})[key] = tensor
    groups = {id(param): group for group in optimizer.param_groups for param in group["params"]}
    for owner, param in _owners(optimizer, named):
        wanted = stored.get(owner.name)
        if wanted is None:
            optimizer.state.pop(param, None)
            continue
        state = optimizer.state[param]
        for key in [key for key in state if key not in wanted]:  # a list: the state changes meanwhile
            del state[key]
        for key, tensor in wanted.items():
            if not _fits(state.get(key), tensor, param):
                state[key] = _zeros(owner.name, key, tensor, param, groups[id(param)])


def restore_options(optimizer: Optimizer, named: list[NamedTensor], record: OptimizerRecord) -> None:
    """Put the stored hyperparameters back.

    Raises:
        CheckpointError: the groups divide the parameters in another way.
    """
    group_of = {name: i for i, group in enumerate(record.groups) for name in group.names}
    names = {id(param): owner.name for owner, param in _owners(optimizer, named)}
    for position, group in enumerate(optimizer.param_groups):
        members = [names[id(param)] for param in group["params"]]
        choices = [record.groups[i].options for i in sorted({group_of[name] for name in members})]
        if not members:  # a pipeline stage may have no parameter of this group
            choices = [record.groups[position].options] if position < len(record.groups) else []
        if any(options != choices[0] for options in choices):
            raise CheckpointError(
                f"parameter group {position} joins parameters that had different options in the checkpoint "
                f"(such as {members[0]}): build the optimizer's groups as the saving run did"
            )
        for key, value in choices[0].items() if choices else ():
            current = group.get(key)
            if isinstance(current, Tensor):  # a CUDA graph reads lr from this very storage
                current.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(current, tuple) else value  # JSON has no tuples (betas)


def restore_values(optimizer: Optimizer, named: list[NamedTensor], record: OptimizerRecord) -> None:
    """Put the stored numbers of the optimizer's state back, such as step counts that are no tensors."""
    for owner, param in _owners(optimizer, named):
        if owner.name in record.values:
            optimizer.state[param].update(record.values[owner.name])


def _owners(optimizer: Optimizer, named: list[NamedTensor]) -> Iterator[tuple[NamedTensor, Tensor]]:
    """Each of the optimizer's parameters, with its name in the model."""
    by_id = {id(item.tensor): item for item in named}  # by identity: equality of tensors is elementwise
    for group in optimizer.param_groups:
        for param in group["params"]:
            if id(param) not in by_id:
                raise CheckpointError(
                    f"the optimizer holds a parameter of shape {tuple(param.shape)} that the model does not: make the "
                    "optimizer after the model is parallelized, from the model's own parameters"
                )
            yield by_id[id(param)], param


def _aligned(value: Tensor, owner: NamedTensor, key: str) -> Tensor:
    assert "." not in key, f"the optimizer's state {key!r} has a dot in its name"
    param = owner.tensor
    if isinstance(param, DTensor) and isinstance(value, DTensor):
        # Some optimizers keep state replicated, or as a partial sum: it is stored as the parameter is sharded.
        if value.shape == param.shape and value.placements != param.placements:
            return value.redistribute(param.device_mesh, param.placements)
    elif isinstance(param, DTensor) and value.ndim > 0:
        raise CheckpointError(
            f"optimizer state {key} of {owner.name} is a plain tensor but {owner.name} is a DTensor, so its shard is "
            "unknown: create the state with torch.zeros_like(param)"
        )
    return value


def _fits(value: object, stored: StoredTensor, param: Tensor) -> bool:
    if not isinstance(value, Tensor) or list(value.shape) != stored.shape:
        return False
    if value.dtype != DTYPE_OF_NAME[stored.dtype]:
        return False
    if value.ndim == 0 or not isinstance(param, DTensor):
        return True
    return isinstance(value, DTensor) and value.placements == param.placements


def _zeros(name: str, key: str, stored: StoredTensor, param: Tensor, group: dict[str, Any]) -> Tensor:
    dtype = DTYPE_OF_NAME[stored.dtype]
    if not stored.shape and param.ndim:
        on_device = group.get("fused") or group.get("capturable")  # as torch's optimizers place their step counts
        return torch.zeros((), dtype=dtype, device=param.device if on_device else "cpu")
    if list(param.shape) == stored.shape:
        return torch.zeros_like(param, dtype=dtype, requires_grad=False, memory_format=torch.preserve_format)
    raise CheckpointError(
        f"the optimizer's {key} of {name} has the shape {stored.shape}, its parameter {list(param.shape)}: "
        "take one step before loading, so that the optimizer lays its state out"
    )


def _json_value(value: Any, key: str) -> Any:
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, tuple | list):
        return [_json_value(item, key) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"the optimizer's {key} is a {type(value).__name__}, which a checkpoint cannot hold")
