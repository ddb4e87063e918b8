"""`colrow checkpoints RUN`: what checkpoints a run has, and in what state."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table

from colrow.checkpoint.folder import CheckpointInfo, Folder, format_bytes, list_checkpoints, newest_complete
from colrow.cli.flags import parse
from colrow.cli.text import Terminal
from colrow.errors import CheckpointError

_STYLES = {"complete": "green", "unfinished": "yellow", "damaged": "red"}


@dataclass(frozen=True)
class Flags:
    """List a run's checkpoints and their state."""

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run's folder, or its folder of checkpoints."""
    checksums: bool = False
    """Read every file and compare it with its checksum."""
    json: bool = False
    """Print JSON instead."""


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 when a checkpoint is damaged."""
    flags = parse(Flags, "checkpoints", argv)
    infos = list_checkpoints(Folder(checkpoints_of(flags.run)), flags.checksums)
    if flags.json:
        print(json.dumps([as_tree(info) for info in infos], indent=2))
    elif infos:
        _show(infos)
    else:
        print(f"no checkpoints in {flags.run}")
    return 1 if any(info.state == "damaged" for info in infos) else 0


def checkpoints_of(run: Path) -> Path:
    """The folder of a run's checkpoints. Raises CheckpointError when there is no such run."""
    if not run.is_dir():
        raise CheckpointError(f"{run} is not a folder: give a run's folder, such as runs/laptop")
    inside = run / "checkpoints"
    return inside if inside.is_dir() else run


def as_tree(info: CheckpointInfo) -> dict[str, object]:
    """One checkpoint as JSON."""
    return {
        "step": info.step,
        "path": str(info.path),
        "mesh": None if info.mesh is None else info.mesh.by_axis,
        "bytes": info.bytes,
        "saved": info.saved or None,
        "state": info.state,
        "reason": info.reason or None,
    }


def _show(infos: list[CheckpointInfo]) -> None:
    table = Table("step", "mesh", "size", "saved (UTC)", "state", box=None, pad_edge=False)
    for info in infos:
        mesh = "" if info.mesh is None else str(info.mesh)
        saved = info.saved.replace("T", " ").removesuffix("+00:00")
        state = f"[{_STYLES[info.state]}]{info.state}[/]"
        table.add_row(str(info.step), mesh, format_bytes(info.bytes), saved, state)
    console = Terminal(highlight=False, soft_wrap=True)
    console.print(table)
    for info in infos:
        if info.reason:
            console.print(f"{info.path}: {info.reason}", markup=False)
    newest = newest_complete(infos)
    console.print("no complete checkpoint" if newest is None else f"newest complete: {newest.path}", markup=False)
