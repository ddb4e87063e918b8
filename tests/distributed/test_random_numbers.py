"""Runs of models that draw random numbers: a resume draws what the uninterrupted run draws, on every mesh; data ranks
draw different numbers, tensor-parallel ranks equal ones."""

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

pytestmark = pytest.mark.distributed

MESHES: dict[str, dict[str, Any]] = {
    "tp": {"mesh": {"tp": 2}, "plan": "derive"},
    "dp": {"mesh": {"dp_shard": 2}, "plan": "none.yaml"},
    "pp": {"mesh": {"pp": 2}, "plan": "llama", "model": {"python": "helpers.drawing_models:llama"}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("random")
    write_text(folder)
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
def masks(ranks: Ranks, folder: Path) -> list[dict[str, list[Tensor]]]:
    return ranks(2).run(whole_and_resumed, folder, list(MESHES))


@pytest.mark.parametrize("case", MESHES)
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


def test_data_ranks_draw_different_numbers_and_tp_ranks_equal_ones(masks: Any) -> None:
    first, second = (found["dp"] for found in masks)
    assert len(first) == len(second) == 3 * 2  # of a global batch of 8, each rank runs 2 micro-batches of 2
    assert not any(torch.equal(a, b) for a in first for b in second)
    first, second = (found["tp"] for found in masks)
    assert len(first) == 3 * 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_micro_batch_draws_the_same_whichever_rank_runs_it(masks: Any, ranks: Ranks) -> None:
    if ranks.device == "cuda":
        pytest.skip("the masks of one process are drawn here on a CPU")
    for mesh in ("dp", "tp"):
        count = 4 if mesh == "tp" else 2
        for rank, found in enumerate(masks):
            for i, mask in enumerate(found[mesh]):
                number = i % count * (4 // count) + (rank if mesh == "dp" else 0)
                MicroBatchSeeds(Generators([], "cpu"), seed=0, step=i // count).start(number)
                assert torch.equal(mask, F.dropout(torch.ones(mask.shape), 0.2))
