"""Plans as people write them for torch's parallelize_module: patterns, the root, several calls, shared modules."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.errors import PlanError
from colrow.parallel.parallelize import parallelize, tied_parameters
from colrow.plans.patterns import matches
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from colrow.sharding.layout import full_tensor
from helpers.broken_plans import gpt_plan, second_name_plan, shared_blocks, shared_plan
from helpers.harness import Ranks
from helpers.parity import relative, tp_mesh


@pytest.mark.parametrize(
    ("key", "name", "matched"),
    [
        ("net*", "net1", True),
        ("net*", "net", True),
        ("net?", "net1", True),
        ("net?", "net10", False),
        ("net[12]", "net2", True),
        ("layers.[1-2].up", "layers.2.up", True),
        ("layers.[1-2].up", "layers.3.up", False),
        ("layers.[!0].up", "layers.3.up", True),
        ("layers.*", "layers.3", True),
        ("layers.*", "layers.3.up", False),
        ("*", "", False),
        ("", "", True),
        ("", "net", False),
        ("Net*", "net1", False),
    ],
)
def test_components_match_as_torchs_do(key: str, name: str, matched: bool) -> None:
    assert matches(key, name) is matched


class Nets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net1, self.net2, self.net3 = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.net3(self.net2(self.net1(self.norm(x)).tanh()).tanh())


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(ids)).tanh())


SEVERAL: dict[str, tuple[type[nn.Module], list[dict[str, Any]]]] = {
    "patterns": (Nets, [{"net[1]": "colwise", "n?t2": "rowwise"}]),
    "root": (Nets, [{"": {"style": "prepare_input", "input": ["replicate"], "desired": ["shard(0)"]},
                     "net1": {"style": "colwise", "input": "shard(0)", "output": "shard(0)"},
                     "norm": {"style": "sequence", "sequence_dim": 0},
                     "net2": {"style": "colwise", "input": "shard(0)"}, "net3": "rowwise"}]),
    "several calls": (Nets, [{"net1": "colwise"}, {"net2": "rowwise"},
                             {"net3": {"style": "colwise", "output": "replicate"}}]),
    "second call first": (Nets, [{"net2": "rowwise"}, {"net1": "colwise"}]),
    "ties after": (Tied, [{"mix": {"style": "colwise", "output": "replicate"}},
                          {"embed": {"style": "rowwise", "input": "replicate"},
                           "head": {"style": "colwise", "output": "replicate"}}]),
}  # fmt: skip


def several_case(
    device: str, kind: type[nn.Module], plans: list[dict[str, Any]], source: int | None
) -> dict[str, float]:
    """Errors against one process. `source`: whose weights all take; None: each rank its own, which are the same."""
    torch.manual_seed(0)
    reference = kind().to(device, torch.float64)
    model = copy.deepcopy(reference)
    for plan in plans:
        parallelize(model, Plan(plan), tp_mesh(device, 2), src_data_rank=source)
    assert tied_parameters(model) == tied_parameters(reference)
    sharded = [name for name, p in model.named_parameters() if isinstance(p, DTensor) and p.placements[0].is_shard()]
    assert sharded
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(4, 8, dtype=torch.float64, device=device, generator=generator)
    if kind is Tied:
        x = torch.arange(12, device=device).view(2, 6)
    outputs = [each(x) for each in (reference, model)]
    for out in outputs:
        (out * torch.arange(out.numel(), device=device).cos().view(out.shape)).sum().backward()
    align_gradients(model.parameters())
    want = dict(reference.named_parameters())
    errors = {name: relative(full_tensor(p.grad), want[name].grad) for name, p in model.named_parameters()}
    return {"output": relative(outputs[1], outputs[0]), **errors}


@pytest.mark.distributed
@pytest.mark.parametrize("name", SEVERAL)
def test_the_model_computes_the_same(ranks: Ranks, name: str) -> None:
    for source in (0, None):
        for errors in ranks(2).run(several_case, *SEVERAL[name], source):
            assert max(errors.values()) < 1e-12, errors


def shared_case(device: str, plan: Plan | None) -> list[Tensor]:
    """The gradients under a plan, or of one process."""
    torch.manual_seed(0)
    model = shared_blocks().to(device, torch.float64)
    if plan is not None:
        parallelize(model, plan, tp_mesh(device, 2))
    model(torch.arange(16, device=device).view(2, 8)).square().mean().backward()
    align_gradients(model.parameters())
    return [full_tensor(param.grad) for param in model.parameters()]


@pytest.mark.distributed
def test_a_shared_module_is_keyed_by_either_name(ranks: Ranks) -> None:
    plans = (gpt_plan(), second_name_plan(), shared_plan("colwise"), None)
    first, second, both, unsharded = (ranks(2).run(shared_case, plan)[0] for plan in plans)
    for a, b, c, want in zip(first, second, both, unsharded, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert relative(a, want) < 1e-12


def test_different_styles_of_a_shared_module_are_refused() -> None:
    with pytest.raises(PlanError, match=r"blocks\.0\.mlp\.up and again are one module"):
        shared_plan("rowwise").resolve(shared_blocks())


def own_weights_case(device: str, source: int | None) -> list[float]:
    """The values of a colwise, a rowwise, a replicated and a packed weight after the split."""
    rank = dist.get_rank()
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 8)).to(device)
    with torch.no_grad():
        for param in model.parameters():
            param.fill_(rank + 1)
    plan = {"0": "colwise", "1": "rowwise", "3": {"style": "packed_colwise", "segments": [4, 4]}}
    parallelize(model, Plan(plan), tp_mesh(device, 2), src_data_rank=source)
    return sorted({value for p in model.parameters() for value in p.to_local().unique().tolist()})  # type: ignore[attr-defined]


@pytest.mark.distributed
@pytest.mark.parametrize(("source", "values"), [(None, [[1.0], [2.0]]), (0, [[1.0], [1.0]]), (1, [[2.0], [2.0]])])
def test_weights_come_from_the_source_rank(ranks: Ranks, source: int | None, values: list[list[float]]) -> None:
    assert ranks(2).run(own_weights_case, source) == values


def refused_case(device: str) -> list[str]:
    mesh, texts = tp_mesh(device, 2), []
    for first, second in (
        ({"net1": "colwise"}, {"net?": "rowwise"}),
        ({"net1": "colwise", "net2": "rowwise"}, {"": {"style": "local_block", "input": ["replicate"]}}),
    ):
        model = Nets().to(device)
        parallelize(model, Plan(first), mesh)
        before = [id(param) for param in model.parameters()]
        with pytest.raises(PlanError) as error:
            parallelize(model, Plan(second), mesh)
        assert error.value.code == "CR104"
        assert before == [id(param) for param in model.parameters()]
        texts.append(str(error.value))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        parallelize(Nets().to(device), Plan({}, name="nothing"), mesh)
    return [*texts, *(str(w.message) for w in seen if "CR105" in str(w.message))]


@pytest.mark.distributed
def test_a_module_is_parallelised_once_and_an_empty_plan_warns(ranks: Ranks) -> None:
    twice, late, empty = ranks(2).run(refused_case)[0]
    assert "net1: it is parallelised already with style colwise" in twice
    assert "local_block sets up the modules inside it, and net1 is parallelised already" in late
    assert "plan nothing is empty" in empty
