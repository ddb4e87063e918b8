"""The hint that a run is CPU-bound."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from colrow.config import parse_config
from colrow.run.cpu_bound import STEPS, CpuBoundDetector, hint_line

CONFIG = """
run: {dir: none}
model: {shape: laptop}
data: {corpus: stdlib, seq_len: 256}
train: {steps: 1, lr: 1.0e-3, global_batch: 1, micro_batch: 1}
"""


def hinted(waits: list[float], after: int = 1) -> list[int]:
    """At which steps, of one second each, the hint comes."""
    detector = CpuBoundDetector(after)
    return [i for i, waited in enumerate(waits) if detector.add(waited, 1.0)]


def test_a_host_that_never_waits_keeps_the_gpu_waiting() -> None:
    assert hinted([0.0] * 40) == [2 + STEPS], "once, after the steps that do not count"
    assert hinted([0.0] * 40, after=3) == [4 + STEPS]


def test_a_host_that_waits_gives_no_hint() -> None:
    assert hinted([0.5] * 40) == []
    assert hinted([0.0] * 3 + [0.5] * 10 + [0.0] * 20) == [], "only the first steps are looked at"


def test_two_of_ten_steps_may_be_a_hiccup() -> None:
    assert hinted([0.0] * 3 + [0.5, 0.5] + [0.0] * 20) == [2 + STEPS]
    assert hinted([0.0] * 3 + [0.5, 0.5, 0.5] + [0.0] * 20) == []


@pytest.mark.parametrize(
    ("changes", "graph"),
    [
        ({"mesh": {"tp": 2}}, True),
        ({"mesh": {"tp": 2}, "train": {"cuda_graph": True}}, False),
        ({"mesh": {"tp": 2, "dp_shard": 2}}, False),
        ({"mesh": {"tp": 2}, "train": {"activation_checkpoint": "full"}}, False),
    ],
)
def test_cuda_graphs_are_named_where_they_are_possible(changes: dict[str, Any], graph: bool) -> None:
    tree = yaml.safe_load(CONFIG)
    tree["train"] |= changes.get("train", {})
    line = hint_line(parse_config({**tree, "mesh": changes["mesh"]}, "test"))
    assert ("cuda_graph" in line) is graph
    assert "train.micro_batch" in line
    assert max(map(len, line.splitlines())) <= 80
