"""Train one config on five meshes and lay the curves over each other: Markdown on the screen, JSON with --output.

    python benchmarks/meshes.py --output benchmarks/results/meshes.json

The meshes differ in the order in which they add numbers up and in nothing else: the same initial weights, the same
batches, fp32. What a step's rounding changes, Adam carries on, so the difference grows with the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from colrow.mesh import Mesh
from colrow.train.metrics import Record, read_metrics

MESHES = {
    "1 process": Mesh(),
    "tp 2": Mesh(tp=2),
    "tp 2 × dp_shard 2": Mesh(tp=2, dp_shard=2),
    "tp 2 × dp_replicate 2": Mesh(tp=2, dp_replicate=2),
    "pp 2 × tp 2": Mesh(pp=2, tp=2),
}
ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
"""How far a loss may lie from that of one process, as a share of it."""


def command(mesh: Mesh, config: str, folder: str, flags: list[str]) -> list[str]:
    """`colrow train` on this mesh, in a folder of its own below `folder`."""
    axes = {"tp": mesh.tp} | {axis: n for axis in ("dp_shard", "dp_replicate", "pp") if (n := getattr(mesh, axis)) > 1}
    name = "-".join(f"{axis}{n}" for axis, n in axes.items())
    chosen = [word for axis, n in axes.items() for word in (f"--mesh.{axis}", str(n))]
    return ["colrow", "train", config, *chosen, *flags, "--run.dir", f"{folder}/{name}"]


def run(words: list[str]) -> list[Record]:
    """Start the run anew, in the repository's root, and return its records."""
    folder = Path(words[-1])
    if (ROOT / folder / "metrics.jsonl").exists():
        raise SystemExit(f"{folder} holds a run already: name another --folder")
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, env=env, stdout=sys.stderr)
    if done.returncode:
        raise SystemExit(done.returncode)
    return read_metrics(ROOT / folder / "metrics.jsonl")


def distance(want: list[Record], got: list[Record], key: str) -> float:
    """The largest difference at any step, as a share of `want`'s figure.

    Raises:
        ValueError: the runs have not the same steps.
    """
    if [record["step"] for record in want] != [record["step"] for record in got]:
        raise ValueError("the runs have not the same steps")
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(want, got, strict=True))


def table(curves: dict[str, list[Record]], every: int) -> str:
    """Losses by step and mesh, and each mesh's largest distance from the first one's."""
    first = next(iter(curves.values()))
    rows = [["step", *curves], ["---:"] * (len(curves) + 1)]
    for i, record in enumerate(first):
        if i == 0 or record["step"] % every == 0 or i == len(first) - 1:
            rows.append([str(record["step"]), *(f"{records[i]['loss']:.6f}" for records in curves.values())])
    for key, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        far = [distance(first, records, key) for records in curves.values()]
        rows.append([f"largest difference, {words}", *("" if i == 0 else f"{d:.1e}" for i, d in enumerate(far))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/laptop.yaml")
    parser.add_argument("--folder", default="runs/meshes", help="where the runs lie")
    parser.add_argument("--output", type=Path, help="a file for the curves, as JSON")
    parser.add_argument(
        "flags",
        nargs="*",
        help="for colrow train, after --; without them 30 steps of 8 × 64 tokens through 2 layers",
    )
    options = parser.parse_args()
    flags = options.flags or shlex.split(
        "--train.steps 30 --train.warmup_steps 5 --train.lr 1e-3 --train.global_batch 8 --train.micro_batch 2 "
        "--data.seq_len 64 --model.layers 2 --train.precision fp32 --eval.every 0 --checkpoint.every 0 "
        "--checkpoint.last False --sample.prompt None"
    )
    commands = {name: command(mesh, options.config, options.folder, flags) for name, mesh in MESHES.items()}
    curves = {name: run(words) for name, words in commands.items()}
    print("\n".join(shlex.join(words) for words in commands.values()), end="\n\n")
    print(table(curves, every=5))
    first = next(iter(curves.values()))
    far = {name: distance(first, records, "loss") for name, records in curves.items()}
    if options.output is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        report = {
            "commit": commit.stdout.strip(),
            "torch": str(torch.__version__),
            "device": platform.processor() or platform.machine(),
            "largest_difference_of_loss": far,
            "runs": {name: {"command": shlex.join(commands[name]), "metrics": curves[name]} for name in curves},
        }
        options.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if max(far.values()) > TOLERANCE:
        raise SystemExit(f"a curve is further than {TOLERANCE} from that of one process: {far}")


if __name__ == "__main__":
    main()
