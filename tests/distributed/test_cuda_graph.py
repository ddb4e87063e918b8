"""Steps replayed as CUDA graphs: the figures of the same steps run one by one, evaluation and resume included."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from helpers.harness import Ranks
from helpers.runs import a_run, figures, train, write_text

AUTO = {"cuda_graph": "auto"}
pytestmark = [pytest.mark.distributed, pytest.mark.cuda]


def chosen(device: str, folder: Path, name: str, waits: bool | None) -> list[Any]:
    """A run with `auto`; `waits` stands for what the measured step finds."""
    from colrow.train import cuda_graph

    found: list[bool] = []
    measure = cuda_graph.gpu_waits

    def seen(enqueued: float, done: float) -> bool:
        found.append(measure(enqueued, done) if waits is None else waits)
        return found[-1]

    config = a_run(folder, name, mesh={"tp": 2}, plan="llama-fast", loss="linear", train={"steps": 8, **AUTO})
    with mock.patch.object(cuda_graph, "gpu_waits", seen):
        train(device, config)
    return found


def run(device: str, folder: Path, name: str, eager_steps: int, stop_after: int | None, section: dict[str, Any]) -> Any:
    from colrow.train import setup

    eager_before, setup.EAGER_STEPS = setup.EAGER_STEPS, eager_steps
    try:
        config = a_run(
            folder,
            name,
            mesh={"tp": 2},
            plan="llama-fast",
            loss="linear",
            eval={"every": 4, "batches": 1},
            train={"steps": 8, **section},
        )
        return train(device, config, stop_after)[:2]
    finally:
        setup.EAGER_STEPS = eager_before


def test_replayed_steps_are_those_run_one_by_one(ranks: Ranks, tmp_path: Path) -> None:
    if ranks.device != "cuda":
        pytest.skip("needs --device cuda")
    write_text(tmp_path)
    group, graphs = ranks(2), {"cuda_graph": True}
    group.run(run, tmp_path, "fsdp", 2, None, {})
    group.run(run, tmp_path, "eager", 100, None, graphs)
    group.run(run, tmp_path, "graphs", 2, None, graphs)
    for ended in group.run(run, tmp_path, "parts", 2, 5, graphs):
        assert ended[1], "it was stopped"
    group.run(run, tmp_path, "parts", 2, None, graphs)
    fsdp, eager, replayed, parts = (
        figures(tmp_path / name / "metrics.jsonl") for name in ("fsdp", "eager", "graphs", "parts")
    )
    assert [record["step"] for record in replayed] == list(range(1, 9))
    for one, record in zip(eager, replayed, strict=True):
        assert record == pytest.approx(one, rel=1e-5)
    for one, record in zip(replayed, parts, strict=True):
        assert record == pytest.approx(one, rel=1e-5)
    for one, record in zip(fsdp, replayed, strict=True):  # which sums the gradients of norms in bf16
        assert record == pytest.approx(one, rel=1e-2)
    assert replayed[-1]["loss"] < replayed[0]["loss"] - 0.05, "the weights that a replay reads are the new ones"


def test_auto_captures_where_the_gpu_waits_for_the_cpu(ranks: Ranks, tmp_path: Path) -> None:
    """A tiny model is CPU-bound; a capture, or none, changes no figure."""
    if ranks.device != "cuda":
        pytest.skip("needs --device cuda")
    write_text(tmp_path)
    assert ranks(2).run(chosen, tmp_path, "measured", None) == [[True]] * 2
    assert ranks(2).run(chosen, tmp_path, "declined", False) == [[False]] * 2
    measured, declined = (figures(tmp_path / name / "metrics.jsonl") for name in ("measured", "declined"))
    for one, record in zip(measured, declined, strict=True):
        assert record == pytest.approx(one, rel=1e-5)
