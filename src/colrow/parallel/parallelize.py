"""Apply a plan to a model: each named module gets its style, and every parameter ends on the tp mesh."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from colrow.errors import ConfigError, PlanError
from colrow.mesh import Mesh
from colrow.plans.plan import Plan
from colrow.sharding.layout import local_tensor, mark_packed
from colrow.styles.base import ParameterLayout, set_attribute
from colrow.styles.replicated import LEFT_OUT
from colrow.styles.site import Site


def parallelize(model: nn.Module, plan: Plan, mesh: Mesh | DeviceMesh, *, absent: Iterable[str] = ()) -> nn.Module:
    """Split `model` over the tp axis of `mesh` as `plan` says, in place, and return it.

    The model may lie on the meta device; real weights are taken from the first rank of each tp group. Afterwards
    every parameter is a DTensor on the tp mesh under its own name: the ones that the plan leaves out are replicated.
    Tied parameters stay tied and frozen ones frozen. Build the optimizer after this call.

    Args:
        mesh: a 1-D mesh, a mesh with an axis named `tp`, or the degrees (then under an initialised process group).
        absent: for a pipeline stage, the names of the complete model's modules that it has not (`Stage.absent`).

    Raises:
        PlanError: the plan does not fit the model or the degree; nothing has been changed then.
        ConfigError: the mesh has no tp axis, or does not fit the number of ranks.
    """
    tp_mesh = tp_axis(mesh)
    tp = tp_mesh.size()
    if any(isinstance(param, DTensor) for param in model.parameters()):
        raise PlanError("the model is parallelised already: apply one plan, once, to a plain model")
    resolved = plan.resolve(model, absent)
    plan.check_shapes(model, tp, resolved=resolved)
    layouts = plan.parameters(model, tp, resolved=resolved)
    if tp == 1:
        for fqn, (_, style) in resolved.items():
            if style.on_one_rank:
                site = Site(model, fqn, tp)
                style.build(site)._apply(site.module, tp_mesh)
        return model

    ties = tied_parameters(model)
    trainable = {name: param.requires_grad for name, param in model.named_parameters(remove_duplicate=False)}
    for names, different in split_ties(model, layouts):
        message = f"tied weights get different placements ({different})"
        raise PlanError("CR304", names[0], message, SAME_PLACEMENT)

    for fqn, module in list(model.named_modules()):
        site = Site(model, fqn, tp)
        if fqn in resolved:
            style = resolved[fqn][1]
            attributes = style.local_attributes(site)
            parallelize_module(module, tp_mesh, style.build(site))
            for key, value in attributes.items():
                set_attribute(module, key, value, tp)
        if any(not isinstance(param, DTensor) for param in module.parameters(recurse=False)):
            parallelize_module(module, tp_mesh, LEFT_OUT.build(site))
    for fqn, layout in layouts.items():
        if layout.packed is not None:
            parent, _, name = fqn.rpartition(".")
            mark_packed(model.get_submodule(parent), name, layout.packed)

    tie(model, ties)
    for name, param in model.named_parameters(remove_duplicate=False):
        param.requires_grad_(trainable[name])
    _sync_replicas(model, tp_mesh)
    return model


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


SAME_PLACEMENT = "give them the same placement, such as rowwise on the embedding and colwise on the head"


def split_ties(model: nn.Module, layouts: Mapping[str, ParameterLayout]) -> list[tuple[list[str], str]]:
    """Tied parameters that would be placed differently: their names, and each one's placement as text."""
    found = []
    for group in tied_parameters(model):
        placed = {name: str(layouts[name]) for name in group if name in layouts}
        if len(set(placed.values())) > 1:
            found.append((group, ", ".join(f"{name} {placement}" for name, placement in placed.items())))
    return found


def _sync_replicas(model: nn.Module, tp_mesh: DeviceMesh) -> None:
    """torch's SequenceParallel takes each rank's own value for a replicated parameter; make them one."""
    group = tp_mesh.get_group()
    for param in model.parameters():
        if isinstance(param, DTensor) and not param.is_meta and all(p.is_replicate() for p in param.placements):
            dist.broadcast(local_tensor(param.detach()), group=group, group_src=0)
