"""A small run, as a tree of plain values that a test changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colrow.config import RunConfig, parse_config


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    return {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"shape": "laptop", "layers": 2},
        "data": {"corpus": "*.txt", "seq_len": 32, "cache": str(tmp_path / "cache")},
        "mesh": {"tp": 2},
        "train": {"steps": 100, "global_batch": 8, "micro_batch": 4, "lr": 1e-3},
        "device": "cpu",
    }


@pytest.fixture
def config(tree: dict[str, Any]) -> Callable[..., RunConfig]:
    """`config(**{"train.steps": 3})`: the small run with some keys changed."""

    def build(**changes: Any) -> RunConfig:
        for dotted, value in changes.items():
            *parents, last = dotted.split(".")
            section = tree
            for key in parents:
                section = section.setdefault(key, {})
            section[last] = value
        return parse_config(tree)

    return build
