"""Kill a save at each of its changes to the disk, one after another, and look at what is left. Prints JSON.

Run by test_killed_saves.py as a program, so that the processes it forks are of one with a single thread.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from colrow.checkpoint.distributed import Checkpoints
from colrow.checkpoint.folder import Folder
from helpers.killable import KillableFile, kill


def made(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    return model, optimizer


class Killer:
    """Kills this process at its `at`-th change to the disk; a write has then written half."""

    def __init__(self, at: int) -> None:
        self.left = at

    def reached(self) -> bool:
        self.left -= 1
        return self.left < 0

    def install(self) -> None:
        for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
            setattr(os, name, self.wrap(getattr(os, name)))
        opened = Path.open

        def open_killable(path: Path, *args: Any, **kwargs: Any) -> Any:
            file = opened(path, *args, **kwargs)
            return KillableFile(file, self.reached) if "x" in str(args) else file

        Path.open = open_killable  # type: ignore[method-assign, assignment]

    def wrap(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.reached():
                kill()
            return change(*args, **kwargs)

        return call


def look(folder: Path, seeds: dict[int, set[int]]) -> dict[str, Any]:
    """What is there after the kill, what loads, and what the next save makes of it."""
    checkpoints = Checkpoints(folder, keep=1)
    latest = checkpoints.latest()
    infos = checkpoints.list(checksums=True)
    result: dict[str, Any] = {"states": [info.state for info in infos], "latest": latest and latest.step}
    result["names"] = sorted(path.name for path in folder.iterdir())
    if latest is not None:
        model, optimizer = made(99)
        extra = checkpoints.load(latest, model, optimizer)
        truth, _ = made(int(extra["seed"]))  # type: ignore[arg-type]
        same = all(torch.equal(a, b) for a, b in zip(model.parameters(), truth.parameters(), strict=True))
        result["right"] = same and extra["seed"] in seeds[latest.step]
    checkpoints.save(3, *made(3), {"seed": 3})
    result["after"] = [path.name for path in folder.iterdir()]
    return result


def main(root: Path, step: int, naive: bool) -> None:
    """Step 1 is there; saves of `step` are killed. A naive one writes under the final name, as a control."""
    if naive:
        Folder.unfinished = Folder.final  # type: ignore[method-assign]
        Folder.commit = lambda folder, step: None  # type: ignore[method-assign, assignment]
    pristine = root / "pristine"
    Checkpoints(pristine).save(1, *made(1), {"seed": 1})
    results = []
    while True:
        folder = root / f"killed-{len(results)}"
        shutil.copytree(pristine, folder)
        child = os.fork()
        if child == 0:
            Killer(len(results) * (4 if naive else 1)).install()
            Checkpoints(folder, keep=1).save(step, *made(2), {"seed": 2})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            results.append({"exit": os.WEXITSTATUS(status), **look(folder, {1: {1, 2}, 2: {2}})})
            break
        results.append({"signal": os.WTERMSIG(status), **look(folder, {1: {1, 2} if step == 1 else {1}, 2: {2}})})
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "naive")
