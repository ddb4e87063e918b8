"""The fast styles: compiled, checkpointed and under FSDP2 they give one process's gradients, with the fewest
collectives; and where the fast path cannot run, nothing else runs in its place."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from colrow.errors import PlanError
from colrow.mesh import Mesh
from colrow.ops import products
from colrow.parallel.loss import loss_context, model_loss
from colrow.parallel.parallelize import parallelize
from colrow.plans.plan import Plan
from colrow.sharding.grad_norm import align_gradients
from helpers.fsdp_parity import fsdp_case
from helpers.harness import Ranks
from helpers.mesh_parity import Case, run_cases
from helpers.parity import MODELS, batch, build, cross_entropy, relative, tp_mesh, whole

TOLERANCE = 1e-10
SLOW = 400.0  # seconds: compilation on a busy machine


def gather_again(plan: Plan, **options: Any) -> Plan:
    """The plan with inputs gathered again in backward."""
    modules = {
        key: replace(style, keep_gathered=False, **options) if style.name == "fast_gather" else style  # type: ignore[call-arg]
        for key, style in plan.modules.items()
    }
    return replace(plan, modules=modules)


def in_chunks(plan: Plan) -> Plan:
    """The plan with every collective of its blocks in chunks, which the process group carries."""
    modules = {
        key: replace(style, overlap="point_to_point", chunk_rows=1) if hasattr(style, "overlap") else style  # type: ignore[call-arg]
        for key, style in plan.modules.items()
    }
    return replace(plan, modules=modules)


def compiled(block: nn.Module) -> None:
    block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)  # type: ignore[method-assign]


def checkpointed(block: nn.Module) -> None:
    block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def step(model: nn.Module, plan: Plan, mesh: DeviceMesh, device: str) -> torch.Tensor:
    ids, targets = batch(device)
    with loss_context(plan, mesh):
        loss = model_loss(model, plan, mesh, ids, targets)
        loss.backward()
    return loss.detach()


def errors_of(
    device: str, name: str, plan: Plan, mesh: DeviceMesh, *changes: Callable[[nn.Module], None]
) -> dict[str, float]:
    reference = build(name, device)
    model = parallelize(copy.deepcopy(reference), plan, mesh)
    for change in changes:
        for block in model.layers:
            change(block)
    loss = step(model, plan, mesh, device)
    align_gradients(model.parameters())
    ids, targets = batch(device)
    want = cross_entropy(reference(ids), targets)
    want.backward()
    expected = dict(reference.named_parameters())
    errors = {name: relative(whole(p.grad), expected[name].grad) for name, p in model.named_parameters()}
    return {"loss": relative(whole(loss), want.detach()), **errors}


def variants_case(device: str) -> dict[str, dict[str, float]]:
    """Two layers once without and once with compilation; one shows what the others differ in."""
    mesh = tp_mesh(device, 2)
    plan = Plan.preset("llama-fast", "linear")
    found = {
        "gathered again": errors_of(device, "gqa", gather_again(plan), mesh),
        "one after the other": errors_of(device, "gqa-1", gather_again(plan, overlap="none"), mesh),
        "in chunks": errors_of(device, "kv3-1", in_chunks(plan), mesh),
        "checkpointed": errors_of(device, "qk_norm-1", plan, mesh, checkpointed),
        "checkpointed, gathered again": errors_of(device, "gqa-1", gather_again(plan), mesh, checkpointed),
    }
    narrow, products.NARROW = products.NARROW, 1
    found["large siblings"] = errors_of(device, "gqa-1", plan, mesh)  # products of their own
    products.NARROW = narrow
    for name in ("bias", "qk_norm_kv3-1"):
        found[f"compiled {name}"] = errors_of(device, name, plan, mesh, compiled)
    found["compiled, in chunks"] = errors_of(device, "gqa-1", in_chunks(gather_again(plan)), mesh, compiled)
    found["compiled, checkpointed"] = errors_of(device, "gqa-1", plan, mesh, compiled, checkpointed)
    torch._dynamo.reset()
    return found


@pytest.mark.exhaustive
@pytest.mark.distributed
def test_variants_give_one_process_gradients(ranks: Ranks) -> None:
    for found in ranks(2).run(variants_case, timeout=SLOW):
        for variant, errors in found.items():
            assert max(errors.values()) < TOLERANCE, (variant, errors)


def compilations_case(device: str) -> int:
    """Graphs that torch.compile makes for four equal layers whose parameters are seen through views."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    mesh, plan, model = tp_mesh(device, 2), Plan.preset("llama-fast", "linear"), build("qk_norm_kv3", device)
    model.layers.extend(copy.deepcopy(layer) for layer in list(model.layers))
    parallelize(model, plan, mesh)
    for block in model.layers:
        compiled(block)
    step(model, plan, mesh, device)
    graphs: int = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return graphs


@pytest.mark.distributed
def test_equal_layers_are_compiled_once(ranks: Ranks) -> None:
    assert ranks(2).run(compilations_case, timeout=SLOW) == [1, 1]


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["tied", "qk_norm_kv3"])
def test_gradients_under_fsdp_and_accumulation(ranks: Ranks, name: str) -> None:
    for errors in ranks(4).run(fsdp_case, {"tp": 2, "dp_shard": 2}, name, "llama-fast", 2):
        assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


ON_STAGES = {  # `test_every_mesh` has llama-fast on pp 2 × tp 2
    f"{preset} {name} {mesh}": Case(mesh, name, micro=4, preset=preset, loss="linear")
    for preset, name, mesh in [
        ("llama", "tied", Mesh(pp=2, tp=2)),
        ("llama-fast", "gqa", Mesh(pp=2, dp_shard=2)),
    ]
}


@pytest.mark.distributed
def test_pipeline_stages_give_one_process_gradients(ranks: Ranks) -> None:
    for results in ranks(4).run(run_cases, ON_STAGES, timeout=SLOW):
        for name, result in results.items():
            assert result.worst[1] < TOLERANCE, (name, result.worst)


def collectives_case(device: str, again: bool) -> list[Counter[str]]:
    """Collectives of forward and backward with one layer, and with two."""
    mesh, counts = tp_mesh(device, 2), []
    plan = Plan.preset("llama-fast", "linear")
    for layers in (1, 2):
        model = build("gqa", device)
        del model.layers[layers:]
        parallelize(model, gather_again(plan) if again else plan, mesh)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            step(model, plan, mesh, device)
        counts.append(Counter(e.name for e in profiler.events() if e.name.startswith("c10d::")))
    return counts


@pytest.mark.distributed
@pytest.mark.parametrize("again", [False, True], ids=["kept", "gathered again"])
def test_four_gathers_and_four_scatters_a_layer(ranks: Ranks, again: bool) -> None:
    for one, two in ranks(2).run(collectives_case, again):
        a_layer = two - one
        gathers = sum(n for name, n in a_layer.items() if "allgather" in name)
        scatters = sum(n for name, n in a_layer.items() if "reduce_scatter" in name)
        assert (gathers, scatters) == (6 if again else 4, 4)
        assert sum(a_layer.values()) == gathers + scatters, a_layer
        # The embedding's gradient, the head's input, one chunk's statistics; the embedding, the head's gradient.
        assert sum(n for name, n in one.items() if "allgather" in name) == gathers + 3
        assert sum(n for name, n in one.items() if "reduce_scatter" in name) == scatters + 2


def no_gather_case(device: str) -> str:
    mesh = tp_mesh(device, 2)
    plan = Plan.preset("llama-fast")
    without = replace(plan, modules={k: v for k, v in plan.modules.items() if k != "layers.*.mlp"})
    model = parallelize(build("gqa", device), without, mesh)
    with pytest.raises(PlanError) as error:
        model(batch(device)[0])
    return str(error.value)


@pytest.mark.distributed
def test_a_fast_column_without_its_gather_raises(ranks: Ranks) -> None:
    for reported in ranks(2).run(no_gather_case):
        assert "gate_proj" in reported
        assert "fast_gather" in reported


@pytest.mark.parametrize(
    ("key", "style"),
    [
        ("embed_tokens", {"style": "rowwise", "input": "replicate", "output": "shard(1)"}),
        ("norm", "sequence"),
        ("lm_head", "linear_head"),
        ("layers.*.mlp", {"style": "prepare_input", "input": ["shard(1)"], "desired": ["replicate"]}),
    ],
)
def test_tokens_in_two_orders_are_refused(key: str, style: Any) -> None:
    plan = Plan.preset("llama-fast", "linear")
    mixed = replace(plan, modules={**plan.modules, key: style})
    with pytest.raises(PlanError, match="tokens would be confused"):
        mixed.check_shapes(build("gqa", "cpu"), 2)


@pytest.mark.parametrize(("columns", "text"), [((), "needs the option columns"), (("gate",), "no linear child")])
def test_a_gather_names_its_columns(columns: tuple[str, ...], text: str) -> None:
    plan = Plan(modules={"layers.*.mlp": {"style": "fast_gather", "columns": list(columns)}})
    with pytest.raises(PlanError, match=text):
        plan.check_shapes(build("gqa", "cpu"), 2)


@pytest.mark.parametrize("loss", ["vocab_parallel", "replicated", "linear"])
@pytest.mark.parametrize("preset", ["llama-fast", "llama-overlap"])
def test_the_preset_is_data(preset: str, loss: Any) -> None:
    plan = Plan.preset(preset, loss)
    assert Plan.from_yaml(plan.to_yaml()) == plan
    assert plan.sequence_parallel()


@pytest.mark.parametrize("name", MODELS)
def test_parameters_lie_as_under_the_plain_preset(name: str) -> None:
    """So that checkpoints of one load under the other."""
    model = build(name, "cpu")
    fast, plain = (Plan.preset(preset, "vocab_parallel").parameters(model, 2) for preset in ("llama-fast", "llama"))
    assert {k: (v.placement, v.local_shape) for k, v in fast.items()} == {
        k: (v.placement, v.local_shape) for k, v in plain.items()
    }
