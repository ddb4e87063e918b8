"""What a run says of random numbers before its first step, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colrow.dryrun.random_draws import RandomDraws
from colrow.errors import ConfigError
from colrow.run.rank import random_lines
from colrow.sharding.draws import Draw
from colrow.sharding.local_layout import REPLICATED, sharded
from colrow.train.cuda_graph import check_draws
from helpers.runs import a_run

DRAWS = RandomDraws(
    True,
    {
        "drop": (Draw(REPLICATED),),
        "layers.0.attn": (Draw(sharded(1)),),
        "layers.1.attn": (Draw(sharded(1)),),
        "layers.0.mlp.drop": (Draw(sharded(2)),),
    },
    {"layers.0.noise": "it draws random numbers of its own shard"},
)


def lines(device: str, compiled: bool = False) -> str:
    mesh = {"tp": SimpleNamespace(size=lambda: 2)}
    training: Any = SimpleNamespace(draws=DRAWS, mesh=mesh, device=torch.device(device), compiled=compiled)
    found = list(random_lines(training))
    assert all(len(line) <= 80 for text in found for line in text.splitlines())
    return " ".join(" ".join(found).split())


def test_the_modules_that_draw_for_shards_are_named() -> None:
    on_cpu, on_gpu = lines("cpu"), lines("cuda", compiled=True)
    assert "draws its shard of the unsharded tensor's numbers in layers.*.attn, layers.*.mlp.drop" in on_cpu
    assert "a seed of each tp rank's own for shards, other numbers than with tp 1" in on_gpu
    assert "not compiled" in on_gpu
    assert "not compiled" not in on_cpu
    for text in (on_cpu, on_gpu):
        assert "warning the 2 tp ranks draw equal random numbers for different shards in layers.*.noise" in text


def test_nothing_is_said_of_a_model_that_draws_nothing() -> None:
    training: Any = SimpleNamespace(draws=RandomDraws(False), mesh={"tp": SimpleNamespace(size=lambda: 2)})
    assert list(random_lines(training)) == []


def test_ways_to_run_blocks_that_cannot_draw_are_refused_by_name(tmp_path: Path) -> None:
    def refused(**train: Any) -> str:
        with pytest.raises(ConfigError) as error:
            check_draws(a_run(tmp_path, "run", train=train), DRAWS, "Gpt", compiled=True)
        return str(error.value)

    assert "as Gpt does in training (dropout)" in refused(cuda_graph=True)
    assert "layers.0.attn draws" in refused(activation_checkpoint="selective")
    check_draws(a_run(tmp_path, "run", train={"cuda_graph": True}), RandomDraws(False), "Gpt", compiled=True)
    check_draws(a_run(tmp_path, "run", train={"activation_checkpoint": "selective"}), DRAWS, "Gpt", compiled=False)
