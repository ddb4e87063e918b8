"""Parity of the linear loss under tp × FSDP2 with one process."""

from __future__ import annotations

import copy

import torch
from torch.distributed.fsdp import FSDPModule

from colrow.mesh import Mesh
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.loss import model_loss
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from helpers.parity import batch, build, cross_entropy, relative, whole


def fsdp_case(device: str, degrees: dict[str, int], name: str, preset: str, micro_batches: int) -> dict[str, float]:
    """Gradients of tp × FSDP2 with the linear loss against one process on the whole batch."""
    mesh = Mesh(**degrees).build(device, Mesh(**degrees).world_size)
    reference, plan = build(name, device), Plan.preset(preset, "linear")
    model = parallelize(copy.deepcopy(reference), plan, mesh)
    apply_data_parallel(model, mesh, model.layers, param_dtype=None, reshard_after_forward=True)
    ids, targets = batch(device, size=8)
    want = cross_entropy(reference(ids), targets)
    want.backward()

    shards, index = mesh["dp_shard"].size(), mesh["dp_shard"].get_local_rank()
    parts = [(x.chunk(shards)[index]).chunk(micro_batches) for x in (ids, targets)]
    losses = []
    for i, (some_ids, some_targets) in enumerate(zip(*parts, strict=True)):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(i == micro_batches - 1)
        losses.append(model_loss(model, plan, mesh, some_ids, some_targets, num_valid=targets.numel() / shards))
        losses[-1].backward()
    loss = torch.stack(losses).sum().detach()
    torch.distributed.all_reduce(loss, group=mesh["dp_shard"].get_group())
    errors = {"loss": relative(loss / shards, want.detach())}
    expected = dict(reference.named_parameters())
    for fqn, param in model.named_parameters():
        assert param.grad is not None, fqn
        errors[fqn] = relative(whole(param.grad), expected[fqn].grad)
    assert len(errors) == len(expected) + 1
    return errors
