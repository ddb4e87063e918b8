"""torchrun agents, each of which stands for a host."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from helpers.chaos import Agents, write_run
from helpers.forked import Commands

pytestmark = [pytest.mark.distributed, pytest.mark.exhaustive]
STEPS = 18

MODEL = """
import os
from dataclasses import replace
from colrow.models.llama import Llama
from colrow.models.shapes import shape

class Sick(Llama):
    def forward(self, *args, **kwargs):
        if os.environ["RANK"] == "1":
            raise RuntimeError("this rank is sick")
        return super().forward(*args, **kwargs)

def sick():
    return Sick(replace(shape("laptop"), num_hidden_layers=1))

"""


@pytest.fixture
def start(tmp_path: Path, commands: Commands) -> Iterator[Callable[..., Agents]]:
    (tmp_path / "mine.py").write_text(MODEL, encoding="utf-8")
    started: list[Agents] = []

    def begin(config: Path, ranks: tuple[int, ...], *flags: str) -> Agents:
        started.append(Agents(tmp_path, config, ranks, f"{commands.path}/python", *flags))
        return started[-1]

    yield begin
    for agents in started:
        agents.kill()


def config_of(folder: Path, name: str, mesh: dict[str, int], model: str | None = None) -> Path:
    path = write_run(folder, name, STEPS)
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    tree["mesh"], tree["train"]["global_batch"] = mesh, 6
    tree["data"]["corpus"], tree["plan"] = str(folder / "text.txt"), "llama"
    if model is not None:
        tree["model"] = {"python": model}
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return path


def test_the_failure_of_another_hosts_rank_is_shown_on_this_one(tmp_path: Path, start: Callable[..., Agents]) -> None:
    config = config_of(tmp_path, "sick", {"tp": 2}, "mine:sick")
    agents = start(config, (1, 1), "--verify", "never", "--check", "true")
    wanted = f"rank 1 on {socket.gethostname()} failed first; its last lines:"
    agents.wait_for(lambda: wanted in agents.text, "the other rank's word")
    assert "RuntimeError: this rank is sick" in agents.text.partition(wanted)[2]
