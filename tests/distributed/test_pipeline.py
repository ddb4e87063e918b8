"""Stages and data parallelism as mechanisms: what is cut, what is communicated, what is computed in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from colrow.errors import ConfigError, PlanError
from colrow.mesh import Mesh
from colrow.parallel.data_parallel import apply_data_parallel, set_last_micro_batch
from colrow.parallel.parallelize import parallelize
from colrow.parallel.pipeline import PipelineOptions, PipelineRunner
from colrow.parallel.pipeline_stage import split_stages
from colrow.plans.plan import Plan
from helpers.harness import Ranks
from helpers.parity import batch, build, cross_entropy

pytestmark = pytest.mark.distributed


def split_case(device: str) -> dict[str, Any]:
    model = build("deep_tied", device)
    before = {name: id(param) for name, param in model.named_parameters()}
    mesh = Mesh(pp=2).build(device, 2)
    stages = split_stages(model, mesh, (1, 2, 3))
    assert {name: id(param) for name, param in model.named_parameters()} == before, "the model stays whole"
    refused = []
    for bad in (lambda: split_stages(nn.Linear(2, 2), mesh, (1,)), lambda: split_stages(model, mesh, (1, 2))):
        try:
            bad()
        except ConfigError as error:
            refused.append(str(error))
    return {
        "names": [[name for name, _ in stage.module.named_parameters()] for stage in stages],
        "index": [stage.index for stage in stages],
        "absent": [sorted(name for name in stage.absent if name.count(".") <= 1) for stage in stages],
        "copies": [stage.copies for stage in stages],
        "refused": refused,
    }


def test_stages_hold_their_layers_under_the_whole_models_names(ranks: Ranks) -> None:
    first, second = ranks(2).run(split_case)
    assert first["index"] == [0, 2]
    assert second["index"] == [1, 3]
    assert {name.rsplit(".", 2)[0][:8] for name in first["names"][1]} == {"layers.2"}
    assert first["names"][0][0] == "embed_tokens.weight"
    assert {"norm.weight", "lm_head.weight"} <= set(second["names"][1])
    assert first["absent"][0] == ["layers.1", "layers.2", "layers.3", "lm_head", "norm"]
    assert first["copies"] == [{}, {}]
    assert second["copies"] == [{}, {"lm_head.weight": "embed_tokens.weight"}]
    assert "set mesh.pp to 1" in first["refused"][0]
    assert "pp=2 does not divide 3 stages" in first["refused"][1]


def absent_case(device: str) -> list[str]:
    """A plan's key that matches no module of the whole model is an error on a stage too."""
    plan = Plan.preset("llama")
    wrong = Plan(modules={**plan.modules, "layers.*.self_attn.o_prj": "rowwise"}, loss=plan.loss)
    mesh = Mesh(pp=2).build(device, 2)
    reported = []
    for stage in split_stages(build("gqa", device), mesh, (1,)):
        for candidate, absent in ((plan, stage.absent), (plan, ()), (wrong, stage.absent)):
            try:
                candidate.resolve(stage.module, absent)
                reported.append("fits")
            except PlanError as error:
                reported.append(str(error))
    return reported


def test_only_keys_of_absent_modules_may_match_nothing(ranks: Ranks) -> None:
    for fits, without, wrong in ranks(2).run(absent_case):
        assert fits == "fits"
        assert "matches no module" in without
        assert "o_prj" in wrong


class Collectives(TorchDispatchMode):
    """Counts collectives by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = {"gather": 0, "scatter": 0, "reduce": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            for kind, names in {"gather": "allgather", "scatter": "reduce_scatter", "reduce": "allreduce_"}.items():
                self.counts[kind] += names in func.name()
        return func(*args, **(kwargs or {}))


def communication_case(device: str, reshard: bool, shards: int) -> dict[str, int]:
    """Collectives over the data axis in two micro-batches."""
    mesh = Mesh(dp_shard=shards, dp_replicate=2 // shards).build(device, 2)
    model = build("gqa", device)
    apply_data_parallel(model, mesh, list(model.layers), param_dtype=None, reshard_after_forward=reshard)
    ids, targets = batch(device)
    with Collectives() as found:
        for last in (False, True):
            set_last_micro_batch(model, last)
            cross_entropy(model(ids), targets).backward()
    return dict(found.counts)


@pytest.mark.parametrize(
    ("reshard", "shards", "want"),
    [
        # four units: two blocks, norm and head, the root. Only blocks are gathered again for backward. One all-reduce
        # more than gradients need: a flag for each parameter, whether any rank used it.
        (True, 2, {"gather": 2 * (4 + 2), "scatter": 4, "reduce": 1}),
        (False, 2, {"gather": 4, "scatter": 4, "reduce": 1}),
        (True, 1, {"gather": 0, "scatter": 0, "reduce": 4 + 1}),
    ],
)
def test_gradients_cross_the_data_axis_once_a_step(
    ranks: Ranks, reshard: bool, shards: int, want: dict[str, int]
) -> None:
    for found in ranks(2).run(communication_case, reshard, shards):
        assert found == want


def mixed_case(device: str) -> dict[str, Any]:
    """bf16 compute in a pipeline over fp32 weights, with a data axis of one rank."""
    reference = build("gqa", device, torch.float32)
    ids, targets = batch(device)
    want = cross_entropy(reference(ids), targets).item()
    mesh, plan = Mesh(pp=2).build(device, 2), Plan.preset("llama")
    seen: dict[str, Any] = {}

    stages = split_stages(reference, mesh, (1,))
    for stage in stages:
        parallelize(stage.module, plan, mesh, absent=stage.absent)
        apply_data_parallel(stage.module, mesh, stage.blocks, param_dtype=torch.bfloat16)
        stage.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0].dtype))

    runner = PipelineRunner(
        stages,
        plan,
        mesh,
        lambda logits, targets: cross_entropy(logits.float(), targets),
        PipelineOptions("1f1b", micro_batches=2, micro_batch_size=2, seq_len=16, dtype=torch.bfloat16),
    )
    first = runner.evaluate(ids, targets)
    loss = runner.forward_backward(ids, targets)
    second = runner.evaluate(ids, targets)
    reported = ""
    try:
        runner.forward_backward(ids[:2], targets[:2])
    except ConfigError as error:
        reported = str(error)
    return {
        "loss": [abs(value.item() / want - 1) for value in (first, loss, second)],
        "hidden": seen["hidden"],
        "params": {param.dtype for param in runner.parameters()},
        "grads": {param.grad.dtype for param in runner.parameters() if param.grad is not None},
        "refused": reported,
    }


def test_a_pipeline_computes_in_bf16_over_fp32_weights(ranks: Ranks) -> None:
    for result in ranks(2).run(mixed_case):
        assert max(result["loss"]) < 0.02
        assert min(result["loss"]) > 0.0  # rounded, so bf16 it was
        assert result["hidden"] == torch.bfloat16
        assert result["params"] == result["grads"] == {torch.float32}
        assert "give it (4, 16)" in result["refused"]
