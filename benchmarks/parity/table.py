"""The table of docs/guide/training-step.md: each small model on each mesh against one process, in fp64.

    python -m benchmarks.parity.table [-o docs/guide/training-step.md] [--model NAME ...]

Ranks are processes of this host, on CPUs. Without -o the table is printed. Exits with 1 where an error is over 1e-10.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.parity.models import MODELS
from benchmarks.parity.step import Errors, on_ranks
from colrow.mesh import Mesh

MESHES = {
    "tp 2": Mesh(tp=2),
    "dp_shard 2": Mesh(dp_shard=2),
    "dp_replicate 2": Mesh(dp_replicate=2),
    "tp 2 × dp_shard 2": Mesh(dp_shard=2, tp=2),
    "dp_replicate 2 × dp_shard 2": Mesh(dp_replicate=2, dp_shard=2),
    "pp 2 × dp_shard 2": Mesh(pp=2, dp_shard=2),
}
TOLERANCE = 1e-10
BEGIN, END = "<!-- table: python -m benchmarks.parity.table -->", "<!-- end of table -->"


def cases(models: Sequence[str] = tuple(MODELS)) -> list[tuple[str, str]]:
    """Each model with each mesh that it can run on, as names."""
    return [(model, mesh) for model in models for mesh in MESHES if MODELS[model].pipelines or MESHES[mesh].pp == 1]


def run(device: str, wanted: Sequence[tuple[str, str]], folder: Path) -> dict[tuple[str, str], Errors]:
    """The cases on the ranks of the default group, all of whose meshes have its size. Collective."""
    return {
        (model, mesh): on_ranks(device, model, MESHES[mesh], folder / f"{number}")
        for number, (model, mesh) in enumerate(wanted)
    }


def worst_of(ranks: Sequence[Errors]) -> Errors:
    """The largest error that any rank saw."""
    names = ("loss", "gradients", "parameters", "buffers", "resumed")
    return Errors(**{name: max(getattr(errors, name) for errors in ranks) for name in names})


def table(found: dict[tuple[str, str], Errors]) -> str:
    """In Markdown: loss / gradients / parameters after five steps / resumed against uninterrupted."""
    models = list(dict.fromkeys(model for model, _ in found))
    rows = [f"| model | {' | '.join(MESHES)} |", "| --- |" + " --- |" * len(MESHES)]
    rows += [f"| {model} | {' | '.join(_cell(found.get((model, mesh))) for mesh in MESHES)} |" for model in models]
    return "\n".join(rows)


def _cell(errors: Errors | None) -> str:
    if errors is None:
        return ""
    values = (errors.loss, errors.gradients, max(errors.parameters, errors.buffers), errors.resumed)
    return " / ".join(f"{value:.0e}" if value else "0" for value in values)


def _rank(rank: int, world: int, store: str, wanted: Sequence[tuple[str, str]], folder: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    torch.save(run("cpu", wanted, folder), folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def measured(wanted: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Errors]:
    """The cases, on one group of processes for each number of ranks."""
    found: dict[tuple[str, str], Errors] = {}
    for world in sorted({MESHES[mesh].world_size for _, mesh in wanted}):
        part = [(model, mesh) for model, mesh in wanted if MESHES[mesh].world_size == world]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            mp.spawn(_rank, (world, str(folder / "store"), part, folder), nprocs=world)
            ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]
        found |= {case: worst_of([rank[case] for rank in ranks]) for case in part}
    return {case: found[case] for case in wanted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", type=Path, help="the page whose table is replaced")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    found = measured(cases(options.model))
    text = table(found)
    if options.o is None:
        print(text)
    else:
        page = options.o.read_text(encoding="utf-8")
        replaced = re.sub(
            f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.S
        )
        options.o.write_text(replaced, encoding="utf-8")
    wrong = {case: errors for case, errors in found.items() if errors.worst > TOLERANCE or errors.resumed}
    for case, errors in wrong.items():
        print(f"{' on '.join(case)}: {errors}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
