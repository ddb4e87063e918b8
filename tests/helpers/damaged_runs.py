"""Cut off the files of a stopped run one after another, or change their times and the clock, and start it again. Prints
JSON. Run by test_killed_runs.py as a program, as killed_runs.py is.

    python tests/helpers/damaged_runs.py FOLDER
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from helpers.chaos import differences, figures, write_run
from helpers.harness import PRELOADED
from helpers.killed_runs import Fault, start

STEPS = 8


class Clock:
    """In the place of a fault: the clock jumps by years, back and forth, at each look."""

    def install(self) -> None:
        chance, real, real_ns = random.Random(1), time.time, time.time_ns
        years = 365 * 86400
        time.time = lambda: real() + chance.choice((-20, 0, 20)) * years  # type: ignore[assignment]
        time.time_ns = lambda: real_ns() + chance.choice((-20, 0, 20)) * years * 10**9  # type: ignore[assignment]


def old_times(folder: Path) -> None:
    """Every file is of a random day between 1970 and 2100: newer ones look older."""
    chance = random.Random(2)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (when := chance.uniform(0, 4e9), when))


def cut(name: str, chance: random.Random) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        size = (folder / name).stat().st_size
        # Records of steps up to the checkpoint exist nowhere else: the last line, of the step after it, is torn.
        os.truncate(folder / name, size - 9 if name.endswith("metrics.jsonl") else chance.randrange(max(size, 1)))

    return damage


def main(root: Path) -> None:
    chance = random.Random(0)
    pristine, folder = root / "pristine", root / "now"
    pristine.mkdir(parents=True)
    config = write_run(pristine, "run", STEPS)
    tree = yaml.safe_load(config.read_text())
    tree |= {"verify": "never", "run": {"dir": str(folder / "run")}}
    tree["data"] |= {"cache": str(folder / "cache"), "corpus": str(folder / "text.txt")}
    config.write_text(yaml.safe_dump(tree))
    shutil.copytree(pristine, folder)
    assert start(root, folder / "run.yaml", [], None, None) == [0, 0], (root / "log-0.txt").read_text()
    want = figures(folder / "run")
    shutil.rmtree(folder)
    shutil.copytree(pristine, folder)
    start(root, folder / "run.yaml", [], Fault("update", "update", nth=8), 1)
    shutil.rmtree(pristine)
    shutil.copytree(folder, pristine)  # steps 2, 4 and 6 were saved, two of them are kept
    names = sorted(str(path.relative_to(pristine)) for path in pristine.rglob("*") if path.is_file())
    cases: list[tuple[str, Callable[[Path], None], Any]] = [
        ("clock", lambda _: None, Clock()),
        ("times", old_times, None),
    ]
    cases += [(name, cut(name, chance), None) for name in names if not name.endswith(("text.txt", "run.yaml", ".lock"))]
    results = {}
    for name, damage, fault in cases:
        shutil.rmtree(folder)
        shutil.copytree(pristine, folder)
        damage(folder)
        statuses = [os.waitstatus_to_exitcode(s) for s in start(root, folder / "run.yaml", [], fault, None)]
        log = "".join((root / f"log-{rank}.txt").read_text() for rank in range(2))
        found = differences(want, figures(folder / "run")) if statuses == [0, 0] else []
        results[name] = {"statuses": statuses, "differences": found, "log": log}
    print(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in PRELOADED:
        importlib.import_module(name)
    main(Path(sys.argv[1]))
