"""Options and fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distributed.harness import Ranks, forkserver
from forked import Commands

forkserver()  # it is started once, by whoever needs it first, and then has what was asked for by then


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests/distributed run")
    parser.addoption(
        "--rank-timeout", type=float, default=float("inf"), help="most seconds that ranks may take for an answer"
    )


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
