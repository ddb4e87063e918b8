"""Models of transformers in a forecast: compiled at tp 4, attention without a mask, no GPU touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colrow.dryrun.block_kinds import BlockTraces
from colrow.forecasting import walk as walking
from colrow.forecasting.walk import Cell, Walk, walk
from colrow.forecasting.work import NARROW_HEADS
from colrow.plans.plan import Plan

TOKENS, HEADS, HEAD = 128, 8, 32
PLAN = """
name: by hand
loss: vocab_parallel
modules:
  model.embed_tokens: {style: rowwise, input: replicate, output: replicate}
  model.layers.0: {style: prepare_input, input: [replicate], desired: [shard(1)], use_local_output: true}
  model.layers.*.self_attn:
    {style: prepare_input, input_kwargs: {hidden_states: shard(1)}, desired_kwargs: {hidden_states: replicate}}
  model.layers.*.self_attn.q_proj: colwise
  model.layers.*.self_attn.k_proj: colwise
  model.layers.*.self_attn.v_proj: colwise
  model.layers.*.self_attn.o_proj: {style: rowwise, output: shard(1)}
  model.layers.*.self_attn.q_norm: grad_sum
  model.layers.*.self_attn.k_norm: grad_sum
  model.layers.*.mlp: {style: prepare_input, input: [shard(1)], desired: [replicate]}
  model.layers.*.mlp.gate_proj: colwise
  model.layers.*.mlp.up_proj: colwise
  model.layers.*.mlp.down_proj: {style: rowwise, output: shard(1)}
  model.layers.*.input_layernorm: {style: sequence, use_local_output: true}
  model.layers.*.post_attention_layernorm: {style: sequence, use_local_output: true}
  model.norm: {style: sequence, use_local_output: true}
  lm_head: {style: colwise, input: shard(1), use_local_output: false}
"""


def of_qwen3(cell: Cell) -> Walk:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen3Config(
        vocab_size=512, hidden_size=TOKENS, num_hidden_layers=2, num_attention_heads=HEADS, num_key_value_heads=4,
        head_dim=HEAD, intermediate_size=256, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.Qwen3ForCausalLM(config)
    return walk(model, Plan.from_yaml(PLAN), cell, BlockTraces())


def attention(walked: Walk) -> float:
    """FLOPs of a block's forward, as shares of its full square of scores on this rank."""
    (block,) = {s.work.attention_forward for s in walked.segments if s.block and not s.backward}
    return block / (4.0 * HEADS // walked.cell.tp * TOKENS**2 * HEAD)


@pytest.mark.exhaustive
def test_compiled_blocks_at_tp_4_touch_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: touched.append("random state"))
    # 128 tokens of 128 numbers: sizes that are equal are those that a symbol would stand for
    assert attention(of_qwen3(Cell(4, 1, TOKENS))) > 0
    assert not touched
    assert torch.cuda.is_available()  # put back


def test_a_row_of_one_document_has_causal_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(2, 1, TOKENS, compiled=False)
    causal = attention(of_qwen3(cell))
    monkeypatch.setattr(walking, "_one_document", lambda: walking.nullcontext())
    masked: Any = attention(of_qwen3(cell))
    assert masked == pytest.approx((128 / HEAD) ** NARROW_HEADS)
    assert causal != pytest.approx(masked)
