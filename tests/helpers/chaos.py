"""Train while processes are killed at random moments, and compare with a run that nobody disturbed.

    python tests/helpers/chaos.py --kills 20

The run goes under torchrun with `--max-restarts`, whose agents bring the killed ranks back. A kill is aimed at a
moment: the ranks' start, some time within a step, or a save that has begun. Halfway everything is killed, agents too,
as when hosts lose power; the command is given again and saves asynchronously from then on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

SOURCES = Path(__file__).parents[2] / "src"
PATIENCE = 240.0
"""Seconds until something that does not come is an error; a busy machine needs a minute to start ranks."""

Record = dict[str, Any]


@dataclass(frozen=True)
class Kill:
    """One kill: when it was meant to be, whom it hit, and what it left."""

    moment: str
    victims: str
    asynchronous: bool
    metrics: int
    """The last step in metrics.jsonl just after it."""
    complete: int
    """The step of the newest checkpoint under a final name, 0 for none."""
    unfinished: bool
    """Whether it left a save that had begun."""


def write_run(folder: Path, name: str, steps: int) -> Path:
    """A config on a small text of the project's own: two tp ranks, a save after every second step. Its path."""
    text = folder / "text.txt"
    if not text.exists():
        words = [f"row {i} times column {i * i % 97} is {i * 31 % 89}." for i in range(4000)]
        text.write_text("\n\n".join(words), encoding="utf-8")
    config = {
        "run": {"dir": str(folder / name)},
        "model": {"shape": "laptop", "layers": 1},
        "data": {
            "corpus": str(text),
            "seq_len": 32,
            "tokenizer": {"vocab_size": 300},
            "validation_fraction": 0.2,
            "cache": str(folder / "cache"),
            "workers": 1,
        },
        "mesh": {"tp": 2},
        "train": {"steps": steps, "global_batch": 4, "micro_batch": 2, "lr": 1e-3, "warmup_steps": 2},
        "eval": {"every": 5, "batches": 1},
        "checkpoint": {"every": 2, "export": False},
        "sample": {"prompt": None},
        "check": False,  # of the plan, at each start: it takes as long as half of a rank's imports
        "device": "cpu",
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def figures(run: Path) -> list[Record]:
    """The records of a run's metrics.jsonl as they stand there, without what the clock says."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]


def differences(want: list[Record], got: list[Record]) -> list[str]:
    """What is not equal, bit for bit: missing, repeated or misplaced steps, and figures. Empty when nothing is."""
    steps = [record["step"] for record in got]
    if steps != [record["step"] for record in want]:
        return [f"the steps are {steps}, not 1 to {len(want)} in order"]
    return [
        f"step {a['step']}: {key} is {b.get(key)!r}, not {a.get(key)!r}"
        for a, b in zip(want, got, strict=True)
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


class Agents:
    """torchrun agents on this machine, and what they have printed.

    Args:
        ranks: how many each agent starts.
        python: what runs the ranks.
        port: where they meet; a free one unless given.
    """

    def __init__(
        self, folder: Path, config: Path, ranks: Sequence[int], python: str, *flags: str, port: int | None = None
    ) -> None:
        env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SOURCES), *sys.path])}
        env["PYTHON_EXEC"] = python  # torchrun's name for it
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_ERROR_FILE"):
            env.pop(name, None)
        self.port = port or free_port()
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(len(ranks))]
        command += ["--max-restarts", "1000", "--monitor-interval", "0.1"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{self.port}", "--local-addr", "127.0.0.1"]
        train = ["-m", "colrow", "train", str(config), *flags]
        self._log = (folder / f"agents-{time.monotonic_ns()}.log").open("w", encoding="utf-8")
        self.processes = [
            subprocess.Popen(
                [*command, "--nproc-per-node", str(each), *train],
                cwd=folder,
                env=env,
                stdout=self._log,
                stderr=subprocess.STDOUT,
            )
            for each in ranks
        ]

    @property
    def text(self) -> str:
        return Path(self._log.name).read_text(encoding="utf-8")

    def ranks(self) -> list[int]:
        """Process ids of the ranks that run now, the first agent's first."""
        return [pid for agent in self.processes for pid in _children(agent.pid)]

    def wait_for(self, happened: Callable[[], bool], what: str) -> None:
        """Return when `happened`, looking often: a kill's moment depends on it."""
        end = time.monotonic() + PATIENCE
        while not happened():
            if any(agent.poll() is not None for agent in self.processes):
                raise AssertionError(f"torchrun ended before {what}:\n{self.text}")
            if time.monotonic() > end:
                raise AssertionError(f"no {what} within {PATIENCE:.0f} s:\n{self.text}")
            time.sleep(0.005)

    def end(self) -> list[int]:
        """Wait for all agents; their exit statuses."""
        return [agent.wait(PATIENCE) for agent in self.processes]

    def kill(self) -> None:
        """Kill agents and ranks."""
        ranks = self.ranks()
        for agent in self.processes:
            if agent.poll() is None:
                agent.kill()
        for pid in ranks:
            _kill(pid)
        for agent in self.processes:
            agent.wait()
        self._log.close()


class Chaos:
    """Kills at random moments in the life of one run.

    Args:
        config: as write_run wrote it.
        run: the run's folder.
        agents: 1 or 2 torchrun agents, of two ranks together.
        seed: of the moments; how far a process has come by then is the machine's.
        python: what runs the ranks.
    """

    def __init__(self, config: Path, run: Path, agents: int = 1, seed: int = 0, python: str = sys.executable) -> None:
        self._config, self._run, self._count, self._python = config, run, agents, python
        self._random = random.Random(seed)
        self._steps = int(yaml.safe_load(config.read_text(encoding="utf-8"))["train"]["steps"])
        self._agents: Agents | None = None
        self._seen: set[int] = set()

    def train(self, kills: int, log: Callable[[Kill], None] = lambda kill: None) -> list[Kill]:
        """Train to the last step, with so many kills on the way; half of them while saves are asynchronous."""
        done: list[Kill] = []
        try:
            while len(done) < kills:
                late = len(done) >= (kills + 1) // 2
                if self._agents is None:
                    self._start(late)
                done.append(self._kill(late, everything=len(done) == (kills + 1) // 2 - 1 and kills > 1))
                log(done[-1])
            if self._agents is None:
                self._start(True)
            assert self._agents is not None
            statuses = self._agents.end()
            if any(statuses):
                raise AssertionError(f"torchrun ended with {statuses}:\n{self._agents.text}")
        finally:
            if self._agents is not None:
                self._agents.kill()
        return done

    @property
    def text(self) -> str:
        """What the agents that finished the run have printed."""
        assert self._agents is not None
        return self._agents.text

    def _start(self, asynchronous: bool) -> None:
        flags = ("--checkpoint.asynchronous", str(asynchronous))
        ranks = (2 // self._count,) * self._count
        self._agents = Agents(self._config.parent, self._config, ranks, self._python, *flags)

    def _kill(self, asynchronous: bool, everything: bool) -> Kill:
        assert self._agents is not None
        agents = self._agents
        agents.wait_for(lambda: len(set(agents.ranks()) - self._seen) == 2, "start of two new ranks")
        before = self._state()
        moment = self._random.choices(("start", "step", "save"), (1, 4, 5))[0]
        if moment == "start":
            time.sleep(self._random.uniform(0.0, 5.0))
        else:
            # Metrics replaces the file when a rank goes on from a checkpoint
            agents.wait_for(lambda: _inode(self._metrics) not in (None, before[0]), "metrics of the new ranks")
            if moment == "step":
                # not behind the last step: where the machine is busy, steps pass before they are looked at
                target = min(self._last_step() + self._random.randint(1, 6), self._steps - 1)
                agents.wait_for(lambda: self._last_step() >= target, f"step {target}")
                time.sleep(self._random.uniform(0.0, 0.1))
            else:
                agents.wait_for(lambda: bool(self._saving() - before[1]), "save that begins")
                time.sleep(self._random.choice((0.0, self._random.uniform(0.0, 0.02), self._random.uniform(0.0, 0.2))))
        ranks = agents.ranks()
        self._seen.update(ranks)
        if everything:
            agents.kill()
            self._agents, victims = None, "agents and ranks"
        else:
            chosen = self._random.choice([[0], [1], [0, 1]])
            for i in chosen:
                _kill(ranks[i])
            victims = f"rank{'s' if len(chosen) > 1 else ''} {' and '.join(map(str, chosen))}"
        names = os.listdir(self._checkpoints) if self._checkpoints.exists() else []
        complete = [int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d+", name)]
        left = any(name.endswith(".unfinished") for name in names)
        return Kill(moment, victims, asynchronous, self._last_step(), max(complete, default=0), left)

    @property
    def _metrics(self) -> Path:
        return self._run / "metrics.jsonl"

    @property
    def _checkpoints(self) -> Path:
        return self._run / "checkpoints"

    def _state(self) -> tuple[int | None, set[tuple[str, int]]]:
        return _inode(self._metrics), self._saving()

    def _saving(self) -> set[tuple[str, int]]:
        """Saves that have begun, distinguished from leftovers of killed ones by time: inodes are used again."""
        found = set()
        for path in self._checkpoints.glob("*.unfinished"):
            with suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ctime_ns))
        return found

    def _last_step(self) -> int:
        try:
            return self._metrics.read_bytes().count(b"\n")
        except FileNotFoundError:
            return 0


def _children(pid: int) -> list[int]:
    """Child processes of `pid` that run `colrow train`."""
    found = []
    with suppress(FileNotFoundError, ProcessLookupError):  # they end while we look
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                if b"colrow\0train" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--agents", type=int, choices=(1, 2), default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where runs and logs stay; a temporary folder unless given")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="colrow-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    steps = 5 * options.kills + 12
    undisturbed = Agents(folder, write_run(folder, "undisturbed", steps), (2,), sys.executable)
    try:
        statuses = undisturbed.end()
        if any(statuses):
            raise SystemExit(f"the undisturbed run ended with {statuses}:\n{undisturbed.text}")
    finally:
        undisturbed.kill()
    chaos = Chaos(write_run(folder, "chaos", steps), folder / "chaos", options.agents, options.seed)
    kills = chaos.train(options.kills, log=lambda kill: print(kill, flush=True))
    found = differences(figures(folder / "undisturbed"), figures(folder / "chaos"))
    saves = {mode: sum(k.unfinished for k in kills if k.asynchronous == mode) for mode in (False, True)}
    print(
        f"{len(kills)} kills, {saves[False]} in synchronous and {saves[True]} in asynchronous saves, {steps} steps: "
        f"{'equal bit for bit' if not found else f'{len(found)} differences'}"
    )
    for line in found[:20]:
        print(line)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
