"""Plans as data: read, print, match, and refuse what cannot work, with the fix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleInputOutput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
)

from colrow.errors import PlanError
from colrow.models.llama import Llama
from colrow.plans.plan import Plan
from colrow.styles.heads import Heads
from helpers.parity import MODELS, TINY


def meta(name: str = "gqa") -> Llama:
    with torch.device("meta"):
        return Llama(MODELS[name])


@pytest.mark.parametrize("preset", ["llama", "article"])
@pytest.mark.parametrize("loss", ["vocab_parallel", "replicated"])
def test_a_preset_survives_yaml(preset: str, loss: str) -> None:
    plan = Plan.preset(preset, loss)
    again = Plan.from_yaml(plan.to_yaml())
    assert again == plan
    assert list(again.modules) == list(plan.modules)  # order is kept


def test_the_yaml_of_the_design_is_the_preset() -> None:
    text = """
    name: mine
    loss: vocab_parallel
    modules:
      layers.*.self_attn: {style: prepare_input, input: [shard(1)], desired: [replicate]}
      layers.*.self_attn.q_proj: colwise
      lm_head: {style: colwise, input: shard(1), use_local_output: false}
    """
    plan, preset = Plan.from_yaml(text), Plan.preset("llama")
    assert all(preset.modules[key] == style for key, style in plan.modules.items())


def test_torch_styles_are_read_as_data_and_built_back() -> None:
    given = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "layers.*.input_layernorm": SequenceParallel(),
        "layers.*.self_attn": PrepareModuleInput(
            input_layouts=(Shard(1), None),
            desired_input_layouts=(Replicate(), None),
            input_kwarg_layouts={"mask": Replicate()},
            desired_input_kwarg_layouts={"mask": Shard(0)},
        ),
        "layers.*.self_attn.q_proj": ColwiseParallel(use_local_output=False),
        "layers.*.mlp": PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=Replicate()),
        "norm": PrepareModuleInputOutput(
            input_layouts=Shard(1),
            desired_input_layouts=Replicate(),
            use_local_input=True,
            output_layouts=Replicate(),
            desired_output_layouts=Shard(1),
            use_local_output=False,
        ),
    }
    plan = Plan(modules=given)
    assert Plan.from_yaml(plan.to_yaml()).modules == plan.modules
    from colrow.styles.site import Site

    for fqn, (key, style) in plan.resolve(meta()).items():
        built = style.build(Site(meta(), fqn, 2))
        assert isinstance(built, type(given[key]))  # on an embedding a subclass, with the same options
        assert repr(built).partition("(")[2] == repr(given[key]).partition("(")[2]


def test_a_style_of_ones_own_is_applied_and_not_saved() -> None:
    class Mine(ParallelStyle):
        def _apply(self, module: nn.Module, device_mesh: object) -> nn.Module:
            return module

    plan = Plan(modules={"norm": Mine()})
    with pytest.raises(PlanError, match="Mine is a style of your own"):
        plan.to_yaml()


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"layers.*.self_atn.q_proj": "colwise"}, r"matches no module; did you mean 'layers.\*.self_attn.q_proj'"),
        ({"lm_haed": "colwise"}, "matches no module; did you mean 'lm_head'"),
        ({"layers.9.mlp": "colwise"}, "matches no module"),
        ({"layers.*.mlp.up_proj": "colwise", "layers.0.mlp.*": "rowwise"}, "matches two keys"),
        ({"norm": "sequental"}, "norm: unknown style 'sequental'; did you mean 'sequence'"),
        ({"norm": {"style": "sequence", "seqence_dim": 2}}, "has no option 'seqence_dim'; did you mean 'sequence_dim'"),
        ({"norm": {"style": "colwise", "input": "shard"}}, r"unknown placement 'shard': write replicate, shard\(N\)"),
        ({"norm": 3}, "a style is a name or a mapping"),
        ({"self_attn": {"sequence_dim": 1}}, "a style is a name or a mapping with the key 'style'"),
    ],
)
def test_what_is_wrong_with_a_plan_is_named(modules: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(modules=modules).resolve(meta())  # type: ignore[arg-type]


def test_a_key_written_twice_is_refused() -> None:
    with pytest.raises(PlanError, match="'norm' stands twice"):
        Plan.from_yaml("modules:\n  norm: sequence\n  norm: colwise\n")


@pytest.mark.parametrize(
    ("change", "tp", "message"),
    [
        ({"num_attention_heads": 12}, 5, "n_heads=12 is not divisible by tp=5: choose tp from 1, 2, 3, 4, 6"),
        ({"intermediate_size": 98}, 4, "out_features=98 is not divisible by tp=4: choose tp from 1, 2"),
        ({"vocab_size": 9}, 4, "vocab_size=9 in 4 shards of 3 rows leaves a rank without rows: choose tp from 1, 2, 3"),
    ],
)
def test_sizes_that_do_not_divide_name_the_fix(change: dict[str, int], tp: int, message: str) -> None:
    with torch.device("meta"):
        model = Llama(replace(TINY, num_key_value_heads=4, **change))
    plan = Plan.preset("llama")
    if "vocab_size" not in change:
        plan = replace(plan, modules={k: v for k, v in plan.modules.items() if k != "embed_tokens"})
    with pytest.raises(PlanError, match=message):
        plan.check_shapes(model, tp)


def test_kv_heads_that_do_not_divide_name_the_style_that_helps() -> None:
    plan = Plan(modules={"layers.*.self_attn.k_proj": "colwise"})
    with pytest.raises(PlanError, match="n_kv_heads=3 is not divisible by tp=2: choose tp from 1, 3, or replicate"):
        plan.check_shapes(meta("kv3"), 2)
    Plan.preset("llama").check_shapes(meta("kv3"), 2)


@pytest.mark.parametrize(("query", "kv"), [(12, 3), (12, 1), (8, 2), (12, 4), (6, 6), (32, 8), (24, 3)])
@pytest.mark.parametrize("tp", [2, 3, 4, 6])
def test_every_query_head_meets_its_own_kv_head(query: int, kv: int, tp: int) -> None:
    if query % tp:
        return
    heads = Heads(query, kv, 4)
    per_rank = query // tp
    for rank in range(tp):
        local = heads.kv_heads_of_rank(tp, rank)
        assert per_rank % len(local) == 0
        serves = per_rank // len(local)
        for i in range(per_rank):  # what grouped-query attention over the local heads pairs
            assert local[i // serves] == (rank * per_rank + i) // (query // kv)


def test_parameters_say_placement_and_local_shape() -> None:
    layouts = Plan.preset("llama").parameters(meta("kv3"), 2)
    assert layouts.keys() == dict(meta("kv3").named_parameters()).keys()
    q, k = layouts["layers.0.self_attn.q_proj.weight"], layouts["layers.0.self_attn.k_proj.weight"]
    assert (q.placement, q.local_shape) == (Shard(0), (24, 48))
    assert (k.placement, k.local_shape) == (Replicate(), (12, 48))
    assert "n_kv_heads=3 not divisible by tp=2" in k.reason
    assert layouts["layers.1.mlp.down_proj.weight"].local_shape == (48, 48)
    left_out = Plan(modules={"norm": "sequence"}).parameters(meta(), 2)["lm_head.weight"]
    assert left_out.reason.startswith("not in the plan")


@pytest.mark.parametrize(
    ("style", "option"),
    [
        ({"style": "packed_rowwise", "segments": ["a"]}, "segments"),
        ({"style": "local_shards", "shards": 3}, "shards"),
        ({"style": "rowwise", "use_local_output": "maybe"}, "use_local_output"),
        ({"style": "sequence", "sequence_dim": "1"}, "sequence_dim"),
        ({"style": "fast_rowwise", "chunk_rows": "many"}, "chunk_rows"),
        ({"style": "fast_gather", "columns": {"q_proj": 1}}, "columns"),
        ({"style": "fast_gather", "columns": "q_proj"}, "columns"),
        ({"style": "fast_embedding", "all_tokens": "maybe"}, "all_tokens"),
        ({"style": "kv_replicate", "heads": 2.5}, "heads"),
    ],
)
def test_an_option_of_another_type_is_refused_where_it_stands(style: dict[str, Any], option: str) -> None:
    with pytest.raises(PlanError, match=rf"^layers\.\*\.mlp: style {style['style']}: option {option} cannot be"):
        Plan(modules={"layers.*.mlp": style})
