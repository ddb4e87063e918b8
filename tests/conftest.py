"""Options and fixtures for all tests."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from colrow.config import RunConfig, parse_config
from helpers.forked import Commands
from helpers.harness import Ranks, forkserver

LONGEST_FIRST = (
    "checking/test_check.py",
    "checking/test_unproven.py",
    "checking/test_composed.py",
    "docs/test_tutorial.py",
    "distributed/test_tensor_parallel.py",
    "distributed/test_every_mesh.py",
    "run/test_launch.py",
    "run/test_killed_runs.py",
    "distributed/test_checkpoint_meshes.py",
    "verifying/test_training_conditions.py",
    "distributed/test_torchs_own.py",
    "verifying/test_verify.py",
    "distributed/test_fast_styles.py",
    "distributed/test_compute_weights.py",
    "dryrun/test_block_kinds.py",
    "derive/test_rule_table.py",
    "styles/test_fast_plan.py",
    "data/test_prepare.py",
    "dryrun/test_report.py",
    "run/test_preflight.py",
    "checkpoint/test_huggingface_on_ranks.py",
    "checkpoint/test_killed_saves.py",
    "distributed/test_fast_float8.py",
    "distributed/test_training.py",
    "derive/test_gathered.py",
    "run/test_decision.py",
    "derive/test_derive.py",
    "distributed/test_resume.py",
)
"""The files that take more than 8 s: one that starts last would leave the other worker idle."""

# Tensors here are tiny: a second thread only spins until it gets the core that the other worker's tests need.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# pytest 9 hands itself to each logger that does not propagate. torch's trace is one, and would describe every fake
# tensor to it: lines that hide what failed.
logging.getLogger("torch.__trace").propagate = True

# Runs sign their folders with a key of the user's: not the one of who runs the tests, and not a new one in a home.
os.environ["XDG_CONFIG_HOME"] = tempfile.mkdtemp(prefix="colrow-tests-config-")
atexit.register(shutil.rmtree, os.environ["XDG_CONFIG_HOME"], ignore_errors=True)

forkserver()  # it is started once, by whoever needs it first, and then has what was asked for by then


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests/distributed run")
    parser.addoption(
        "--rank-timeout", type=float, default=float("inf"), help="most seconds that ranks may take for an answer"
    )
    parser.addoption(
        "--exhaustive", action="store_true", help="run the further variants of proofs too, as `make test-all` does"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first; without --exhaustive, the tests marked so are deselected."""
    order = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))
    if config.getoption("--exhaustive"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_collection_finish() -> None:
    gc.freeze()  # 300,000 objects of torch and of the tests, which a collection would look through for nothing
    gc.set_threshold(50_000)


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    """For one module: groups that wait for the next one would keep the cores busy (see `harness`)."""
    ranks = Ranks(request.config.getoption("--device"), request.config.getoption("--rank-timeout"))
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Python commands that need not import torch (see `forked`)."""
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.stop()


@pytest.fixture
def tree(tmp_path: Path) -> dict[str, Any]:
    """A small run, as a tree of plain values that a test changes."""
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
