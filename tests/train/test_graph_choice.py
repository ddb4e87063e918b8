"""`train.cuda_graph: auto`: which runs may be captured, and what the measured step decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from colrow.config import RunConfig, parse_config
from colrow.dryrun.random_draws import RandomDraws
from colrow.train import cuda_graph
from colrow.train.cuda_graph import GraphChoice, gpu_waits, with_graph_chosen


def config(mesh: dict[str, int], **train: Any) -> RunConfig:
    return parse_config(
        {
            "run": {"dir": "unused"},
            "model": {"shape": "laptop"},
            "data": {"corpus": "stdlib", "seq_len": 8},
            "mesh": mesh,
            "train": {"steps": 1, "global_batch": 4, "micro_batch": 1, "lr": 1e-3, "cuda_graph": "auto", **train},
        }
    )


@pytest.mark.parametrize(
    ("mesh", "train", "draws", "device", "captured"),
    [
        ({"tp": 2}, {}, False, "cuda", True),
        ({}, {}, False, "cuda", True),
        ({"tp": 2}, {}, True, "cuda", False),
        ({"tp": 2}, {}, False, "cpu", False),
        ({"tp": 2, "dp_shard": 2}, {}, False, "cuda", False),
        ({"tp": 2}, {"activation_checkpoint": "full"}, False, "cuda", False),
        ({"tp": 2}, {"on_nonfinite": "skip"}, False, "cuda", False),
        ({"tp": 2}, {"precision": "fp32"}, False, "cuda", False),
    ],
)
def test_what_cannot_be_captured_is_not(
    mesh: dict[str, int], train: dict[str, Any], draws: bool, device: str, captured: bool
) -> None:
    chosen = with_graph_chosen(config(mesh, **train), RandomDraws(draws), device)
    assert chosen.train.cuda_graph is captured


def test_what_is_given_stays() -> None:
    for value in (True, False):
        assert with_graph_chosen(config({}, cuda_graph=value), RandomDraws(), "cpu").train.cuda_graph is value


def test_the_gpu_waits_where_it_is_done_with_the_cpu() -> None:
    assert gpu_waits(0.085, 0.087)
    assert not gpu_waits(0.085, 0.4)


@pytest.mark.parametrize(("here", "elsewhere", "declines"), [(True, 0.0, 0), (False, 1.0, 0), (False, 0.0, 1)])
def test_one_rank_that_waits_decides_for_all(
    monkeypatch: pytest.MonkeyPatch, here: bool, elsewhere: float, declines: int
) -> None:
    declined: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op: x.clamp_(min=elsewhere))
    monkeypatch.setattr(cuda_graph, "gpu_waits", lambda enqueued, done: here)
    graph: Any = SimpleNamespace(decline=lambda: declined.append(1))
    choice = GraphChoice([graph], torch.device("cpu"), steps=2)
    for _ in range(4):
        with choice.around():
            pass
    assert len(declined) == declines
