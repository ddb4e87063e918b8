"""Steps replayed as CUDA graphs: the figures of the same steps run one by one, evaluation and resume included."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from colrow.errors import ConfigError
from helpers.harness import Ranks
from helpers.runs import a_run, figures, train, write_text

AUTO = {"cuda_graph": "auto"}
pytestmark = [pytest.mark.distributed, pytest.mark.cuda]


@pytest.fixture(autouse=True)
def _on_gpus(ranks: Ranks) -> None:
    if ranks.device != "cuda":
        pytest.skip("needs --device cuda")


FLAT = {
    "shard": ({"dp_shard": 2}, {}),
    "replicate": ({"dp_replicate": 2}, {}),
    "gather": ({"dp_shard": 2}, {"gather": "copy_engine"}),
    "exchange": ({"dp_shard": 2}, {"exchange": "copy_engine"}),
    "engines": ({"dp_shard": 2}, {"gather": "copy_engine", "exchange": "copy_engine"}),
    "fp8": ({"dp_shard": 2}, {"gather_fp8": True}),
}


def chosen(device: str, folder: Path, name: str, waits: bool | None, mesh: dict[str, Any]) -> list[Any]:
    """A run with `auto`; `waits` stands for what the measured step finds."""
    from colrow.train import cuda_graph

    found: list[bool] = []
    measure = cuda_graph.gpu_waits

    def seen(enqueued: float, done: float) -> bool:
        found.append(measure(enqueued, done) if waits is None else waits)
        return found[-1]

    config = a_run(folder, name, mesh=mesh, plan="llama-fast", loss="linear", train={"steps": 8, **AUTO})
    with mock.patch.object(cuda_graph, "gpu_waits", seen):
        train(device, config)
    return found


def run(
    device: str,
    folder: Path,
    name: str,
    eager_steps: int,
    stop_after: int | None,
    section: dict[str, Any],
    **sections: dict[str, Any],
) -> Any:
    from colrow.train import setup

    eager_before, setup.EAGER_STEPS = setup.EAGER_STEPS, eager_steps
    try:
        config = a_run(
            folder,
            name,
            **{"mesh": {"tp": 2}, **sections},
            plan="llama-fast",
            loss="linear",
            eval={"every": 4, "batches": 1},
            train={"steps": 8, **section},
        )
        return train(device, config, stop_after)
    finally:
        setup.EAGER_STEPS = eager_before


def test_replayed_steps_are_those_run_one_by_one(ranks: Ranks, tmp_path: Path) -> None:
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


GATHERED = """
loss: replicated
modules:
  layers.*.mlp.gate_proj: {style: gathered_parameters, shards: {weight: 0}}
  layers.*.mlp.up_proj: {style: gathered_parameters, shards: {weight: 1}}
  layers.*.mlp.down_proj: {style: gathered_parameters, shards: {weight: 0}}
"""


def gathered_run(device: str, folder: Path, name: str, eager_steps: int) -> Any:
    from colrow.train import setup

    with mock.patch.object(setup, "EAGER_STEPS", eager_steps):
        section = {"steps": 8, "cuda_graph": True, "compile": False}
        config = a_run(folder, name, mesh={"tp": 2}, plan=str(folder / "gathered.yaml"), train=section)
        return train(device, config)


def test_replayed_steps_gather_parameters(ranks: Ranks, tmp_path: Path) -> None:
    write_text(tmp_path)
    (tmp_path / "gathered.yaml").write_text(GATHERED, encoding="utf-8")
    for name, steps in (("eager", 100), ("graphs", 2)):
        ranks(2).run(gathered_run, tmp_path, name, steps)
    eager, replayed = (figures(tmp_path / name / "metrics.jsonl") for name in ("eager", "graphs"))
    for one, record in zip(eager, replayed, strict=True):
        assert record == pytest.approx(one, rel=1e-5)
    assert replayed[-1]["loss"] < replayed[0]["loss"] - 0.05, "the shards that a replay gathers are the new ones"


def flat_run(device: str, folder: Path, name: str, eager_steps: int, stop_after: int | None, case: str) -> Any:
    """Three micro-batches a step: the first, the last and the one between are graphs of their own."""
    mesh, fsdp = FLAT[case]
    # compilation takes most of the time of such a run
    section = {"cuda_graph": True, "global_batch": 12, "micro_batch": 2, "compile": case == "shard"}
    if case == "fp8":
        section["fp8"] = "tensorwise"
    more: dict[str, Any] = {"mesh": {**mesh, "data_engine": "flat"}, "fsdp": fsdp}
    return run(device, folder, name, eager_steps, stop_after, section, model={"shape": "laptop", "layers": 3}, **more)


@pytest.mark.parametrize("case", FLAT)
def test_replayed_steps_on_flat_data_axes_are_those_run_one_by_one(ranks: Ranks, tmp_path: Path, case: str) -> None:
    write_text(tmp_path)
    group = ranks(2)
    if case == "shard":  # compiled: a process tunes kernels once, and those of another start may sum in another order
        group.run(flat_run, tmp_path, "cold", 100, None, case)
    ran = {
        name: group.run(flat_run, tmp_path, name, steps, None, case) for name, steps in (("eager", 100), ("graphs", 2))
    }
    assert "CUDA graphs" in " ".join(ran["graphs"][0][2].split())  # the line is wrapped
    for ended in group.run(flat_run, tmp_path, "parts", 2, 5, case):
        assert ended[1], "it was stopped"
    group.run(flat_run, tmp_path, "parts", 2, None, case)
    eager, replayed, parts = (figures(tmp_path / name / "metrics.jsonl") for name in ("eager", "graphs", "parts"))
    assert [record["step"] for record in replayed] == list(range(1, 9))
    for one, record, part in zip(eager, replayed, parts, strict=True):
        assert record == pytest.approx(one, rel=1e-5)
        assert part == pytest.approx(one, rel=1e-5)
    assert replayed[-1]["loss"] < replayed[0]["loss"] - 0.05, "the weights that a replay reads are the new ones"


def run_cut_off(*args: Any) -> Any:
    """A run in which scales of the last step show: they cut off all but the small numbers."""
    from colrow.ops.kernels.rounding import HEADROOM

    with mock.patch.dict(HEADROOM, dict.fromkeys(HEADROOM, 2.0**-6)):
        return run(*args)


def test_replayed_steps_round_by_the_last_step(ranks: Ranks, tmp_path: Path) -> None:
    """`fp8: delayed`: scales are read, and peaks left, where the graphs have them, with evaluations between."""
    write_text(tmp_path)
    section = {"cuda_graph": True, "compile": False, "fp8": "delayed"}
    for name, steps in (("eager", 100), ("graphs", 2)):
        ranks(2).run(run_cut_off, tmp_path, name, steps, None, section)
    ranks(2).run(run_cut_off, tmp_path, "own", 100, None, {**section, "fp8": "tensorwise"})
    eager, replayed, own = (figures(tmp_path / name / "metrics.jsonl") for name in ("eager", "graphs", "own"))
    for one, record in zip(eager, replayed, strict=True):
        assert record == pytest.approx(one, rel=1e-5)
    assert own[-1]["loss"] != pytest.approx(eager[-1]["loss"], rel=1e-3), "other scales are seen"


@pytest.mark.parametrize("mesh", [{"tp": 2}, {"dp_shard": 2, "data_engine": "flat"}], ids=["tp", "shard"])
def test_auto_captures_where_the_gpu_waits_for_the_cpu(ranks: Ranks, tmp_path: Path, mesh: dict[str, Any]) -> None:
    """A tiny model is CPU-bound; a capture, or none, changes no figure."""
    write_text(tmp_path)
    # a rank's GPU may have to wait for the other rank; one that waits for its CPU decides
    assert any(waits for (waits,) in ranks(2).run(chosen, tmp_path, "measured", None, mesh))
    assert ranks(2).run(chosen, tmp_path, "declined", False, mesh) == [[False]] * 2
    measured, declined = (figures(tmp_path / name / "metrics.jsonl") for name in ("measured", "declined"))
    for one, record in zip(measured, declined, strict=True):
        assert record == pytest.approx(one, rel=1e-5)


class Waiting(nn.Module):
    """A layer; where asked, its forward waits for the GPU, or counts its calls."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.layer, self.way, self.calls = nn.Linear(8, 8), way, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "waits" and x.sum().item() > 1e9:
            x = -x
        self.calls += self.way == "counts"
        return self.layer(x)


def obstacle(device: str, way: str) -> str | None:
    from colrow.train.cuda_graph import GraphedFunction

    model = Waiting(way).to(device)
    graphed = GraphedFunction(lambda x: model(x).sum().detach(), 2, model)
    x = torch.ones(4, 8, device=device)
    graphed(x)
    graphed(x)
    if graphed.obstacle is None:
        assert graphed(x) == graphed(x)
        assert graphed.captured
    else:
        with pytest.raises(ConfigError, match="cannot be replayed"):
            graphed(x)
    return graphed.obstacle


def test_what_cannot_be_replayed_is_seen_before_it_is_captured(ranks: Ranks) -> None:
    group = ranks(1)
    assert group.run(obstacle, "plain") == [None]
    (waits,), (counts,) = group.run(obstacle, "waits"), group.run(obstacle, "counts")
    assert waits is not None
    assert "waits for the GPU" in waits
    assert Path(__file__).name in waits
    assert counts is not None
    assert "calls changes from step to step (1, then 2)" in counts


def lent(device: str) -> dict[str, Any]:
    """MiB that an evaluation reserves in the graph's memory and beside it, and what a replay leaves of a tensor made
    within."""
    from colrow.train.cuda_graph import GraphedFunction

    mebi = 2**20
    graphed = GraphedFunction(lambda x: (x.repeat(64 * mebi) * 2).sum(), 2)  # two tensors of 256 MiB while it runs
    x = torch.ones(1, device=device)
    for _ in range(3):
        assert graphed(x).item() == 128 * mebi

    def grown() -> float:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.zeros(32 * mebi, device=device).sum().item()
        return (torch.cuda.memory_reserved() - before) / mebi

    found: dict[str, Any] = {"beside": grown()}
    with graphed.lent_memory():
        found["within"] = grown()
    found["captured"] = [graphed.captured]
    with graphed.lent_memory():
        kept = torch.full((32 * mebi,), 7.0, device=device)
    found["captured"].append(graphed.captured)
    assert graphed(x).item() == 128 * mebi
    assert graphed(x).item() == 128 * mebi
    found["captured"].append(graphed.captured)
    found["kept"] = (kept == 7).all().item()
    return found


def test_an_evaluation_takes_the_graphs_memory_and_keeps_what_it_makes(ranks: Ranks) -> None:
    (found,) = ranks(1).run(lent)
    assert found["beside"] >= 128
    assert found["within"] == 0
    assert found["captured"] == [True, False, True]
    assert found["kept"], "the capture after it must not use its memory"


def collecting(device: str) -> bool:
    """Whether steps are captured beside garbage that holds a pool, where Python collects garbage all the time."""
    from colrow.train.cuda_graph import GraphedFunction

    class Garbage:
        def __init__(self) -> None:
            self.pool, self.itself = torch.cuda.MemPool(), self

    def step(x: Tensor) -> Tensor:
        before = gc.get_threshold()
        gc.set_threshold(1, 1, 1)
        cycles: list[Any] = []
        for _ in range(100):
            cycles.append(cycles)
            cycles = []
        gc.set_threshold(*before)
        return x * 2

    graphed, x = GraphedFunction(step, 2), torch.ones(1, device=device)
    for _ in range(2):
        graphed(x)
    Garbage()
    graphed(x)
    return graphed.captured


def test_no_garbage_is_collected_while_a_step_is_captured(ranks: Ranks) -> None:
    assert ranks(1).run(collecting) == [True]
