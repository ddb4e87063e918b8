"""The forecast of a rank's memory: extrapolated from two blocks, by parts, and beside what was measured."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.forecasting.memory import GIB, WORKSPACES, Setting, _StagePeak, peak_memory, stages_of
from colrow.forecasting.storages import LiveStorages
from colrow.forecasting.walk import HEAD, ROOT, Cell, Walk, _flash_attention, applies_on_data_axes, walk
from colrow.mesh import Mesh
from colrow.models.llama import Llama, LlamaConfig
from colrow.models.shapes import SHAPES
from colrow.plans.plan import Plan
from colrow.torch_compat import fake_tensors

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=192,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    rope_theta=1_000.0,
)
EAGER = Cell(tp=2, micro_batch=2, seq_len=128, compiled=False)


def meta(config: LlamaConfig = CONFIG, kind: type[Llama] = Llama) -> Llama:
    with torch.device("meta"):
        return kind(config)


@pytest.fixture(scope="module")
def walked() -> Walk:
    return walk(meta(), Plan.preset("llama"), EAGER)


@pytest.mark.parametrize(
    ("plan", "loss", "recompute"), [("llama", "vocab_parallel", "none"), ("llama-fast", "linear", "full")]
)
def test_two_blocks_tell_the_peak_of_five(plan: Any, loss: Any, recompute: Any) -> None:
    cell = replace(EAGER, recompute=recompute)
    two, five = (walk(meta(), Plan.preset(plan, loss), cell, keep=keep) for keep in (2, 5))
    assert sum(two.repeats.values()) == sum(five.repeats.values()) == 5
    setting = Setting(mesh=Mesh(tp=2))
    assert peak_memory(two, setting).allocated == pytest.approx(peak_memory(five, setting).allocated, rel=1e-3)
    fewer = replace(two, repeats=dict.fromkeys(two.order, 1))
    assert (
        peak_memory(fewer, setting).allocated
        < 0.8 * peak_memory(five, setting).allocated - 0.8 * WORKSPACES + WORKSPACES
    )


def test_only_what_a_rank_allocates_is_counted(walked: Walk) -> None:
    """No view of a parameter, and no tensor of the unsharded size, by which DTensor propagates shapes."""
    tokens, D = EAGER.micro_batch * EAGER.seq_len, CONFIG.hidden_size
    first = walked.segments[0].change.activations
    rope = 2 * EAGER.seq_len * CONFIG.head_dim // 2 * 2  # cos and sin
    positions = 8 * EAGER.seq_len
    ids = 2 * 8 * tokens
    embedded = tokens * D * 2 // EAGER.tp
    assert first <= embedded + rope + positions + ids + 4096
    assert walked.boundary == embedded


def test_a_fused_kernel_holds_what_it_reads_until_it_has_written() -> None:
    """Only an output of the size of an input that nothing else reads takes its place; slices put together do not."""
    n = 64
    unit = 4 * n * n

    def peak(step: Any, *, fused: bool = True) -> float:
        with fake_tensors():
            x = torch.empty(n, n)
            storages = LiveStorages([x], fused=fused)
            with storages:
                storages.begin("block", backward=False)
                step(x)
            return storages.finish()[-1].peak.total / unit

    def joined(x: Tensor) -> None:
        both = torch.cat([(x @ x).neg(), (x @ x).neg()])
        both @ x

    def in_place(x: Tensor) -> None:
        y = (x @ x).neg()
        y @ x

    def read_once_more(x: Tensor) -> None:
        y = x @ x
        z, w = y.neg(), y.exp()
        del y
        z @ x
        w @ x

    assert peak(joined) == 2 + 2
    assert peak(in_place) == 1 + 1  # the output, and what the second product makes
    assert peak(in_place, fused=False) == 1 + 1
    assert peak(read_once_more) == 2 + 1
    assert peak(read_once_more, fused=False) == 3


def test_dropout_in_attention_keeps_nothing_for_a_pair_of_tokens() -> None:
    def peak(dropout: float, flash: Any) -> int:
        with fake_tensors(), flash():
            q = torch.empty(1, 2, 512, 8, requires_grad=True)
            storages = LiveStorages([q])
            with storages:
                F.scaled_dot_product_attention(q, q, q, dropout_p=dropout, is_causal=True).sum().backward()
            return max(segment.peak.total for segment in storages.finish())

    assert peak(0.1, _flash_attention) == peak(0.0, nullcontext)
    assert peak(0.1, nullcontext) > 4 * 2 * 512 * 512 > 4 * peak(0.1, _flash_attention)


def test_fsdp_frees_the_head_when_its_backward_has_ended(walked: Walk) -> None:
    setting = Setting(mesh=Mesh(tp=2, dp_shard=2), copies=False)
    stage = _StagePeak(walked, setting, next(stages_of(walked, setting)), summed=False)
    block, head = (walked.units[name] for name in (walked.order[0], HEAD))
    assert head.count
    before = stage._gathered([block])
    stage._done.append(head)
    assert stage._gathered([block]) == before - head.count


class KeepsFp32Logits(Llama):
    """Keeps an fp32 copy of the logits until backward, as a loss that casts them does."""

    def forward(self, x: Tensor, positions: Tensor | None = None, *, seq_len: int | None = None) -> Tensor:
        logits = super().forward(x, positions, seq_len=seq_len)
        return logits + 0 * logits.float().exp().to(logits.dtype)


def test_an_fp32_copy_of_the_logits_moves_the_forecast_by_its_bytes() -> None:
    config = replace(CONFIG, vocab_size=8192)
    cell = replace(EAGER, tp=1)
    plain, copied = (
        peak_memory(walk(meta(config, kind), Plan.preset("llama", "replicated"), cell), Setting(mesh=Mesh()))
        for kind in (Llama, KeepsFp32Logits)
    )
    more = copied.allocated - plain.allocated
    assert more == pytest.approx(4 * cell.micro_batch * cell.seq_len * config.vocab_size, rel=0.01)


def parameters(walked: Walk) -> int:
    layers = sum(walked.units[name].count * walked.repeats[name] for name in walked.order)
    return layers + walked.units[ROOT].count + walked.units[HEAD].count


def test_states_are_counted_where_they_lie(walked: Walk) -> None:
    own = parameters(walked)
    alone = peak_memory(walked, Setting(mesh=Mesh(tp=2)))
    assert (alone.masters, alone.optimizer, alone.weights) == (4 * own, 8 * own, 2 * own)
    sharded = peak_memory(walked, Setting(mesh=Mesh(tp=2, dp_shard=4), copies=False))
    assert (sharded.masters, sharded.optimizer) == (own, 2 * own)
    assert sharded.weights < own  # a block, embedding and head, in bf16
    kept = peak_memory(walked, Setting(mesh=Mesh(tp=2, dp_shard=4), copies=False, reshard=False))
    assert kept.weights == 2 * own
    summed = peak_memory(walked, Setting(mesh=Mesh(tp=2, dp_shard=4), copies=False, micro_batches=2))
    assert summed.gradients >= 4 * own  # not reduced before the last micro-batch


def test_fsdp_sums_over_micro_batches_have_the_size_of_the_gradients(walked: Walk) -> None:
    """DTensor's gradient of an embedding that is split by rows is that of the complete table; copies sum their part."""
    root, table = walked.units[ROOT], CONFIG.vocab_size * CONFIG.hidden_size
    assert (root.trained_count, root.gradient_count) == (table // 2, table)
    several = Setting(mesh=Mesh(tp=2), micro_batches=2)
    copies, fsdp = (peak_memory(walked, replace(several, copies=copies)).gradients for copies in (True, False))
    assert fsdp - copies == 4 * table // 2
    assert 0 <= copies - 4 * parameters(walked) <= 2 * root.gradient_count  # and the running unit's, in bf16
    fast = walk(meta(), Plan.preset("llama-fast", "linear"), EAGER).units[ROOT]
    assert fast.gradient_count == fast.trained_count == table // 2


def test_the_flat_engine_keeps_low_precision_shards_and_reduces_each_micro_batch(walked: Walk) -> None:
    own, mesh = parameters(walked), Mesh(tp=2, dp_shard=4, data_engine="flat")
    ends = walked.units[ROOT].count + walked.units[HEAD].count
    block = max(walked.units[name].count for name in walked.order)
    flat = peak_memory(walked, Setting(mesh=mesh, copies=False))
    assert (flat.masters, flat.optimizer) == (own, 2 * own)
    assert flat.weights == 2 * (ends + 2 * block) + 2 * (own - ends) / 4
    assert peak_memory(walked, Setting(mesh=mesh, copies=False, reshard=False)).weights == 2 * own
    assert own <= peak_memory(walked, Setting(mesh=mesh, copies=False, micro_batches=2)).gradients < 4 * own
    several = peak_memory(walked, Setting(mesh=mesh, copies=False, micro_batches=2))
    graphed = peak_memory(walked, Setting(mesh=mesh, copies=False, micro_batches=2, cuda_graph=True))
    assert graphed.gradients == own, "its sums lie beside the graph's pool"
    assert graphed.device == several.device


def test_fast_columns_on_data_axes_keep_their_joint_output() -> None:
    """q and k are copied by the rotation, and v stays a part of what one matmul wrote for all three."""
    plan, cell = Plan.preset("llama-fast", "linear"), Cell(micro_batch=2, seq_len=128, compiled=False)
    assert applies_on_data_axes(plan, Mesh(dp_shard=2))
    assert not any(applies_on_data_axes(plan, mesh) for mesh in (Mesh(), Mesh(tp=2, dp_shard=2)))
    assert not applies_on_data_axes(Plan.preset("llama"), Mesh(dp_shard=2))
    alone, joint = (walk(meta(), plan, replace(cell, data_axes=data_axes)) for data_axes in (False, True))
    kept = [seen.segments[3].change.activations for seen in (alone, joint)]
    q_and_k = 2 * 2 * 128 * (4 + 2) * CONFIG.head_dim
    assert kept[1] - kept[0] == q_and_k


def test_fp8_keeps_its_inputs_in_eight_bits() -> None:
    """Of a column the gathered input's transpose, of a row its input's, each with a row for the scales."""
    plan = Plan.preset("llama-fast", "linear")
    high, low = (
        walk(meta(), each, EAGER).segments[3].change.activations for each in (plan, plan.with_fp8("tensorwise"))
    )
    attended, ffn = 64 // 2, 192 // 2
    numbers = (2 * CONFIG.hidden_size + attended + ffn) * EAGER.micro_batch * EAGER.seq_len
    scales = 4 * 512  # the allocator's least
    assert high - low == 2 * numbers - (numbers + scales)


def test_frozen_weights_have_neither_gradients_nor_moments() -> None:
    model = meta()
    model.layers.requires_grad_(False)
    frozen = walk(model, Plan.preset("llama"), EAGER)
    memory = peak_memory(frozen, Setting(mesh=Mesh(tp=2)))
    trained = frozen.units[ROOT].count + frozen.units[HEAD].count
    assert memory.optimizer == 8 * trained
    assert memory.masters == 4 * parameters(frozen)


def test_a_stage_that_runs_all_forwards_first_never_holds_them_beside_all_sums(walked: Walk) -> None:
    stages = Setting(mesh=Mesh(pp=2), micro_batches=2, stages=(3, 2), copies=False)
    two, four = (peak_memory(walked, replace(stages, micro_batches=n)) for n in (2, 4))
    assert two.gradients + two.activations < four.gradients + four.activations


def test_pools_of_fsdps_streams_are_kept_and_not_needed(walked: Walk) -> None:
    setting = Setting(mesh=Mesh(tp=2, dp_shard=2), copies=False)
    alone, sharded = (peak_memory(walked, each) for each in (Setting(mesh=Mesh(tp=2)), setting))
    assert alone.needed == alone.device
    assert sharded.reserve > 4 * parameters(walked) / 2  # reduced gradients, on a stream of their own
    assert sharded.needed < sharded.device
    full = sharded.on(sharded.needed)
    assert full.device == pytest.approx(sharded.needed)
    assert sharded.on(2 * sharded.device) == sharded


def test_a_pipeline_holds_micro_batches_in_flight(walked: Walk) -> None:
    def stage(micro_batches: int, schedule: str = "1f1b") -> float:
        setting = Setting(
            mesh=Mesh(tp=2, pp=2),
            micro_batches=micro_batches,
            stages=(3, 2),
            schedule=schedule,
            copies=False,
            reshard=False,
        )
        return peak_memory(walked, setting).activations

    layer = walked.segments[3].change.activations
    assert stage(8) == stage(4)  # 1f1b: never more than the stages
    assert stage(8, "gpipe") - stage(4, "gpipe") == pytest.approx(4 * 3 * layer, rel=0.2)


MEASURED = [
    ("2026-11-26-4xh200-llama3-8b-tp4-derived.json", "overlap"),
    ("2026-11-26-4xh200-llama3-8b-tp4-derived.json", "plain"),
]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("file", "arm"), [MEASURED[0], pytest.param(*MEASURED[1], marks=pytest.mark.exhaustive)])
def test_compiled_blocks_take_the_memory_that_was_measured(file: str, arm: str) -> None:
    """All rows stand in docs/guide/forecast.md, by `python -m benchmarks.forecast`."""
    results = json.loads((RESULTS / file).read_text(encoding="utf-8"))["results"]
    row = next(row for row in results if row["arm"] == arm)
    config = replace(SHAPES[row["model"]], num_hidden_layers=2)
    cell = Cell(row["mesh"]["tp"], row["micro_batch"], row["seq_len"])
    seen = walk(meta(config), Plan.preset(row["plan"], row["loss"]), cell)
    seen = replace(seen, repeats={seen.order[0]: 1, seen.order[1]: SHAPES[row["model"]].num_hidden_layers - 1})
    memory = peak_memory(seen, Setting(mesh=Mesh(**row["mesh"]), copy_engine=arm == "overlap"))
    assert memory.allocated / GIB == pytest.approx(row["peak_allocated_gib"], rel=0.01)
    assert memory.device / GIB == pytest.approx(row["device_used_gib"], rel=0.03)


@pytest.mark.exhaustive
def test_a_walk_prints_nothing_of_the_compiler(capfd: pytest.CaptureFixture[str]) -> None:
    walk(meta(), Plan.preset("llama"), replace(EAGER, compiled=True, recompute="selective"))
    assert capfd.readouterr() == ("", "")
