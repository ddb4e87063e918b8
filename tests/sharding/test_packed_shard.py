"""torch's own ways to gather a packed parameter would give its rows in the ranks' order: they raise, and ours works."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor, Shard

import colrow
from colrow.errors import PlacementError
from colrow.mesh import Mesh
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.sharding.packed_shard import PackedShard
from helpers.harness import Ranks

FULL = StateDictOptions(full_state_dict=True)
QKV = (8, 4, 4)


class Fused(nn.Module):
    """A fused weight, and a plain one of the same shape: what torch caches for one must not serve the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.up = nn.Linear(6, sum(QKV)), nn.Linear(6, sum(QKV))

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x).square().sum() + self.up(x).square().sum()


def refusal(gather: Callable[[], object]) -> str:
    """The error's text; empty if the gather works."""
    try:
        gather()
    except PlacementError as error:
        return str(error)
    return ""


def gathered_case(device: str, mesh: Mesh) -> tuple[dict[str, str], dict[str, bool]]:
    """What torch's ways say of packed tensors; and what must hold of them and of plain ones."""
    torch.manual_seed(0)
    model = Fused().to(device)
    expected = {name: param.detach().clone() for name, param in model.named_parameters()}
    device_mesh = mesh.build(device, mesh.world_size)
    styles = {"qkv": {"style": "packed_colwise", "segments": list(QKV)}, "up": "colwise"}
    colrow.parallelize(model, colrow.Plan(modules=styles), device_mesh)
    apply_data_parallel(model, device_mesh, [], param_dtype=None, reshard_after_forward=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    params = dict(model.named_parameters())
    assert all(isinstance(param, DTensor) for param in params.values())
    holds = {name: torch.equal(colrow.full_tensor(param.detach()), expected[name]) for name, param in params.items()}
    model(torch.ones(3, 6, device=device)).backward()
    optimizer.step()
    optimizer.step()
    packed, plain = params["qkv.weight"], params["up.weight"]
    assert packed.grad is not None
    moment = optimizer.state[packed]["exp_avg"]
    errors = {
        "full_tensor": refusal(packed.full_tensor),  # type: ignore[attr-defined]
        "detached": refusal(packed.detach().full_tensor),  # type: ignore[attr-defined]
        "gradient": refusal(packed.grad.full_tensor),  # type: ignore[attr-defined]
        "optimizer state": refusal(moment.full_tensor),
        "model state": refusal(lambda: get_model_state_dict(model, options=FULL)),
        "optimizer states": refusal(lambda: get_optimizer_state_dict(model, optimizer, options=FULL)),
    }
    reference = copy.deepcopy(Fused()).to(device)
    reference.load_state_dict(expected)
    other = torch.optim.AdamW(reference.parameters(), lr=0.1)
    reference(torch.ones(3, 6, device=device)).backward()
    other.step()
    other.step()
    holds["plain"] = refusal(plain.detach().full_tensor) == ""  # type: ignore[attr-defined]
    holds["plain moment"] = refusal(optimizer.state[plain]["exp_avg"].full_tensor) == ""
    for name, param in reference.named_parameters():
        got = params[name]
        assert got.grad is not None
        holds[f"{name} after steps"] = torch.allclose(colrow.full_tensor(got.detach()), param.detach(), atol=1e-6)
        holds[f"{name} gradient"] = torch.allclose(colrow.full_tensor(got.grad), param.grad, atol=1e-5)
        ours = colrow.full_tensor(optimizer.state[got]["exp_avg"])
        holds[f"{name} moment"] = torch.allclose(ours, other.state[param]["exp_avg"], atol=1e-6)
    return errors, holds


@pytest.mark.distributed
@pytest.mark.parametrize("mesh", [Mesh(tp=2), Mesh(dp_shard=2, tp=2), Mesh(dp_replicate=2, tp=2)], ids=str)
def test_only_our_way_gathers_a_packed_parameter(ranks: Ranks, mesh: Mesh) -> None:
    for errors, holds in ranks(mesh.world_size).run(gathered_case, mesh):
        assert all("colrow.full_tensor" in text for text in errors.values()), errors
        assert all(holds.values()), holds


def test_a_packed_shard_is_a_shard_that_survives_copies() -> None:
    placement = PackedShard(0, QKV)
    assert isinstance(placement, Shard)
    assert placement.is_shard(0)
    assert placement == Shard(0)  # so that torch's operators mix both
    assert hash(placement) != hash(Shard(0))  # but remembers the results of each apart
    for made in (copy.deepcopy(placement), pickle.loads(pickle.dumps(placement))):
        assert isinstance(made, PackedShard)
        assert (made.dim, made.segments) == (0, QKV)
