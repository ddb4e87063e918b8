"""Kill a run of two ranks inside what it does to the disk and to its weights, start it again each time, and compare its
metrics with those of a run that nobody disturbed. Prints JSON.

    python tests/helpers/killed_runs.py FOLDER short|1|...|5 [SEED]

A fault is aimed at a place in the code, not at a moment: the n-th write to a file, a rename, an update. It kills the
process there, a write or an update being half done; the other rank is killed too, as when a host loses power. Run by
test_killed_runs.py as a program, so that the processes it forks are of one with a single thread.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml

from colrow.checkpoint.distributed import Checkpoints
from colrow.cli import main as colrow
from colrow.train.optimizer import AdamW
from helpers.chaos import differences, figures, write_run
from helpers.harness import PRELOADED
from helpers.killable import KillableFile, kill

RANKS = 2
SLOWEST = 120.0
"""Seconds that a start may take on a busy machine."""


@dataclass(frozen=True)
class Fault:
    """Where a process kills itself.

    Args:
        group: `save`, `export`, `tokenization`, `update` or `anywhere`.
        event: `write` (half of the data is written), `rename` (before it), `renamed` (after it), `update` (half of the
            parameters have stepped), `alarm` (some time after the first update of this start).
        pattern: of the file that is written, or of the name that is renamed; a regular expression.
        nth: of such events in the process, from 1.
    """

    group: str
    event: str
    pattern: str = ""
    nth: int = 1
    seconds: float = 0.0

    def install(self) -> None:
        left = self.nth

        def reached(event: str, name: str) -> bool:
            nonlocal left
            if event != self.event or not re.search(self.pattern, name):
                return False
            left -= 1
            return left == 0

        _watch_writes(reached)
        for owner, call in ((os, "rename"), (os, "replace")):
            setattr(owner, call, _watched_rename(getattr(owner, call), reached))
        step = AdamW.update

        def update(self_: AdamW, gradients: Any, *args: Any) -> None:
            if reached("update", ""):
                step(self_, dict(islice(gradients.items(), len(gradients) // 2)), *args)
                kill()
            step(self_, gradients, *args)
            if reached("alarm", ""):
                signal.setitimer(signal.ITIMER_REAL, self.seconds)  # without a handler SIGALRM ends the process

        AdamW.update = update  # type: ignore[method-assign, assignment]


def _watched_rename(rename: Callable[..., None], reached: Callable[[str, str], bool]) -> Callable[..., None]:
    def watched(source: Any, target: Any, **options: Any) -> None:
        if reached("rename", str(source)):
            kill()
        rename(source, target, **options)
        if reached("renamed", str(source)):
            kill()

    return watched


def _watch_writes(reached: Callable[[str, str], bool]) -> None:
    opened = Path.open

    def watched(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        file = opened(path, mode, *args, **options)
        return KillableFile(file, partial(reached, "write", str(path))) if set(mode) & set("wxa") else file

    Path.open = watched  # type: ignore[method-assign, assignment]


DATA, MANIFEST = r"step-\d+\.unfinished/rank-.*safetensors$", r"step-\d+\.unfinished/manifest\.json$"
UNFINISHED, REMOVED, CHECKPOINT = r"step-\d+\.unfinished$", r"step-\d+\.removed$", r"checkpoints/step-\d+$"
HIDDEN, REPLACED = r"\.export\.unfinished", r"/export$"


PIECES = 5
"""Of the 40 faults: each piece is a run of its own, that is killed eight times."""


def faults(form: str, seed: int = 0) -> list[Fault]:
    """The 6 faults of the form `short`, or the 8 of a piece, `1` to `5`; tokenization comes first, the export last."""
    tokenization = [
        Fault("tokenization", "write", r"tokenizer-.*\.json"),
        Fault("tokenization", "write", r"tokens-.*/train\.bin$"),
        Fault("tokenization", "write", r"tokens-.*/meta\.json"),
        Fault("tokenization", "rename", r"tokens-.*partial"),
        Fault("tokenization", "renamed", r"tokens-.*partial"),
    ]
    save = [
        *(Fault("save", "write", DATA, nth) for nth in (1, 2, 5, 9, 14, 20)),
        *(Fault("save", "write", MANIFEST, nth) for nth in (1, 1, 2, 2)),
        *(Fault("save", "rename", UNFINISHED, nth) for nth in (1, 2)),
        *(Fault("save", "renamed", UNFINISHED, nth) for nth in (1, 2)),
        Fault("save", "renamed", CHECKPOINT),
    ]
    update = [Fault("update", "update", nth=nth) for nth in (1, 2, 3, 4, 5)]
    chance = random.Random(seed)
    anywhere = [Fault("anywhere", "alarm", seconds=chance.uniform(0.001, 0.3)) for _ in range(2 * PIECES)]
    export = [
        Fault("export", "write", HIDDEN + r"/model.*safetensors$"),
        Fault("export", "write", HIDDEN + r"/config\.json$"),
        Fault("export", "write", HIDDEN + r"/tokenizer"),
        Fault("export", "renamed", HIDDEN + "$"),
        Fault("export", "renamed", REPLACED),  # between the two renames: the previous export has a hidden name
    ]
    if form == "short":
        return [tokenization[1], save[2], save[6], update[1], save[12], export[0]]
    own = slice(int(form) - 1, None, PIECES)
    middle = save[own] + update[own] + anywhere[own]
    random.Random(f"{seed} {form}").shuffle(middle)
    return [*tokenization[own], *middle, *export[own]]


def start(folder: Path, config: Path, flags: list[str], fault: Fault | None, victim: int | None) -> list[int]:
    """Start the two ranks; when one is dead the other is killed. What `waitpid` says of each."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            _be_rank(folder, rank, port, ["train", str(config), *flags], fault if victim in (None, rank) else None)
        processes.append(child)
    return _ended(processes)


def exported(folder: Path, run: Path, fault: Fault | None) -> list[int]:
    """`colrow export` of the run into the folder that its own end writes; what `waitpid` says of it."""
    child = os.fork()
    if child == 0:
        _run(folder, 0, ["export", str(run), "-o", str(run / "export")], fault)
    return _ended([child])


def _be_rank(folder: Path, rank: int, port: int, argv: list[str], fault: Fault | None) -> NoReturn:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="127.0.0.1")
    _run(folder, rank, argv, fault)


def _run(folder: Path, number: int, argv: list[str], fault: Fault | None) -> NoReturn:
    # append: a child of a killed process may still write into the same file
    log = os.open(folder / f"log-{number}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if fault is not None:
        fault.install()
    try:
        os._exit(colrow(argv))
    except BaseException:
        os.write(log, traceback.format_exc().encode())  # whatever has become of sys.stderr
    os._exit(99)


def _ended(processes: list[int]) -> list[int]:
    statuses: dict[int, int] = {}
    end = time.monotonic() + SLOWEST
    while len(statuses) < len(processes):
        for pid in processes:
            if pid not in statuses:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = status
        dead = any(os.WIFSIGNALED(status) for status in statuses.values())
        if dead or time.monotonic() > end:
            for pid in processes:
                if pid not in statuses:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    return [statuses[pid] for pid in processes]


def state_of(run: Path) -> dict[str, Any]:
    """What is in the run's folder after a kill."""
    infos = Checkpoints(run / "checkpoints").list(checksums=True)
    records = (run / "metrics.jsonl").read_bytes().count(b"\n") if (run / "metrics.jsonl").exists() else 0
    newest = max((info.step for info in infos if info.state == "complete"), default=0)
    return {"states": sorted({info.state for info in infos}), "newest": newest, "metrics": records}


def main(folder: Path, form: str, seed: int) -> None:
    planned = faults(form, seed)
    steps = 12 if form == "short" else 60
    undisturbed, config = (write_run(folder, name, steps) for name in ("undisturbed", "killed"))
    for path in (undisturbed, config):
        tree = yaml.safe_load(path.read_text())
        tree["verify"] = "never"  # as the launcher has done: a rank would start a process for it, each time
        tree["checkpoint"]["export"] = True
        tree["data"]["cache"] = str(folder / f"cache-{path.stem}")
        path.write_text(yaml.safe_dump(tree))
    statuses = start(folder, undisturbed, [], None, None)
    assert statuses == [0, 0], (folder / "log-0.txt").read_text()
    run, results = folder / "killed", []
    for number, fault in enumerate(planned):
        flags = ["--checkpoint.asynchronous", str(number % 2 == 1)]
        victim = None if fault.group == "tokenization" or "rank-" not in fault.pattern else number % RANKS
        if fault.pattern == REPLACED:
            start(folder, config, [], None, None)  # whose end writes the export to be replaced
        before = state_of(run)["metrics"] == steps
        statuses = exported(folder, run, fault) if before else start(folder, config, flags, fault, victim)
        signals = [os.WTERMSIG(status) for status in statuses if os.WIFSIGNALED(status)]
        log = "" if signals else (folder / "log-0.txt").read_text()[-2000:]
        results.append({**asdict(fault), "signals": signals, **state_of(run), "log": log})
    statuses = [*start(folder, config, [], None, None), *exported(folder, run, None)]
    text = (folder / "log-0.txt").read_text()
    exports = [path / "export" / "model.safetensors" for path in (folder / "undisturbed", run)]
    left = sorted(path.name for path in run.iterdir())
    found = differences(figures(folder / "undisturbed"), figures(run))
    same = all(path.exists() for path in exports) and exports[0].read_bytes() == exports[1].read_bytes()
    print(
        json.dumps(
            {"kills": results, "statuses": statuses, "text": text, "differences": found, "export": same, "left": left}
        )
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in PRELOADED:  # here, and not again in each process
        importlib.import_module(name)
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
