"""The same run on several meshes: the same batches, and the same curve but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest

from colrow.config import RunConfig
from colrow.mesh import Mesh
from colrow.train.metrics import Record, read_metrics
from helpers.harness import Ranks
from helpers.runs import a_run, train, write_text

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
"""Relative, in fp32."""


def config_of(folder: Path, mesh: Mesh, seed: int = 0) -> RunConfig:
    return a_run(
        folder,
        f"{'-'.join(map(str, mesh.degrees))}-seed{seed}",
        run={"seed": seed},
        model={"shape": "laptop", "layers": 2},
        mesh=mesh.model_dump(),
        train={"steps": 4, "global_batch": 8, "lr": 3e-3, "precision": "fp32", "compile": False},
        checkpoint={"last": False},
    )


def train_all(device: str, configs: list[RunConfig]) -> None:
    for config in configs:
        train(device, config)


def far(want: list[Record], got: list[Record]) -> float:
    """The largest relative difference of a loss or gradient norm at any step."""
    assert [record["step"] for record in want] == [record["step"] for record in got]
    pairs = [(a[key], b[key]) for a, b in zip(want, got, strict=True) for key in ("loss", "grad_norm")]
    return max(abs(a - b) / abs(a) for a, b in pairs)


@pytest.mark.exhaustive
def test_the_curve_is_the_same_on_every_mesh_and_another_with_another_seed(ranks: Ranks, tmp_path: Path) -> None:
    write_text(tmp_path)
    alone, other = config_of(tmp_path, Mesh()), config_of(tmp_path, Mesh(), seed=1)
    meshes = [config_of(tmp_path, mesh) for mesh in (Mesh(dp_shard=2, tp=2), Mesh(pp=2, tp=2))]
    ranks(1).run(train_all, [alone, other])
    ranks(4).run(train_all, meshes)
    want = read_metrics(alone.run.dir / "metrics.jsonl")
    assert len(want) == 4
    assert want[-1]["loss"] < want[0]["loss"]
    for config in meshes:
        assert far(want, read_metrics(config.run.dir / "metrics.jsonl")) < TOLERANCE, config.mesh
    assert far(want, read_metrics(other.run.dir / "metrics.jsonl")) > 100 * TOLERANCE
