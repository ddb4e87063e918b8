"""torchrun agents, each of which stands for a host: one is killed, and the run goes on without it and with it again."""

from __future__ import annotations

import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from colrow.config import load_config
from colrow.train.metrics import read_metrics
from helpers.chaos import Agents, differences, figures, write_run
from helpers.forked import Commands
from helpers.harness import Ranks
from helpers.runs import train

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

class Mine(Llama):
    pass

def healthy():
    return Mine(replace(shape("laptop"), num_hidden_layers=1))
"""


@pytest.fixture
def start(tmp_path: Path, commands: Commands) -> Iterator[Callable[..., Agents]]:
    (tmp_path / "mine.py").write_text(MODEL, encoding="utf-8")
    started: list[Agents] = []

    def begin(config: Path, ranks: tuple[int, ...], *flags: str, port: int | None = None) -> Agents:
        started.append(Agents(tmp_path, config, ranks, f"{commands.path}/python", *flags, port=port))
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


def step_of(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def lose_an_agent(agents: Agents, run: Path, step: int) -> None:
    """Kill the second agent after a step; the first one cannot go on alone, and is ended too."""
    agents.wait_for(lambda: step_of(run) >= step, f"step {step}")
    agents.processes[1].send_signal(signal.SIGKILL)
    agents.processes[1].wait()
    agents.kill()


def test_an_agent_is_killed_and_both_start_again_with_a_data_rank_fewer_and_with_it(
    tmp_path: Path, start: Callable[..., Agents]
) -> None:
    """A data rank is killed and comes back; then an agent, and with it a rank; then all three are there again."""
    undisturbed = start(config_of(tmp_path, "undisturbed", {"dp_shard": 3}), (2, 1))
    assert undisturbed.end() == [0, 0], undisturbed.text
    want = figures(tmp_path / "undisturbed")

    config, run = config_of(tmp_path, "hosts", {"dp_shard": 3}), tmp_path / "hosts"
    agents = start(config, (2, 1))
    agents.wait_for(lambda: step_of(run) >= 3, "step 3")
    before = set(agents.ranks())
    os.kill(agents.ranks()[2], signal.SIGKILL)  # the second agent's
    agents.wait_for(lambda: len(set(agents.ranks()) - before) == 3, "three new ranks")
    lose_an_agent(agents, run, 6)
    came_back = figures(run)[:6]
    assert differences(want[:6], came_back) == []

    fewer = start(config, (1, 1), "--mesh.dp_shard", "2", "--train.micro_batch", "1")
    lose_an_agent(fewer, run, 11)
    assert re.search(r"changed    mesh.dp_shard: 3 -> 2", fewer.text)

    again = start(config, (2, 1))
    assert again.end() == [0, 0], again.text
    records = read_metrics(run / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    for record, other in zip(records, want, strict=True):  # a mesh adds up in another order
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-5)
    log = (run / "logs" / f"{socket.gethostname()}.log").read_text(encoding="utf-8")
    assert {f"rank {rank}| begins" in log for rank in range(3)} == {True}
    assert log.count("rank 2| begins") == 3


def test_both_agents_start_again_with_the_same_ranks_right_after_one_was_killed(
    tmp_path: Path, start: Callable[..., Agents], ranks: Ranks
) -> None:
    """By the same command, on the same port, as soon as the other agent has ended by SIGTERM."""
    config, run = config_of(tmp_path, "hosts", {"dp_shard": 3}), tmp_path / "hosts"
    undisturbed = config_of(tmp_path, "undisturbed", {"dp_shard": 3})
    ranks(3).run(train, load_config(undisturbed, {"train.steps": 150}))
    flags = ("--verify", "never", "--train.steps", "150")  # enough, while both are ended
    agents = start(config, (2, 1), *flags)
    agents.wait_for(lambda: step_of(run) >= 4, "step 4")
    first, second = agents.processes
    second.kill()
    second.wait()
    first.terminate()
    first.wait(60)
    agents = start(config, (2, 1), *flags, port=agents.port)
    assert agents.end() == [0, 0], agents.text
    assert "continues  after step" in agents.text
    assert differences(figures(tmp_path / "undisturbed"), figures(run)) == []


def test_the_failure_of_another_hosts_rank_is_shown_on_this_one(tmp_path: Path, start: Callable[..., Agents]) -> None:
    config = config_of(tmp_path, "sick", {"tp": 2}, "mine:sick")
    agents = start(config, (1, 1), "--verify", "never", "--check", "true")
    wanted = f"rank 1 on {socket.gethostname()} failed first; its last lines:"
    agents.wait_for(lambda: wanted in agents.text, "the other rank's word")
    assert "RuntimeError: this rank is sick" in agents.text.partition(wanted)[2]


def test_a_restart_does_not_verify_again(tmp_path: Path, start: Callable[..., Agents]) -> None:
    """`verify: auto` under torchrun with restarts, and a model of the user's own."""
    config, run = config_of(tmp_path, "own", {"tp": 2}, "mine:healthy"), tmp_path / "own"
    agents = start(config, (2,), "--check", "true", "--train.global_batch", "4")
    agents.wait_for(lambda: step_of(run) >= 3, "step 3")
    before = set(agents.ranks())
    os.kill(agents.ranks()[1], signal.SIGKILL)
    agents.wait_for(lambda: len(set(agents.ranks()) - before) == 2, "two new ranks")
    assert agents.end() == [0], agents.text
    assert agents.text.count("verify     proved: ") == 1, agents.text
    assert "continues  after step" in agents.text
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, STEPS + 1))
