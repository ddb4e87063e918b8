"""Every style computes what the module alone computes, gradients included, with each of its layout options."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from colrow.parallel.parallelize import parallelize, tied_parameters
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from helpers.harness import Ranks
from helpers.parity import relative, tp_mesh, whole


class Part(nn.Module):
    """A module that takes its states by keyword, and gives two outputs."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)

    def forward(self, scale: Tensor, *, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(torch.tanh(self.up(states))), scale * 2


class Zoo(nn.Module):
    """One of each: embedding, LayerNorm, RMSNorm, Dropout, linears with and without bias, a loose parameter."""

    def __init__(self, d: int = 8, vocab: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(vocab, d), nn.Embedding(vocab, d)
        self.layer_norm, self.rms_norm, self.dropout = nn.LayerNorm(d), nn.RMSNorm(d), nn.Dropout(0.0)
        self.part = Part(d)
        self.gate = nn.Parameter(torch.randn(d))
        self.head = nn.Linear(d, vocab, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places(ids)
        x = self.dropout(self.layer_norm(x))
        y, scale = self.part(torch.ones((), dtype=torch.float64), states=x)
        # tanh, because a norm of y alone gives the same result for any multiple of y: it would hide a factor
        return self.head(self.rms_norm(torch.tanh(y * self.gate + y)) * scale)


SHARDED: dict[str, Any] = {
    "words": {"style": "rowwise", "input": "replicate", "output": "shard(1)"},
    "places": {"style": "colwise", "input": "replicate", "output": "shard(1)"},
    "layer_norm": "sequence",
    "dropout": {"style": "sequence", "use_local_output": True},
    "part": {
        "style": "prepare_input_output",
        "input": ["none"],
        "desired": ["none"],
        "input_kwargs": {"states": "shard(1)"},
        "desired_kwargs": {"states": "replicate"},
        "output": ["shard(1)", "none"],
        "desired_output": ["replicate", "none"],
    },
    "part.up": "colwise",
    "part.down": {"style": "rowwise", "output": "shard(1)"},
    "head": {"style": "colwise", "output": "replicate"},
}
WHOLE: dict[str, Any] = {
    "words": {"style": "rowwise", "input": "replicate"},
    "places": {"style": "colwise", "input": "replicate", "output": "replicate"},
    "part": {
        "style": "prepare_input",
        "input": ["none"],
        "desired": ["none"],
        "input_kwargs": {"states": "replicate"},
        "desired_kwargs": {"states": "replicate"},
    },
    "part.up": ColwiseParallel(),
    "part.down": RowwiseParallel(),
    "head": {"style": "colwise", "output": "replicate"},
}
OUTPUT: dict[str, Any] = {
    "words": {"style": "rowwise", "input": "replicate", "output": "shard(1)", "use_local_output": False},
    "places": {"style": "colwise", "input": "replicate", "output": "shard(1)", "use_local_output": False},
    "layer_norm": "sequence",
    "dropout": {"style": "prepare_output", "output": ["shard(1)"], "desired": ["replicate"]},
    "part.up": {"style": "colwise", "use_local_output": False},
    "part.down": {"style": "rowwise", "use_local_output": True},
    "head": {"style": "colwise", "output": "replicate"},
}


def zoo_case(device: str, modules: dict[str, Any]) -> dict[str, float]:
    torch.manual_seed(0)
    reference = Zoo().to(device, torch.float64)
    model = parallelize(copy.deepcopy(reference), Plan(modules=modules), tp_mesh(device, dist.get_world_size()))
    ids = torch.arange(24, device=device).reshape(2, 12) % 12
    outputs = [m(ids) for m in (reference, model)]
    for out in outputs:
        out.square().mean().backward()
    align_gradients(model.parameters())
    expected = dict(reference.named_parameters())
    errors = {name: relative(whole(p.grad), expected[name].grad) for name, p in model.named_parameters()}
    return {"output": relative(outputs[1], outputs[0]), **errors}


@pytest.mark.distributed
@pytest.mark.parametrize("modules", [SHARDED, WHOLE, OUTPUT], ids=["sharded", "whole", "output"])
def test_styles_and_layout_options(ranks: Ranks, modules: dict[str, Any]) -> None:
    for errors in ranks(2).run(zoo_case, modules):
        assert max(errors.values()) < 1e-12, errors


def bookkeeping_case(device: str) -> None:
    """Ties stay ties, frozen stays frozen, replicas start equal, every parameter lies on the tp mesh."""
    from torch.distributed.tensor import DTensor

    torch.manual_seed(dist.get_rank())  # ranks disagree, as with a careless seed
    model = Zoo().to(device, torch.float64)
    model.head.weight = model.words.weight
    model.layer_norm.weight.requires_grad_(False)
    parallelize(model, Plan(modules=SHARDED | {"rms_norm": "replicate"}), tp_mesh(device, 2))
    assert model.head.weight is model.words.weight
    assert tied_parameters(model) == [["words.weight", "head.weight"]]
    assert not model.layer_norm.weight.requires_grad
    for name, param in model.named_parameters():
        assert isinstance(param, DTensor), name
        assert param.device_mesh.mesh_dim_names == ("tp",), name
        value = param.full_tensor().detach().cpu()
        seen: list[Any] = [None, None]
        dist.all_gather_object(seen, value)
        assert torch.equal(seen[0], seen[1]), name
    with pytest.raises(ValueError, match="parallelised already"):
        parallelize(model, Plan(modules=SHARDED), tp_mesh(device, 2))


@pytest.mark.distributed
def test_ties_frozen_parameters_and_replicas_survive(ranks: Ranks) -> None:
    ranks(2).run(bookkeeping_case)


def refused_tie_case(device: str) -> str:
    model = Zoo()
    model.head.weight = model.words.weight
    plan = Plan(modules={"words": SHARDED["words"]})
    with pytest.raises(ValueError, match="tied weights get different placements") as caught:
        parallelize(model, plan, tp_mesh(device, 2))
    return str(caught.value)


@pytest.mark.distributed
def test_a_plan_that_would_split_a_tie_is_refused(ranks: Ranks) -> None:
    assert "words.weight S(0), head.weight R" in ranks(2).run(refused_tie_case)[0]
