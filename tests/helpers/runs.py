"""A small run on a small text of the project's own, for tests that start the trainer on ranks."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from colrow.config import RunConfig, parse_config
from colrow.data.prepare import prepare
from colrow.models.build import Source, build_source
from colrow.plans.plan import Plan
from colrow.run.loop import Watchers
from colrow.run.preflight import choose_plan
from colrow.run.progress import TrainingProgress
from colrow.run.rank import train_run
from colrow.train.metrics import read_metrics


def write_text(folder: Path) -> None:
    """The text that `a_run` trains on: sums that a small model begins to learn in a few steps."""
    rows = [f"row {i} times column {i * i % 97} is {i * 31 % 89}." for i in range(4000)]
    (folder / "text.txt").write_text("\n\n".join(rows), encoding="utf-8")


def a_run(folder: Path, name: str, **sections: dict[str, Any] | str | bool) -> RunConfig:
    """A run in `folder`/`name` of a one-layer model; `sections` are laid over these, key by key."""
    tree: dict[str, Any] = {
        "run": {"dir": str(folder / name)},
        "model": {"shape": "laptop", "layers": 1},
        "data": {
            "corpus": str(folder / "*.txt"),
            "seq_len": 32,
            "tokenizer": {"vocab_size": 300},
            "validation_fraction": 0.2,
            "cache": str(folder / "cache"),
            "workers": 1,
        },
        "train": {"steps": 6, "global_batch": 4, "micro_batch": 2, "lr": 1e-3, "warmup_steps": 2},
        "sample": {"prompt": None},
        "check": False,  # what the launcher does; here there is none
    }
    for key, section in sections.items():
        whole = key in tree and isinstance(section, dict) and key != "model"
        tree[key] = tree[key] | section if whole else section
    return parse_config(tree)


def figures(run: Path) -> list[dict[str, float]]:
    """The records without what the clock and the machine say: speed and memory."""
    trained = {"step", "loss", "grad_norm", "lr", "tokens", "val_loss", "perplexity"}
    return [{k: v for k, v in record.items() if k in trained} for record in read_metrics(run)]


def model_and_plan(config: RunConfig) -> tuple[Source, Plan]:
    """What `preflight.check` hands on, without its checks."""
    source = build_source(config.model, config.run.seed)
    return source, choose_plan(config, source.model)


def train(device: str, config: RunConfig, stop_after: int | None = None) -> tuple[int, bool, str]:
    """One run, which rank 1 alone asks to stop after `stop_after` steps."""
    import torch.distributed as dist

    torch._dynamo.reset()  # a test trains more models in one process than a block's forward may be compiled for
    here = torch.device(device, dist.get_rank()) if device == "cuda" else torch.device(device)
    mesh = config.mesh.build(device, dist.get_world_size())
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return stop_after is not None and dist.get_rank() == 1 and calls >= stop_after

    text = io.StringIO()
    progress = TrainingProgress(dist.get_rank() == 0, config.train.steps, 1, text)
    data = prepare(config.data, 4096, progress=False)
    outcome = train_run(
        config,
        *model_and_plan(config),
        data,
        mesh,
        here,
        Watchers(progress, stop),
        command="colrow train tiny.yaml",
    )
    return outcome.step, outcome.stopped, text.getvalue()
