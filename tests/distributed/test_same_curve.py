"""The same run on several meshes: the same batches, and the same curve but for rounding."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch

from colrow.config import RunConfig, parse_config
from colrow.data.prepare import prepare
from colrow.mesh import Mesh
from colrow.train.metrics import Record, read_metrics
from colrow.train.progress import Progress
from colrow.train.rank import train_run
from distributed.harness import Ranks

pytestmark = pytest.mark.distributed
TOLERANCE = 1e-5
"""Relative, in fp32."""


def config_of(folder: Path, mesh: Mesh, seed: int = 0) -> RunConfig:
    return parse_config(
        {
            "run": {"dir": str(folder / f"{'-'.join(map(str, mesh.degrees))}-seed{seed}"), "seed": seed},
            "model": {"shape": "laptop", "layers": 2},
            "data": {
                "corpus": str(folder / "*.txt"),
                "seq_len": 32,
                "tokenizer": {"vocab_size": 300},
                "validation_fraction": 0.2,
                "cache": str(folder / "cache"),
                "workers": 1,
            },
            "mesh": mesh.model_dump(),
            "train": {
                "steps": 6,
                "global_batch": 8,
                "micro_batch": 2,
                "lr": 3e-3,
                "warmup_steps": 2,
                "precision": "fp32",
                "compile": False,
            },
            "checkpoint": {"last": False},
            "sample": {"prompt": None},
        }
    )


def train(device: str, configs: list[RunConfig]) -> None:
    import torch.distributed as dist

    for config in configs:
        here = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
        mesh = config.mesh.build(device, dist.get_world_size())
        data = prepare(config.data, 4096, progress=False)
        train_run(config, data, mesh, here, Progress(dist.get_rank() == 0, config.train.steps, 1, io.StringIO()))


def far(want: list[Record], got: list[Record]) -> float:
    """The largest relative difference of a loss or gradient norm at any step."""
    assert [record["step"] for record in want] == [record["step"] for record in got]
    pairs = [(a[key], b[key]) for a, b in zip(want, got, strict=True) for key in ("loss", "grad_norm")]
    return max(abs(a - b) / abs(a) for a, b in pairs)


def test_the_curve_is_the_same_on_every_mesh_and_another_with_another_seed(ranks: Ranks, tmp_path: Path) -> None:
    words = [f"row {i} times column {i * i % 97} is {i * 31 % 89}." for i in range(4000)]
    (tmp_path / "text.txt").write_text("\n\n".join(words), encoding="utf-8")
    alone, other = config_of(tmp_path, Mesh()), config_of(tmp_path, Mesh(), seed=1)
    meshes = [config_of(tmp_path, mesh) for mesh in (Mesh(dp_shard=2, tp=2), Mesh(pp=2, tp=2))]
    ranks(1).run(train, [alone, other])
    ranks(4).run(train, meshes)
    want = read_metrics(alone.run.dir / "metrics.jsonl")
    assert len(want) == 6
    assert want[-1]["loss"] < want[0]["loss"]
    for config in meshes:
        assert far(want, read_metrics(config.run.dir / "metrics.jsonl")) < TOLERANCE, config.mesh
    assert far(want, read_metrics(other.run.dir / "metrics.jsonl")) > 100 * TOLERANCE
