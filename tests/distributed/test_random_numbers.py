"""Runs of models that draw random numbers: a resume draws what the uninterrupted run draws, on every mesh; data ranks
draw different numbers, tensor-parallel ranks those of their shards."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from colrow.config import RunConfig
from colrow.parallel.random_state import Generators, MicroBatchSeeds
from helpers import drawing_models
from helpers.harness import Ranks
from helpers.runs import a_run, figures, train, write_text
from helpers.unproven_plans import OLD_TORCH
from helpers.variants import params

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]

GPT = """
name: gpt
loss: vocab_parallel
modules:
  embed: {style: rowwise, input: replicate, output: shard(1)}
  blocks.*.norm1: sequence
  blocks.*.attn: {style: prepare_input, input: [shard(1)], desired: [replicate]}
  blocks.*.attn.[qkv]: colwise
  blocks.*.attn.o: {style: rowwise, output: shard(1)}
  blocks.*.norm2: sequence
  blocks.*.mlp: {style: prepare_input, input: [shard(1)], desired: [replicate]}
  blocks.*.mlp.up: colwise
  blocks.*.mlp.down: {style: rowwise, output: shard(1)}
  norm: sequence
  head: {style: colwise, input: shard(1), use_local_output: false}
"""
MESHES: dict[str, dict[str, Any]] = {
    "tp": {"mesh": {"tp": 2}, "plan": "gpt.yaml"},
    "dp": {"mesh": {"dp_shard": 2}, "plan": "none.yaml"},
    "pp": {"mesh": {"pp": 2}, "plan": "llama", "model": {"python": "helpers.drawing_models:llama"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    write_text(folder)
    (folder / "gpt.yaml").write_text(GPT, encoding="utf-8")
    (folder / "none.yaml").write_text("{name: none, loss: replicated, modules: {}}\n", encoding="utf-8")
    return folder


def a_drawing_run(folder: Path, name: str, case: str, **sections: Any) -> RunConfig:
    tree = {
        "model": {"python": "helpers.drawing_models:gpt"},
        "train": {
            "steps": 3,
            "global_batch": 8,
            "precision": "fp32",
            "compile": False,
            "activation_checkpoint": "full",
        },
        "eval": {"every": 2, "batches": 1},
        **MESHES[case],
        **sections,
    }
    if tree["plan"].endswith(".yaml"):
        tree["plan"] = str(folder / tree["plan"])
    return a_run(folder, name, **tree)


def whole_and_resumed(device: str, folder: Path, cases: list[str]) -> dict[str, list[Tensor]]:
    """For each mesh a run without a stop, whose masks are returned, and one that stops and goes on."""
    masks = {}
    for case in cases:
        drawing_models.SEEN.clear()
        train(device, a_drawing_run(folder, f"{case}-whole", case))
        masks[case] = [mask.cpu() for mask in drawing_models.SEEN]
        parts = a_drawing_run(folder, f"{case}-parts", case)
        assert train(device, parts, stop_after=1)[1]
        train(device, parts)
    return masks


@pytest.fixture(scope="module")
def masks(ranks: Ranks, folder: Path, request: pytest.FixtureRequest) -> list[dict[str, list[Tensor]]]:
    cases = [case for case in MESHES if case != "pp" or request.config.getoption("--exhaustive")]
    return ranks(2).run(whole_and_resumed, folder, cases)


@pytest.mark.parametrize("case", params(MESHES, lambda case: case == "pp"))
def test_a_resumed_run_draws_what_the_uninterrupted_one_draws(masks: Any, folder: Path, case: str) -> None:
    want = figures(folder / f"{case}-whole" / "metrics.jsonl")
    assert [record["step"] for record in want] == [1, 2, 3]
    assert figures(folder / f"{case}-parts" / "metrics.jsonl") == want


@pytest.mark.parametrize("case", ["tp", "dp"])
def test_evaluation_is_in_evaluation_mode(masks: Any, folder: Path, case: str) -> None:
    evaluated = [record for record in figures(folder / f"{case}-whole" / "metrics.jsonl") if "val_loss" in record]
    assert [record["step"] for record in evaluated] == [2, 3]
    for record in evaluated:
        assert record["val_loss"] == pytest.approx(math.log(drawing_models.VOCAB), rel=1e-6)


def test_data_ranks_draw_different_numbers(masks: Any) -> None:
    first, second = (found["dp"] for found in masks)
    assert len(first) == len(second) == 3 * 2  # of a global batch of 8, each rank runs 2 micro-batches of 2
    assert not any(torch.equal(a, b) for a in first for b in second)


def test_every_mesh_draws_the_numbers_of_one_process(masks: Any, ranks: Ranks) -> None:
    if ranks.device == "cuda":
        pytest.skip("on GPUs ranks draw for shards from seeds of their own")
    by_data_rank = [mask for pair in zip(*(found["dp"] for found in masks), strict=True) for mask in pair]
    gathered = [torch.cat(shards, 1) for shards in zip(*(found["tp"] for found in masks), strict=True)]
    assert len(gathered) == 3 * 4
    for i, drawn in enumerate(zip(by_data_rank, gathered, strict=True)):
        MicroBatchSeeds(Generators([], "cpu"), seed=0, step=i // 4).start(i % 4)
        want = F.dropout(torch.ones(2, 32, drawing_models.WIDTH), 0.2)
        assert all(torch.equal(mask, want) for mask in drawn)


def test_tensor_parallel_ranks_train_as_data_parallel_ones(masks: Any, folder: Path, ranks: Ranks) -> None:
    """Dropout on shards of the sequence, of features and of heads is that of the unsharded tensors."""
    if OLD_TORCH:
        pytest.skip("torch 2.11 cannot follow the heads through attention written out")
    if ranks.device == "cuda":
        pytest.skip("on GPUs ranks draw for shards from seeds of their own")
    tp, dp = (figures(folder / f"{case}-whole" / "metrics.jsonl") for case in ("tp", "dp"))
    for here, there in zip(tp, dp, strict=True):
        assert here == pytest.approx(there, rel=1e-4)  # fp32
