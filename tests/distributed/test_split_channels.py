"""Options `gather`, `used_inside`, `replicated`, `kv` and buffers among `shards`, and gathered parameters, under tp ×
FSDP2: gradients and buffers of one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow import full_tensor
from colrow.derive.derivation import derive
from colrow.mesh import Mesh
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from helpers.harness import Ranks
from helpers.parity import relative
from helpers.split_models import Bare, Branching, D, FewKvHeads, Normalised, SelectiveScan

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]
TOLERANCE = 1e-10


def scan() -> nn.Module:
    return nn.Sequential(nn.Linear(3, D), SelectiveScan(), nn.Linear(D, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "gather": (Branching, (4, 4)),
    "used_inside": (scan, (4, 2, 3)),
    "buffers": (Normalised, (4, 3, 4, 4)),
    "gathered_parameters": (Bare, (4, 4)),
    "replicated": (lambda: nn.Sequential(FewKvHeads(1)), (4, 5, D)),
    "kv": (lambda: nn.Sequential(FewKvHeads(3)), (4, 5, D)),
}


def built(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = MODELS[name]
    torch.manual_seed(0)
    x = torch.randint(0, 20, shape) if name.startswith("gather") else torch.randn(*shape, dtype=torch.float64)
    return make().double(), x


def plan_of(name: str) -> Plan:
    model, x = built(name)
    return derive(model, 2, inputs=(x[:3],), judge=lambda _: None).plan()


def data_case(device: str, name: str, plan: str) -> dict[str, float]:
    """Relative errors of gradients and buffers: each data rank has half of the batch, and its own batch statistics."""
    mesh = Mesh(dp_shard=2, tp=2).build(device, 4)
    x = built(name)[1].to(device)
    # built again each time: modules with hooks of weight_norm cannot be copied
    parallel = parallelize(built(name)[0].to(device), Plan.from_yaml(plan), mesh)
    apply_data_parallel(parallel, mesh, [], param_dtype=None, reshard_after_forward=True)
    halves = [built(name)[0].to(device) for _ in range(2)]
    for half, part in zip(halves, x.chunk(2), strict=True):
        half(part).square().mean().backward()
    mine = mesh["dp_shard"].get_local_rank()
    parallel(x.chunk(2)[mine]).square().mean().backward()
    errors = {}
    expected: list[Any] = [dict(half.named_parameters()) for half in halves]
    for fqn, param in parallel.named_parameters():
        assert param.grad is not None, fqn
        errors[fqn] = relative(full_tensor(param.grad), sum(each[fqn].grad for each in expected) / 2)
    assert len(errors) == len(expected[0])
    for fqn, buffer in parallel.named_buffers():
        errors[fqn] = relative(full_tensor(buffer).double(), halves[mine].get_buffer(fqn).double())
    return errors


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_buffers_are_those_of_one_process(ranks: Ranks, name: str) -> None:
    plan = plan_of(name)
    options = [style.to_data() for style in plan.modules.values()]
    assert f"'{'running_mean' if name == 'buffers' else name}'" in str(options), options
    for errors in ranks(4).run(data_case, name, plan.to_yaml()):
        assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


def test_a_sum_that_is_left_out_is_seen(ranks: Ranks) -> None:
    plan = plan_of("used_inside")
    select = replace(plan.modules["1.select"], used_inside=False)
    broken = replace(plan, modules={**plan.modules, "1.select": select})
    for errors in ranks(4).run(data_case, "used_inside", broken.to_yaml()):
        assert errors["1.select.weight"] > 1e-3
