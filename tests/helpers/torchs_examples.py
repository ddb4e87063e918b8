"""Cases like those of torch's examples of tensor parallelism, alone and with FSDP2; each runs on every rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from colrow.mesh import Mesh, MeshAxes
from colrow.parallel.activation_checkpoint import apply_activation_checkpoint
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.loss import loss_context
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients, grad_norm
from colrow.sharding.layout import full_tensor
from helpers.parity import relative, tp_mesh
from helpers.torchs_models import MLP, WORDS, Stack, Transformer, built, collectives, drawn, transformer_plan

RANKS = 4


def words(device: str, batch: int = 4, seed: int = 1) -> Tensor:
    return torch.randint(WORDS, (batch, 8), generator=torch.Generator().manual_seed(seed)).to(device)


def weighted(out: Tensor) -> Tensor:
    """A scalar in which each element of a sample has a factor of its own; the mean over samples."""
    return (out * drawn(*out.shape[1:], device=out.device.type, seed=9)).sum() / len(out)


def errors_of(
    model: nn.Module, reference: nn.Module, of: Callable[[Any], Tensor | None], prefix: str = ""
) -> dict[str, float]:
    """Of each parameter's value or gradient, where the reference has one."""
    want, found = dict(reference.named_parameters()), {}
    for name, param in model.named_parameters():
        expected, got = of(want[name]), of(param)
        assert (expected is None) == (got is None), name
        if expected is not None and got is not None:
            found[prefix + name] = relative(full_tensor(got.detach()), expected.detach())
    return found


def gradients(param: nn.Parameter) -> Tensor | None:
    return param.grad


def values(param: nn.Parameter) -> Tensor:
    return param


# -- tensor parallelism alone


def mlp_case(device: str, sequence: bool) -> tuple[dict[str, float], dict[str, int]]:
    reference, model = built(MLP, device)
    ways = ({"input": "shard(0)"}, {"output": "shard(0)"}) if sequence else ({}, {})
    plan = {"net1": {"style": "colwise", **ways[0]}, "net2": {"style": "rowwise", **ways[1]}}
    parallelize(model, Plan(plan), tp_mesh(device, RANKS)["tp"])

    def held(tensor: Tensor) -> Tensor:
        return tensor.chunk(RANKS)[dist.get_rank()] if sequence else tensor

    x, weights = drawn(8, 12, device=device), drawn(8, 12, device=device, seed=2)
    with CommDebugMode() as seen:
        out = model(held(x))
        (out * held(weights)).sum().backward()
    want = reference(x)
    (want * weights).sum().backward()
    align_gradients(model.parameters())
    errors = {"output": relative(out, held(want)), **errors_of(model, reference, gradients)}
    for one in (reference, model):
        torch.optim.SGD(one.parameters(), lr=0.25).step()
    with torch.inference_mode():
        errors["trained output"] = relative(model(held(x)), held(reference(x)))
    return errors | errors_of(model, reference, values, "trained "), collectives(seen)


FORWARD = {False: {"all-reduce": 6, "gather": 1}, True: {"gather": 6, "scatter": 6}}
BACKWARD = {False: {"all-reduce": 9}, True: {"gather": 6, "scatter": 5}}
WITHOUT_EMBEDDINGS = {"gather": 5, "scatter": 5}
TRAINED: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    "norm and head": (("output.weight", "norm.weight", "norm.bias"), {"scatter": 1}),
    "embedding and head": (("tok_embeddings.weight", "output.weight"), WITHOUT_EMBEDDINGS),
    "embedding, norm and head": (
        ("tok_embeddings.weight", "output.weight", "norm.weight", "norm.bias"),
        WITHOUT_EMBEDDINGS,
    ),
    "and a block's norm": (
        ("tok_embeddings.weight", "output.weight", "norm.weight", "norm.bias", "layers.1.ffn_norm.weight",
         "layers.1.ffn_norm.bias"),
        WITHOUT_EMBEDDINGS,
    ),
    "one of each": (
        ("tok_embeddings.weight", "layers.0.attention.wv.weight", "layers.0.feed_forward.net1.bias",
         "layers.1.ffn_norm.bias", "layers.1.feed_forward.net2.weight", "output.weight"),
        WITHOUT_EMBEDDINGS,
    ),
}  # fmt: skip


def transformer_case(
    device: str, sequence: bool, local_attention: bool, tied: bool, trained: tuple[str, ...] | None
) -> tuple[dict[str, float], list[dict[str, int]]]:
    """Errors, and the collectives of forward, backward and alignment; `trained`: all parameters unless given."""
    reference, model = built(lambda: Transformer(tied), device)
    parallelize(model, Plan(transformer_plan(sequence, local_attention)), tp_mesh(device, RANKS)["tp"])
    for one in (reference, model):
        for name, param in one.named_parameters():
            param.requires_grad_(trained is None or name in trained)
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.05) for one in (reference, model)]
    errors, seen = {}, []
    for step in range(2):
        ids = words(device, seed=step)
        want = reference(ids)
        weighted(want).backward()
        with CommDebugMode() as forward:
            out = model(ids)
        with CommDebugMode() as backward:
            weighted(out).backward()
        with CommDebugMode() as alignment:
            align_gradients(model.parameters())
        seen = [collectives(each) for each in (forward, backward, alignment)]
        errors |= {f"output {step}": relative(out, want), **errors_of(model, reference, gradients, f"{step} ")}
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return errors | errors_of(model, reference, values, "trained "), seen


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.fc = nn.Embedding(16, 8), nn.Linear(8, 16)

    def forward(self, ids: Tensor) -> Tensor:
        return self.fc(self.embedding(ids))


def tied_case(device: str) -> dict[str, float]:
    """Weights that are tied after the split."""
    reference, model = built(Tied, device)
    same = {"input": "replicate"}
    plan = {"embedding": {"style": "rowwise", **same}, "fc": {"style": "colwise", "output": "replicate"}}
    parallelize(model, Plan(plan), tp_mesh(device, RANKS)["tp"])
    before = full_tensor(model.fc.weight.detach())
    for one in (reference, model):
        one.fc.weight = one.embedding.weight
    ids = torch.arange(5, device=device)
    outputs = [one(ids) for one in (reference, model)]
    for out in outputs:
        weighted(out).backward()
    align_gradients(model.parameters())
    assert model.fc.weight.grad is model.embedding.weight.grad
    assert not torch.equal(before, full_tensor(model.fc.weight.detach()))
    return {"output": relative(outputs[1], outputs[0]), **errors_of(model, reference, gradients)}


def loss_case(device: str) -> tuple[dict[str, float], list[tuple[dict[str, int], int]]]:
    """The loss on logits sharded by class, with weights, for each reduction; other shards are refused."""
    plan, mesh = Plan({}, loss="vocab_parallel"), tp_mesh(device, RANKS)["tp"]
    weight = drawn(16, device=device, seed=3).abs()
    errors, counts = {}, []
    for shape, reduction in itertools.product(((8, 16), (8, 16, 12)), ("none", "mean", "sum")):
        x = drawn(*shape, device=device).requires_grad_()
        target = torch.randint(16, (8, *shape[2:]), generator=torch.Generator().manual_seed(4)).to(device)
        want = F.cross_entropy(x, target, weight, reduction=reduction)
        want.sum().backward()
        placed = distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_()
        with loss_context(plan, mesh):
            with CommDebugMode() as forward:
                loss = F.cross_entropy(placed, target, weight, reduction=reduction)
            with CommDebugMode() as backward:
                loss.sum().backward()
            for dim in {*range(len(shape))} - {1}:
                with pytest.raises((ValueError, RuntimeError), match="loss_parallel"):
                    F.cross_entropy(distribute_tensor(x.detach(), mesh, [Shard(dim)]), target, reduction=reduction)
        assert placed.grad is not None
        assert placed.grad.placements == (Shard(1),)
        name = f"{reduction} {len(shape)}"
        errors |= {name: relative(loss.to_local(), want), name + " x": relative(placed.grad.full_tensor(), x.grad)}
        counts.append((collectives(forward), backward.get_total_counts()))
    return errors, counts


# -- with FSDP2


HALVES = Mesh(dp_shard=2, tp=2)
STACK = {"layers.*.net1": "colwise", "layers.*.net2": "rowwise"}


def sharded(device: str, model: Any, plan: dict[str, Any], reshard: bool, checkpoint: bool = False) -> DeviceMesh:
    mesh = HALVES.build(device, RANKS)
    parallelize(model, Plan(plan), mesh)
    apply_activation_checkpoint(model.layers, "full" if checkpoint else "none")
    apply_data_parallel(model, mesh, model.layers, param_dtype=None, reshard_after_forward=reshard)
    return mesh


def trained_side_by_side(
    model: nn.Module, reference: nn.Module, mesh: DeviceMesh, batches: list[Tensor]
) -> dict[str, float]:
    """The reference gets the batch, the ranks of each data rank their part of it."""
    errors = errors_of(model, reference, values, "before ")
    optimizers = [torch.optim.AdamW(one.parameters(), lr=0.01, foreach=False) for one in (reference, model)]
    for step, batch in enumerate(batches):
        index = mesh["dp_shard"].get_local_rank()
        want, out = reference(batch), model(batch.chunk(2)[index])
        weighted(want).backward()
        weighted(out).backward()
        align_gradients(model.parameters())
        errors |= {f"output {step}": relative(out, want.chunk(2)[index])}
        errors |= errors_of(model, reference, gradients, f"{step} ")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=step % 2 == 0)
    return errors | errors_of(model, reference, values, "trained ")


def stack_case(device: str, width: int, reshard: bool, checkpoint: bool) -> dict[str, float]:
    reference, model = built(lambda: Stack(width, (3, 1, 3)), device)
    mesh = sharded(device, model, STACK, reshard, checkpoint)
    batches = [drawn(8, width, device=device, seed=step) for step in range(3)]
    return trained_side_by_side(model, reference, mesh, batches)


# 6: the 9 rows that a tp rank has of the first linear are 5 and 4 on the data ranks


def fsdp_transformer_case(device: str) -> tuple[dict[str, float], bool]:
    reference, model = built(Transformer, device)
    mesh = sharded(device, model, transformer_plan(True), True)
    errors = trained_side_by_side(model, reference, mesh, [words(device, 4, seed) for seed in range(3)])
    weighted(model(words(device, 4))).backward()
    align_gradients(model.parameters())
    grad = model.pos_embeddings.weight.grad
    assert isinstance(grad, DTensor)
    return errors, grad.placements == model.pos_embeddings.weight.placements


def norms_case(device: str) -> dict[str, float]:
    """The norm of all gradients, the project's and torch's own, and what clipping leaves."""
    reference, model = built(Transformer, device)
    mesh = sharded(device, model, transformer_plan(True), True)
    batch = words(device, 4)
    weighted(reference(batch)).backward()
    weighted(model(batch.chunk(2)[mesh["dp_shard"].get_local_rank()])).backward()
    align_gradients(model.parameters())
    want = torch.nn.utils.get_total_norm([p.grad for p in reference.parameters() if p.grad is not None])
    errors = {"colrow": relative(grad_norm(model.parameters(), MeshAxes(mesh).norm_groups()), want)}
    for kind in (1, 3, float("inf"), 2):
        want = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.1, kind)
        got = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1, kind)
        errors[f"norm {kind}"] = relative(full_tensor(got), want)
    return errors | errors_of(model, reference, gradients)


def state_case(device: str) -> None:
    """torch's own functions for state dicts: of shards, and of full tensors that rank 0 has."""
    reference, model = built(lambda: Stack(6, (3, 1, 3)), device)
    sharded(device, model, STACK, True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    state = model.state_dict()
    for name, value in reference.state_dict().items():
        assert isinstance(state[name], DTensor)
        assert torch.equal(full_tensor(state[name]), value), name
    model.load_state_dict({name: value.detach() * 2 for name, value in state.items()})
    for name, value in reference.state_dict().items():
        assert torch.equal(full_tensor(model.state_dict()[name]), value * 2), name

    weighted(model(drawn(4, 6, device=device))).backward()
    optimizer.step()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    before = [
        {k: v.clone() for k, v in get_model_state_dict(model).items()},
        get_optimizer_state_dict(model, optimizer),
    ]
    full = get_model_state_dict(model, options=options), get_optimizer_state_dict(model, optimizer, options=options)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    set_model_state_dict(model, full[0], options=options)
    set_optimizer_state_dict(model, optimizer, full[1], options=options)
    after = [get_model_state_dict(model), get_optimizer_state_dict(model, optimizer)]
    pairs = [(before[0], after[0])]
    pairs += [(before[1]["state"][k], after[1]["state"][k]) for k in before[1]["state"]]
    for first, second in pairs:
        for name, value in first.items():
            assert torch.equal(full_tensor(value), full_tensor(second[name])), name
