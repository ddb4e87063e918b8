"""Ways in which models of other packages are written: what is split of each, and parity in fp64 on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.models.foreign.trained import losses
from colrow.checking.check import check
from colrow.derive.blocks import BlockFinder
from colrow.derive.derivation import derive
from colrow.derive.flow import Flows
from colrow.derive.reads import record_reads
from colrow.dryrun.calls import Inputs, default_loss
from colrow.mesh import Mesh
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.verifying.verify import parity
from helpers import ways_of_code
from helpers.harness import Ranks
from helpers.variants import params
from helpers.ways_of_code import (
    SPLIT,
    D,
    HeadBias,
    Latents,
    Mlp,
    Rotary,
    Scaled,
    Tied,
    TiedBias,
    X,
    generator,
    inputs_of,
)

TOLERANCE = 1e-9


def derived(build: Callable[[], nn.Module]) -> tuple[set[str], list[str], float]:
    """What is split, the check's errors, and the worst error of loss and gradients on two ranks."""
    torch.manual_seed(0)
    model = build().double()
    inputs = inputs_of(build)
    found = derive(model, 2, inputs=inputs)
    findings = check(model, found.plan(), Mesh(tp=2), inputs=inputs)
    errors = [str(f) for f in findings if f.severity == "error"]
    return set(found.sharded), errors, parity(model, found.plan(), 2, inputs).worst if not errors else 1.0


@pytest.mark.parametrize("build", params(SPLIT, exhaustive=lambda build: build is not Rotary))
def test_it_is_split_and_computes_the_same(build: Callable[[], nn.Module]) -> None:
    sharded, errors, worst = derived(build)
    assert errors == []
    assert sharded >= SPLIT[build]
    assert worst < TOLERANCE


@pytest.mark.parametrize("tp", params([2, 4], exhaustive=lambda tp: tp == 4))
def test_a_product_with_the_embeddings_weight_is_a_head(tp: int) -> None:
    torch.manual_seed(0)
    model, ids = Tied().double(), inputs_of(Tied)
    found = derive(model, tp, inputs=ids)
    assert found.sequence_parallel
    assert "embed.weight" in found.sharded
    plan = Plan.from_yaml(found.plan().to_yaml())
    assert not [f for f in check(model, plan, Mesh(tp=tp), inputs=ids) if f.severity == "error"]
    assert parity(model, plan, tp, ids).worst < TOLERANCE
    broken = replace(plan, modules=plan.modules | {"norm": replace(plan.modules["norm"], input=None)})
    assert parity(model, broken, tp, ids).worst > 1e-3


def test_a_vocabulary_that_does_not_divide_is_no_head_of_a_product() -> None:
    found = derive(Tied(), 3, inputs=(torch.zeros(2, 9, dtype=torch.int64),))
    assert "the logits are a linear in the model, and tp=3 does not divide their 20" in found.replicated["embed.weight"]


def test_a_bias_that_the_head_holds_for_its_decoder_is_split_with_the_vocabulary() -> None:
    torch.manual_seed(0)
    model, ids = TiedBias().double(), inputs_of(TiedBias)
    found = derive(model, 2, inputs=ids)
    assert {"embed.weight", "head.bias"} <= {*found.sharded}
    plan = found.plan()
    assert check(model, plan, Mesh(tp=2), inputs=ids) == []
    assert parity(model, plan, 2, ids).worst < TOLERANCE
    torn = replace(plan, modules={key: style for key, style in plan.modules.items() if key != "head"})
    assert [f.code for f in check(model, torn, Mesh(tp=2), inputs=ids)] == ["CR304"]


@pytest.mark.exhaustive
def test_a_norm_of_latents_without_its_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Flows.run

    def without_sums(self: Flows, *given: object) -> object:
        flow = run(self, *given)  # type: ignore[arg-type]
        flow.summed = {name for name in flow.summed if "norm" not in name}
        return flow

    monkeypatch.setattr(Flows, "run", without_sums)
    _, errors, _ = derived(Latents)
    assert any("CR501" in error for error in errors)


@pytest.mark.exhaustive
def test_a_block_around_a_layers_scale_is_no_block(monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = BlockFinder.attempt
    tried: list[str] = []

    def watched(self: BlockFinder, module: str, *given: object) -> object:
        found = attempt(self, module, *given)  # type: ignore[arg-type]
        tried.extend([module] if found is None else [])
        return found

    monkeypatch.setattr(BlockFinder, "attempt", watched)
    derived(Scaled)
    assert "block" in tried


def twenty_steps(device: str, name: str, plan: str) -> list[float]:
    """The losses of a model by its class's name, on this rank."""
    torch.manual_seed(0)
    model, made = vars(ways_of_code)[name]().double().train(), Plan.from_yaml(plan)
    mesh = init_device_mesh(device, (2,), mesh_dim_names=("tp",))
    parallelize(model.to(device), made, mesh)
    inputs = Inputs.of(inputs_of(vars(ways_of_code)[name])).map(lambda x: x.to(device))
    return losses(model, inputs, made, mesh)


@pytest.mark.distributed
@pytest.mark.exhaustive
def test_three_of_them_train_twenty_steps_as_one_process_does(ranks: Ranks) -> None:
    for build in (Latents, HeadBias, Tied):
        torch.manual_seed(0)
        model = build().double().train()
        plan = derive(model, 2, inputs=inputs_of(build)).plan()
        alone = losses(model, Inputs.of(inputs_of(build)), None, None)
        for found in ranks(2).run(twenty_steps, build.__name__, plan.to_yaml()):
            assert found == pytest.approx(alone, rel=1e-12)
        if build is Latents:
            styles = {key: style for key, style in plan.modules.items() if key != "cross.norm"}
            for found in ranks(2).run(twenty_steps, build.__name__, replace(plan, modules=styles).to_yaml()):
                assert found != pytest.approx(alone, rel=1e-6)


def test_a_number_that_is_computed_is_not_taken_for_an_attribute() -> None:
    class Strided(nn.Linear):
        @property
        def stride(self) -> int:
            return 8

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[..., :: self.stride] * self.in_features

    module, found = Strided(16, 16), dict[tuple[str, str], int]()
    record_reads("it", module, found)
    module(X.float())
    assert ("it", "in_features") in found
    assert ("it", "stride") not in found


def test_a_decoder_of_another_length_has_no_next_token_loss() -> None:
    logits = torch.randn(2, 3, 20, generator=generator())
    other, same = torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long)
    assert default_loss(logits, (same,)).item() == pytest.approx(
        F.cross_entropy(logits.flatten(0, 1), same.flatten()).item()
    )
    assert default_loss(logits, (other,)).item() == default_loss(logits, (X,)).item()


def test_what_the_model_itself_holds_is_not_split() -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.first, self.last = Mlp(), nn.Linear(D, 2 * D), nn.Linear(2 * D, 5)
            self.scale = nn.Parameter(torch.randn(2 * D))

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x + self.mlp(x)) * self.scale)

    found = derive(Rooted(), 2, inputs=(X.float(),))
    assert {*found.sharded} == {"mlp.up.weight", "mlp.up.bias", "mlp.down.weight"}
    assert "the model itself holds scale, and styles split what its modules hold" in found.replicated["first.weight"]
