"""Losses that a model returns beside its logits are trained as one process with the same micro-batches does."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from colrow.checking.check import check
from colrow.config_sections import TrainSection
from colrow.derive.derivation import DeriveOptions, derive
from colrow.errors import ConfigError
from colrow.mesh import Mesh, MeshAxes
from colrow.models.build import Source
from colrow.models.llama import Llama
from colrow.models.shapes import SHAPES
from colrow.parallel.data_parallel import apply_data_parallel
from colrow.parallel.outputs import untrained_losses
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.layout import full_tensor
from colrow.train.objective import auxiliary_weights
from colrow.train.optimizer import build_optimizer, set_learning_rate
from colrow.train.schedule import learning_rate
from colrow.train.step import SingleStageModel, Step, mean_cross_entropy
from colrow.verifying.verify import parity
from helpers.balanced import WEIGHTS, Labelled, V, build
from helpers.harness import Ranks
from helpers.parity import relative
from helpers.variants import params

TOLERANCE = 1e-9
STEPS, MICRO, SIZE, LENGTH = 5, 2, 2, 8
SECTION = TrainSection(steps=STEPS, global_batch=1, micro_batch=SIZE, lr=1e-2, grad_clip=None)
CASES = {
    2: {"tp2": Mesh(tp=2), "shard2": Mesh(dp_shard=2), "replicate2": Mesh(dp_replicate=2)},
    4: {"tp4": Mesh(tp=4), "tp2-shard2": Mesh(tp=2, dp_shard=2)},
}

Batch = tuple[Tensor, Tensor]


def micro_batches(step: int, count: int) -> list[Batch]:
    """Those of all ranks."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(0, V, (count, SIZE, LENGTH + 1), generator=generator)
    return [(each[:, :-1], each[:, 1:]) for each in ids]


def reference(count: int, weights: dict[str, float] = WEIGHTS) -> tuple[list[dict[str, float]], Any, Any]:
    """Losses of each step, gradients of the first, and the last parameters, of one process."""
    model = build()
    optimizer = build_optimizer(list(model.parameters()), SECTION, set(model.parameters()))
    seen, gradients = [], {}
    for step in range(STEPS):
        sums = dict.fromkeys(("loss", *weights), 0.0)
        for ids, targets in micro_batches(step, count):
            out = model(ids)
            loss = mean_cross_entropy(out["logits"], targets) + sum(w * out[name] for name, w in weights.items())
            (loss / count).backward()
            for name, value in (("loss", loss), *((name, out[name]) for name in weights)):
                sums[name] += value.item() / count
        seen.append(sums)
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        set_learning_rate(optimizer, learning_rate(step, SECTION))
        optimizer.step()
        optimizer.zero_grad()
    return seen, gradients, {name: param.detach() for name, param in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    return (full_tensor(tensor.detach()) if isinstance(tensor, DTensor) else tensor.detach()).cpu()


def train_case(device: str, mesh: Mesh, plan: str, form: str = "mapping") -> dict[str, float]:
    """Relative errors of losses, first gradients and last parameters against one process."""
    device_mesh = mesh.build(device, dist.get_world_size())
    axes, names = MeshAxes(device_mesh), WEIGHTS if form != "tuple" else {"output_1": 0.5, "output_2": 0.03}
    model: nn.Module = build(form).to(device)
    parallel = Plan.from_yaml(plan)
    parallelize(model, parallel, device_mesh)
    apply_data_parallel(model, device_mesh, model.blocks, param_dtype=None)
    runner = SingleStageModel(model, parallel, device_mesh, torch.device(device), auxiliary=names)
    weights = list(model.parameters())
    step = Step(runner, weights, weights, build_optimizer(weights, SECTION, set(weights)), axes.norm_groups(), SECTION)
    count = MICRO * mesh.dp
    want, gradients, parameters = reference(count)
    errors: dict[str, float] = {}
    taken: dict[str, Tensor] = {}
    update = step._run_update

    def keep_gradients() -> Tensor:
        norm = update()
        for name, param in model.named_parameters():
            if param.grad is not None:
                taken.setdefault(name, whole(param.grad))
        return norm

    step._run_update = keep_gradients
    for number in range(STEPS):
        mine = micro_batches(number, count)[axes.data_rank * MICRO : (axes.data_rank + 1) * MICRO]
        loss, _ = step(number, [(ids.to(device), targets.to(device)) for ids, targets in mine])
        values = torch.stack([loss.double(), *(value.double() for value in runner.auxiliary.values())])
        values = values * axes.loss_weight
        dist.all_reduce(values)
        for name, got, expected in zip(("loss", *WEIGHTS), values.tolist(), want[number].values(), strict=True):
            errors[f"{name} {number}"] = abs(got - expected) / abs(expected)
    assert taken.keys() == gradients.keys()
    errors |= {f"grad {name}": relative(got, gradients[name]) for name, got in taken.items()}
    errors |= {f"step {name}": relative(whole(p), parameters[name]) for name, p in model.named_parameters()}
    return errors


@functools.cache
def derived(tp: int) -> str:
    if tp == 1:
        return Plan({}, "replicated").to_yaml()
    plan = derive(build(dtype=torch.float32), tp, options=DeriveOptions()).plan()
    assert plan.modules["blocks.*.moe"].used_outside == (1,)
    assert plan.sequence_parallel()
    return str(plan.to_yaml())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "name"),
    params([(world, name) for world, cases in CASES.items() for name in cases], lambda world, name: world == 4),
)
def test_a_mesh_trains_what_one_process_trains(ranks: Ranks, world: int, name: str) -> None:
    mesh = CASES[world][name]
    form = {"shard2": "tuple", "replicate2": "dataclass"}.get(name, "mapping")
    for errors in ranks(world).run(train_case, mesh, derived(mesh.tp), form):
        assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


@pytest.mark.exhaustive
def test_a_derived_plan_is_proved_and_one_without_the_mark_is_found_wrong() -> None:
    model, plan = build(), Plan.from_yaml(derived(2))
    ids = micro_batches(0, 1)[0][0]
    assert parity(model, plan, 2, (ids,)).worst < TOLERANCE
    assert check(model, plan, Mesh(tp=2), seq_len=LENGTH) == []
    unmarked = Plan.from_yaml(derived(2).replace("used_outside: [1]", "used_outside: []"))
    assert parity(model, unmarked, 2, (ids,)).worst > 1e-3
    assert {finding.code for finding in check(model, unmarked, Mesh(tp=2), seq_len=LENGTH)} == {"CR414"}


def test_the_weights_are_those_of_the_model_s_own_loss() -> None:
    assert auxiliary_weights(Source(Labelled(), "model", None, "built"), None) == WEIGHTS
    assert auxiliary_weights(Source(Labelled(), "model", None, "built"), {"balance": 2.0}) == {"balance": 2.0}
    assert auxiliary_weights(Source(build(dtype=torch.float32), "model", None, "built"), None) == {}


def test_a_weight_of_a_loss_that_no_model_returns_is_refused_before_the_ranks_start() -> None:
    with pytest.raises(
        ConfigError, match=r"has a weight for z, and model returns no such scalar: it returns .*balance"
    ):
        auxiliary_weights(Source(Labelled(), "model", None, "built"), {"balance": 2.0, "z": 1.0})
    with torch.device("meta"):
        llama = Source(Llama(SHAPES["laptop"]), "laptop", SHAPES["laptop"], "seeded")
    with pytest.raises(ConfigError, match=r"it returns none: set train.auxiliary_losses to \{\}$"):
        auxiliary_weights(llama, {"z": 1.0})


def test_an_option_that_changes_the_loss_is_refused() -> None:
    smoothed = Source(Labelled(smoothing=0.2), "smoothed", None, "built")
    with pytest.raises(ConfigError, match=r"loss of smoothed with labels is another .* 0\.5 balance \+ 0\.03 router_z"):
        auxiliary_weights(smoothed, None)
    assert auxiliary_weights(smoothed, {}) == {}


def test_a_loss_that_is_not_trained_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan({}, "replicated")
    batches = micro_batches(0, 1)
    monkeypatch.setattr("colrow.parallel.loss.tp_degree", lambda mesh: 1)
    runner = SingleStageModel(build(), plan, None, torch.device("cpu"), auxiliary={"balance": 1.0})  # type: ignore[arg-type]
    runner(batches)
    assert runner.untrained == ("router_z",)
    missing = SingleStageModel(build(), plan, None, torch.device("cpu"), auxiliary={"aux": 1.0})  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match="a weight for aux, and Balanced returns no such scalar: it returns balance, r"
    ):
        missing(batches)


def test_losses_by_layer_are_named_too() -> None:
    scalar, by_layer = torch.ones((), requires_grad=True), torch.ones(3, requires_grad=True)
    output = {
        "logits": by_layer[None],
        "balance": scalar,
        "router_losses": by_layer,
        "states": (by_layer * 2, scalar * 2),
    }
    assert untrained_losses(output, {"balance": 1.0}) == ("router_losses", "states.output_1")
    assert untrained_losses({"logits": by_layer[None], "router_losses": by_layer.detach()}, {}) == ()
    assert untrained_losses(SimpleNamespace(logits=by_layer[None], balance=by_layer.sum()), {}) == ("balance",)
