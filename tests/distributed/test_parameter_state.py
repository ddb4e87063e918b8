"""Hooks and attributes of parameters survive the plan, or are refused by name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from colrow.checking.check import check
from colrow.errors import ConfigError, PlanError
from colrow.mesh import Mesh
from colrow.parallel.compute_weights import ComputeWeights
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.initialize import materialize
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import full_tensor
from colrow.sharding.parameter_state import copied_model, states_of
from colrow.verifying.verify import verify
from helpers.harness import Ranks
from helpers.parity import relative, tp_mesh

PLAN = {"up": "colwise", "down": "rowwise"}


class Scaled(nn.Module):
    """An MLP that reads an attribute of its weight in forward, as muP does."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.down.weight.scale = 0.5  # type: ignore[attr-defined]
        self.norm.weight.scale = 3.0  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        scale: Any = self.down.weight
        norm: Any = self.norm.weight
        return self.down(self.up(self.norm(x) * norm.scale).tanh()) * scale.scale


def keep_first_rows(grad: Tensor) -> Tensor:
    """By global row, and with a norm: wrong on a shard."""
    kept = grad.clone()
    kept[10:] = 0
    return kept / (1 + grad.norm())


def clip_own(param: Tensor) -> None:
    assert param.grad is not None
    param.grad /= 1 + param.grad.norm()
    param.grad[0] = 1.0


def hooked() -> Scaled:
    torch.manual_seed(0)
    model = Scaled().double()
    model.up.weight.register_hook(keep_first_rows)
    model.norm.weight.register_hook(keep_first_rows)
    model.down.weight.register_post_accumulate_grad_hook(clip_own)
    model.down.bias.register_post_accumulate_grad_hook(clip_own)
    return model


def hooked_case(device: str, sequence: bool) -> dict[str, float]:
    reference = hooked().to(device)
    plan: dict[str, Any] = dict(PLAN)
    if sequence:  # the norm's gradient is a partial sum until somebody adds it up
        plan[""] = {"style": "prepare_input", "input": ["replicate"], "desired": ["shard(1)"]}
        plan["norm"] = {"style": "sequence", "use_local_output": False}
        plan["up"] = {"style": "colwise", "input": "shard(1)"}
    model = copied_model(reference)
    parallelize(model, Plan(plan), tp_mesh(device, 2))
    x = torch.randn(2, 4, 8, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(1))
    for _ in range(2):  # accumulates
        for each in (reference, model):
            out = each(x)
            (out * out.detach().cos()).sum().backward()
    align_gradients(model.parameters())
    want = dict(reference.named_parameters())
    return {n: relative(full_tensor(p.grad), want[n].grad) for n, p in model.named_parameters()}


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True])
def test_hooks_get_and_give_the_unsharded_gradient(ranks: Ranks, sequence: bool) -> None:
    for errors in ranks(2).run(hooked_case, sequence):
        assert max(errors.values()) < 1e-12, errors


def removed_hook_case(device: str) -> float:
    model = nn.Linear(4, 4, bias=False).to(device)
    handle = model.weight.register_hook(torch.zeros_like)
    parallelize(model, Plan({"": "colwise"}), tp_mesh(device, 2))
    handle.remove()
    model(torch.ones(1, 4, device=device)).sum().backward()
    assert model.weight.grad is not None
    return full_tensor(model.weight.grad).norm().item()


@pytest.mark.distributed
def test_a_hook_that_is_removed_later_does_not_run(ranks: Ranks) -> None:
    assert min(ranks(2).run(removed_hook_case)) > 0


def attributes_case(device: str, shards: int) -> list[Any]:
    torch.manual_seed(0)
    reference = Scaled().to(device)
    mesh = Mesh(dp_shard=shards, tp=2 // shards).build(device, 2)
    model = copy.deepcopy(reference)
    for name, param in reference.named_parameters():  # deepcopy of a model drops them
        model.get_parameter(name).__dict__.update(param.__dict__)
    parallelize(model, Plan(PLAN), mesh)
    materialize(model, device)
    apply_data_parallel(model, mesh, [], param_dtype=None)
    materialize(model, device)
    x = torch.randn(2, 8, device=device, generator=torch.Generator(device).manual_seed(1))
    for _ in range(2):
        out = model(x)
        out.sum().backward()
    return [relative(out, reference(x)), sorted((n, s.attributes["scale"]) for n, s in states_of(model).items())]


@pytest.mark.distributed
@pytest.mark.parametrize("shards", [1, 2])
def test_attributes_are_there_for_forward_and_optimizer(ranks: Ranks, shards: int) -> None:
    for error, kept in ranks(2).run(attributes_case, shards):
        assert error < 1e-6
        assert kept == [("down.weight", 0.5), ("norm.weight", 3.0)]


def refused_case(device: str) -> list[str]:
    texts = []
    with pytest.raises(ConfigError) as error:
        apply_data_parallel(hooked(), Mesh(dp_shard=2).build(device, 2), [], param_dtype=None)
    texts.append(str(error.value))
    with pytest.raises(ConfigError) as error:
        ComputeWeights(hooked(), torch.bfloat16)
    texts.append(str(error.value))
    model = nn.Sequential(nn.Linear(4, 8))
    model[0].weight.register_hook(keep_first_rows)
    plan = Plan({"0": {"style": "packed_colwise", "segments": [4, 4]}})
    with pytest.raises(PlanError) as packed:
        parallelize(model, plan, tp_mesh(device, 2))
    return [*texts, str(packed.value)]


@pytest.mark.distributed
def test_hooks_that_cannot_run_are_refused_by_name(ranks: Ranks) -> None:
    data, compute, packed = ranks(2).run(refused_case)[0]
    assert "parameter norm.weight has the hook keep_first_rows" in data
    assert "parameter norm.weight has the hook keep_first_rows" in compute
    assert "0.weight: it has the hook keep_first_rows" in packed


def lost(grad: Tensor) -> Tensor:
    return grad * float(dist.is_initialized())


@pytest.mark.parametrize("backend", ["local", pytest.param("gloo", marks=pytest.mark.exhaustive)])
@pytest.mark.distributed
def test_verify_runs_hooks(backend: Any) -> None:
    """Right with hooks that a rank runs as one process does; wrong with one that does not."""
    plan = Plan({"up": "colwise", "down": "rowwise"})
    report = verify(hooked(), plan, 2, backend=backend)
    assert report.ok, report
    assert report.max_step_rel_err < 1e-12
    model = Scaled()
    model.up.weight.register_hook(lost)
    assert verify(model, plan, 2, backend=backend).verdict == "wrong"


def test_check_runs_hooks_and_finds_no_error_in_them() -> None:
    assert [str(f) for f in check(hooked(), Plan(PLAN), Mesh(tp=2), seq_len=16)] == []


def test_a_model_that_holds_a_tensor_of_a_graph_is_checked() -> None:
    """`copy.deepcopy` refuses one: what a forward left in an attribute, and the weight of weight_norm."""
    model = Scaled()
    model.kept = {"loss": [model.up(torch.ones(1, model.up.in_features)).sum()]}
    assert [str(f) for f in check(model, Plan(PLAN), Mesh(tp=2), seq_len=16)] == []
    assert copied_model(model).kept["loss"][0].grad_fn is None
    assert model.kept["loss"][0].grad_fn is not None
    with pytest.raises(RuntimeError, match="deepcopy"):  # the negative control
        copy.deepcopy(model)
