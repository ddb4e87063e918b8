"""`train.cuda_graph: auto`: which runs may be captured, and what the measured step decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from colrow.config import RunConfig, parse_config
from colrow.errors import ConfigError
from colrow.train import cuda_graph
from colrow.train.cuda_graph import GraphChoice, can_be_captured, check_cuda_graph, gpu_waits, plain_state


def config(mesh: dict[str, Any], **train: Any) -> RunConfig:
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
    ("mesh", "train", "device", "captured"),
    [
        ({"tp": 2}, {}, "cuda", True),
        ({}, {}, "cuda", True),
        ({"tp": 2}, {}, "cpu", False),
        ({"tp": 2, "dp_shard": 2}, {}, "cuda", False),
        ({"tp": 2, "dp_shard": 2, "data_engine": "flat"}, {}, "cuda", True),
        ({"tp": 2}, {"activation_checkpoint": "full"}, "cuda", False),
        ({"tp": 2}, {"on_nonfinite": "skip"}, "cuda", False),
        ({"tp": 2}, {"precision": "fp32"}, "cuda", False),
    ],
)
def test_what_cannot_be_captured_is_not(
    mesh: dict[str, Any], train: dict[str, Any], device: str, captured: bool
) -> None:
    assert can_be_captured(config(mesh, **train), device) is captured


def test_data_axes_of_the_flat_engine_are_captured_where_that_is_asked_for() -> None:
    check_cuda_graph(config({"tp": 2, "dp_shard": 2, "data_engine": "flat"}, cuda_graph=True), "cuda")
    for mesh, words in (({"dp_shard": 2}, "FSDP2.*mesh.data_engine to flat"), ({"pp": 2}, "pipeline.*mesh.pp to 1")):
        with pytest.raises(ConfigError, match=words):
            check_cuda_graph(config(mesh, cuda_graph=True), "cuda")


class Counting(nn.Module):
    """Counts its calls, where asked to."""

    def __init__(self, count: bool) -> None:
        super().__init__()
        self.layer, self.counts, self.calls, self.scales = nn.Linear(2, 2), count, 0, [1.0, 2.0]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.counts
        result: Tensor = self.layer(x)
        return result


@pytest.mark.parametrize("counts", [False, True])
def test_a_number_that_a_step_changes_is_found(counts: bool) -> None:
    model = nn.Sequential(Counting(counts))
    before = plain_state(model)
    model(torch.ones(2))
    after = plain_state(model)
    assert after["0.scales"] == (1.0, 2.0)
    assert [name for name in after if after[name] != before[name]] == ["0.calls"] * counts


def test_the_gpu_waits_where_it_is_done_with_the_cpu() -> None:
    assert gpu_waits(0.085, 0.087)
    assert not gpu_waits(0.085, 0.4)


@pytest.mark.parametrize(
    ("here", "elsewhere", "obstacle", "declines"),
    [(True, [0.0, 0.0], None, 0), (False, [1.0, 0.0], None, 0), (False, [0.0, 0.0], None, 1),
     (True, [1.0, 1.0], None, 1), (True, [1.0, 0.0], "a number changes", 1)],
)  # fmt: skip
def test_one_rank_decides_for_all(
    monkeypatch: pytest.MonkeyPatch, here: bool, elsewhere: list[float], obstacle: str | None, declines: int
) -> None:
    """One that waits captures everywhere, one whose model cannot be replayed nowhere."""
    declined: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, op: x.copy_(x.maximum(torch.tensor(elsewhere))))
    monkeypatch.setattr(cuda_graph, "gpu_waits", lambda enqueued, done: here)
    graph: Any = SimpleNamespace(decline=lambda: declined.append(1), obstacle=obstacle)
    choice = GraphChoice([graph], torch.device("cpu"), steps=2)
    for _ in range(4):
        with choice.around():
            pass
    assert len(declined) == declines
