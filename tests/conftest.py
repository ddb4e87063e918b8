"""Options and fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distributed.harness import Group


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests/distributed run")


class Ranks:
    """`ranks(4)` is a group of four processes, started at first use and shared by all tests."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._groups: dict[int, Group] = {}

    def __call__(self, world: int) -> Group:
        if self.device == "cuda":
            import torch

            if world > torch.cuda.device_count():
                pytest.skip(f"{world} ranks need {world} GPUs, and {torch.cuda.device_count()} are there")
        return self._groups.setdefault(world, Group(world, self.device))

    def stop(self) -> None:
        for group in self._groups.values():
            group.stop()


@pytest.fixture(scope="session")
def ranks(request: pytest.FixtureRequest) -> Iterator[Ranks]:
    ranks = Ranks(request.config.getoption("--device"))
    yield ranks
    ranks.stop()
