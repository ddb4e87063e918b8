"""`colrow calibrate -o TABLE`: measure this host's GPUs and links for `colrow forecast --table TABLE`."""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from colrow.cli.flags import parse
from colrow.errors import ConfigError

JOB = "--job"


@dataclass(frozen=True)
class Flags:
    """Measure matmuls, attention, memory, the update, all-gathers and peer copies on this host, and what launching them
    costs its CPU in a training step; some minutes."""

    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Write the table to this file."""
    gpus: int | None = None
    """Ranks, one a GPU; all of this host's GPUs unless given."""
    device: str = "cuda"
    """cuda, or cpu to see that it works."""
    small: bool = False
    """Small sizes, which measure nothing of use."""


def main(argv: list[str]) -> int:
    """Exit 0; 1 when a rank failed; 2 for bad usage."""
    if argv and argv[0] == JOB:
        return _rank(Path(argv[1]), argv[2], argv[3] == "small")
    flags = parse(Flags, "calibrate", argv)
    import torch

    from colrow.cli.text import require_writable

    require_writable(flags.output)
    if flags.device not in ("cuda", "cpu"):
        raise ConfigError(f"--device {flags.device}: use cuda, or cpu")
    found = torch.cuda.device_count() if flags.device == "cuda" else 2
    if not found:
        raise ConfigError("no GPU is visible: run it on the host that the forecast is for, or with --device cpu")
    ranks = found if flags.gpus is None else flags.gpus
    # ranks on a CPU share its cores, so any small number will do
    if not 1 <= ranks <= max(found, 8 if flags.device == "cpu" else 0):
        raise ConfigError(f"--gpus {ranks}: this host has {found}")
    from colrow.data.disk import write_result
    from colrow.run.launch import launch

    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "table.json"
        size = "small" if flags.small else "full"
        failure = launch(["-m", "colrow", "calibrate", JOB, str(result), flags.device, size], ranks, save=False).failure
        if failure is not None:
            print(f"colrow calibrate: error: {failure.text.strip()}", file=sys.stderr)
            return 1
        table = json.loads(result.read_text(encoding="utf-8"))
    from colrow.bench.cpu_rates import SMALL, Steps, cpu_rates

    steps = SMALL if flags.small else Steps()
    table["rates"] |= cpu_rates(ranks, flags.device, table["rates"], steps, _say)
    write_result(flags.output, json.dumps(table, indent=1) + "\n")
    print(f"{table['source']}; table written to {flags.output}")
    return 0


def _say(line: str) -> None:
    print(f"colrow calibrate: {line}", file=sys.stderr, flush=True)


def _rank(result: Path, device_type: str, small: bool) -> int:
    """One rank, under the launcher."""
    import torch.distributed as dist

    from colrow.cli.ranks import rank_folder, rank_info, reporting_errors
    from colrow.forecasting.calibrate import SMALL, Sizes, calibrate
    from colrow.run.process_group import join
    from colrow.run.stop import StopRequest

    with reporting_errors("calibrate"):
        info = rank_info()
        device = join(device_type, info.local_rank)
        with StopRequest(rank_folder()):  # by whose file the launcher kills this rank on Ctrl-C
            table = calibrate(device, SMALL if small else Sizes())
        if info.rank == 0:
            result.write_text(json.dumps(table), encoding="utf-8")
        dist.destroy_process_group()
    return 0
