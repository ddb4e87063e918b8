"""Apply a plan to a model: each named module gets its style, and every parameter ends on the tp mesh."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from colrow.errors import ConfigError, PlanError
from colrow.mesh import Mesh, MeshAxes
from colrow.plans.plan import Plan, Resolved
from colrow.sharding.layout import local_tensor, mark_packed
from colrow.sharding.local_view import remove_views
from colrow.sharding.parameter_state import ParameterState, set_states, states_of
from colrow.styles.base import ParameterLayout, Style, set_attribute
from colrow.styles.local_sizes import write_local_sizes
from colrow.styles.rank_tensors import divide_gradients
from colrow.styles.replicated import LEFT_OUT
from colrow.styles.site import Site

STYLED = "_colrow_style"
"""Module attribute: the name of the style that a plan gave it. A module gets one style, in one call."""
LEFT_OUT_MARK = "_colrow_left_out"
"""Module attribute: no plan has named it yet, and its parameters are replicated; a later call may give it a style."""


def parallelize(
    model: nn.Module,
    plan: Plan,
    mesh: Mesh | DeviceMesh,
    *,
    absent: Iterable[str] = (),
    src_data_rank: int | None = 0,
) -> nn.Module:
    """Split `model` over the tp axis of `mesh` as `plan` says, in place, and return it.

    The model may lie on the meta device; real weights are taken from one rank of each tp group. Afterwards every
    parameter is a DTensor on the tp mesh under its own name: the ones that the plan leaves out are replicated. Tied
    parameters stay tied, frozen ones frozen, and the attributes and hooks that you set on a parameter stay (see
    [Note: hooks see the unsharded gradient]). Several calls may divide a model's modules; each is named in one of
    them. Build the optimizer after the last.

    Args:
        mesh: a 1-D mesh, a mesh with an axis named `tp`, or the degrees (then under an initialised process group).
        absent: for a pipeline stage, the names of the complete model's modules that it has not (`Stage.absent`).
        src_data_rank: the rank of the tp group whose weights all take; None: each rank keeps its weights, without
            communication, where they are equal already or differ on purpose.

    Raises:
        PlanError: the plan does not fit the model or the degree, or names a module that is parallelised already;
            nothing has been changed then.
        ConfigError: the mesh has no tp axis, or does not fit the number of ranks.
    """
    tp_mesh = tp_axis(mesh)
    tp = tp_mesh.size()
    resolved = plan.resolve(model, absent)
    # all that can be refused is refused here, before the first module changes
    for error in parallel_already(model, {fqn: style for fqn, (_, style) in resolved.items()}):
        raise error
    plan.check_shapes(model, tp, resolved=resolved)
    layouts = plan.parameters(model, tp, resolved=resolved)
    if tp == 1:
        data_axes = isinstance(mesh, DeviceMesh) and bool(MeshAxes(mesh).data_groups())
        style_on_one_rank(model, resolved, tp_mesh, data_axes=data_axes)
        return model
    if not plan.modules:
        message = f"CR105: plan {plan.name} is empty: every rank holds and computes the complete model"
        warnings.warn(message, stacklevel=2)
    # a style replaces parameters by DTensors: what the old objects carried is kept here and set on the new ones
    ties, states = tied_parameters(model), states_of(model)
    trainable = {name: param.requires_grad for name, param in model.named_parameters(remove_duplicate=False)}
    _require_placeable(model, layouts, states)
    _style_modules(model, resolved, tp_mesh, src_data_rank)
    for fqn, layout in layouts.items():
        parent, _, name = fqn.rpartition(".")
        if layout.packed is not None and parent in resolved:
            mark_packed(model.get_submodule(parent), name, layout.packed)
    tie(model, ties)
    for name, param in model.named_parameters(remove_duplicate=False):
        param.requires_grad_(trainable[name])
    set_states(model, states)
    if src_data_rank is not None:
        _sync_replicas(model, tp_mesh, src_data_rank)
    return model


def style_on_one_rank(model: nn.Module, resolved: Resolved, tp_mesh: DeviceMesh, *, data_axes: bool) -> None:
    """At tp 1 nothing is split; only styles that save something there too are applied. `data_axes`: the ranks form
    data axes, on which more of them do."""
    for fqn, (_, style) in resolved.items():
        if style.applies(1, data_axes=data_axes):
            site = Site(model, fqn, 1)
            style.build(site)._apply(site.module, tp_mesh)


def _require_placeable(
    model: nn.Module, layouts: Mapping[str, ParameterLayout], states: Mapping[str, ParameterState]
) -> None:
    """Refuse hooks that would see segments, and ties that would be torn.

    Raises:
        PlanError: CR211 or CR304.
    """
    for name, state in states.items():
        if state.hook_names and name in layouts and layouts[name].packed is not None:
            message = f"it has the hook {', '.join(state.hook_names)}, and each of its segments is sharded on its own"
            raise PlanError("CR211", name, message, "hook a module's output, or leave the module out of the plan")
    for names, different in split_ties(model, layouts):
        message = f"tied weights get different placements ({different})"
        raise PlanError("CR304", names[0], message, SAME_PLACEMENT)


def _style_modules(model: nn.Module, resolved: Resolved, tp_mesh: DeviceMesh, src_data_rank: int | None) -> None:
    """Apply each named module's style, and replicate the parameters of the others."""
    named = list(model.named_modules())
    for fqn, module in named:
        if fqn in resolved:
            _undo_left_out(module)  # of an earlier call; all of them before the first style sees a parameter
    for fqn, module in named:
        site = Site(model, fqn, tp_mesh.size())
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # made of a padding mask in evaluation: no style knows nested tensors
        if fqn in resolved:
            _apply_style(module, resolved[fqn][1], site, tp_mesh, src_data_rank)
        if any(not isinstance(param, DTensor) for param in module.parameters(recurse=False)):
            if fqn not in resolved:
                module.__dict__[LEFT_OUT_MARK] = True
            parallelize_module(module, tp_mesh, LEFT_OUT.build(site), src_data_rank=src_data_rank)


def _apply_style(module: nn.Module, style: Style, site: Site, tp_mesh: DeviceMesh, src_data_rank: int | None) -> None:
    attributes = style.local_attributes(site)  # read before the style changes the module
    parallelize_module(module, tp_mesh, style.build(site), src_data_rank=src_data_rank)
    for key, value in attributes.items():
        set_attribute(module, key, value, site.tp)
    if style.sizes:
        write_local_sizes(module, style.sizes, site.tp)
    if style.used_outside:
        divide_gradients(module, style.used_outside, site.tp)
    module.__dict__[STYLED] = style.name


def is_parallel(model: nn.Module) -> bool:
    """Whether a module of the model is parallelised already."""
    return any(isinstance(param, DTensor) for param in model.parameters())


def parallel_already(model: nn.Module, styles: Mapping[str, Style]) -> Iterator[PlanError]:
    """An error for each named module that has a style or DTensors already, or whose new style came too late."""
    for fqn, style in styles.items():
        module = model.get_submodule(fqn)
        own = module.__dict__
        placed = any(isinstance(param, DTensor) for param in module.parameters(recurse=False))
        if STYLED in own or (placed and LEFT_OUT_MARK not in own):
            by = f"with style {own[STYLED]}" if STYLED in own else "and holds DTensors"
            fix = "name each module in one call, and apply data parallelism after the last"
            yield PlanError("CR104", fqn or "model", f"it is parallelised already {by}", fix)
            continue
        inside = [name for name, child in module.named_modules() if name and STYLED in child.__dict__]
        if inside and style.torch_class is None:  # these set up the modules inside them, which have been set up by now
            message = f"style {style.name} sets up the modules inside it, and {inside[0]} is parallelised already"
            yield PlanError("CR104", fqn or "model", message, "name both in one call")


def _undo_left_out(module: nn.Module) -> None:
    """Make the replicated parameters of a module plain again, for its style."""
    if module.__dict__.pop(LEFT_OUT_MARK, False):
        remove_views(module)
        parameters: dict[str, Any] = dict(module._parameters)
        for name, param in parameters.items():
            if isinstance(param, DTensor):  # replicated, so the local tensor is all of it
                plain = nn.Parameter(local_tensor(param.detach()), requires_grad=param.requires_grad)
                module.register_parameter(name, plain)


def tp_axis(mesh: Mesh | DeviceMesh) -> DeviceMesh:
    """The 1-D mesh of the tp axis."""
    if isinstance(mesh, Mesh):
        if not dist.is_initialized():
            raise ConfigError(f"mesh {mesh} needs a process group: start with torchrun, or pass a DeviceMesh")
        device_type = "cuda" if dist.get_backend() == "nccl" else "cpu"
        mesh = mesh.build(device_type, dist.get_world_size())
    if mesh.mesh_dim_names and "tp" in mesh.mesh_dim_names:
        return mesh["tp"]
    if mesh.ndim == 1:
        return mesh
    raise ConfigError(f"the mesh has axes {mesh.mesh_dim_names} and none is called tp: name the tensor-parallel one tp")


def tied_parameters(model: nn.Module) -> list[list[str]]:
    """Groups of fully qualified names that are one parameter."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        names[id(param)].append(name)
    return [group for group in names.values() if len(group) > 1]


def tie(model: nn.Module, ties: list[list[str]]) -> None:
    """Make each group of names one parameter again: the first one's."""
    for first, *others in ties:
        module, _, leaf = first.rpartition(".")
        param = model.get_submodule(module)._parameters[leaf]  # the attribute may be a view of it
        for other in others:
            parent, _, name = other.rpartition(".")
            model.get_submodule(parent).register_parameter(name, param)


SAME_PLACEMENT = (
    "give them the same placement, such as rowwise with input: replicate on the embedding and colwise on the head"
)


def split_ties(model: nn.Module, layouts: Mapping[str, ParameterLayout]) -> list[tuple[list[str], str]]:
    """Tied parameters that would be placed differently: their names, and each one's placement as text."""
    found = []
    for group in tied_parameters(model):
        placed = {name: str(layouts[name]) for name in group if name in layouts}
        if len(set(placed.values())) > 1:
            found.append((group, ", ".join(f"{name} {placement}" for name, placement in placed.items())))
    return found


def _sync_replicas(model: nn.Module, tp_mesh: DeviceMesh, source: int) -> None:
    """torch's SequenceParallel keeps each rank's value of a replicated parameter; make them equal."""
    group = tp_mesh.get_group()
    for param in model.parameters():
        if isinstance(param, DTensor) and not param.is_meta and all(p.is_replicate() for p in param.placements):
            dist.broadcast(local_tensor(param.detach()), group=group, group_src=source)
