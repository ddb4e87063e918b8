"""Train one config on several meshes and lay the curves over each other: Markdown on the screen, JSON with --output.

    python benchmarks/meshes.py --output benchmarks/results/meshes.json
    python benchmarks/meshes.py --config configs/llama3-8b-tp4.yaml --plot meshes.png --tolerance 0.01 \\
        --meshes tp4 tp2-dp_shard2 tp2-pp2:train.micro_batch=1 -- --train.global_batch 4

The meshes differ in the order in which they add numbers up and in nothing else: the same initial weights, the same
batches. In fp32 that is the last digit; what a step's rounding changes, Adam carries on, so the difference grows with
the steps. The first mesh is what the others are compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from colrow.mesh import AXES, Mesh
from colrow.train.metrics import Record, read_metrics

MESHES = ("tp1", "tp2", "tp2-dp_shard2", "tp2-dp_replicate2", "tp2-pp2")
ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-5
"""How far a loss may lie from that of the first mesh, as a share of it."""
SETTLE = 5  # steps that compile, or in which allocator and clocks settle: no measure of speed
COLOURS = ("#4477aa", "#228833", "#ee6677", "#aa3377", "#ccbb44")


def mesh_of(spec: str) -> Mesh:
    """The mesh of `tp2-pp2` or `tp2-pp2:train.micro_batch=1`."""
    parts = [re.fullmatch(r"([a-z_]+?)(\d+)", part) for part in spec.split(":")[0].split("-")]
    if not all(part and part[1] in AXES for part in parts):
        raise SystemExit(f"{spec}: a mesh is axes with their degrees, as in tp2-dp_shard2; axes are {', '.join(AXES)}")
    return Mesh(**{part[1]: int(part[2]) for part in parts if part})


def title(spec: str) -> str:
    """`pp 2 × tp 2, train.micro_batch=1`."""
    return ", ".join([str(mesh_of(spec)), *spec.split(":")[1:]])


def command(spec: str, config: str, folder: str, flags: list[str]) -> list[str]:
    """`colrow train` on this mesh, in a folder of its own below `folder`; the spec's own changes come last."""
    mesh, changes = mesh_of(spec), spec.split(":")[1:]
    axes = {"tp": mesh.tp} | {axis: n for axis in ("dp_shard", "dp_replicate", "pp") if (n := getattr(mesh, axis)) > 1}
    chosen = [word for axis, n in axes.items() for word in (f"--mesh.{axis}", str(n))]
    own = [word for change in changes for word in (f"--{change.split('=')[0]}", change.split("=", 1)[1])]
    return ["colrow", "train", config, *chosen, *flags, *own, "--run.dir", f"{folder}/{re.sub('[:=]', '-', spec)}"]


def run(words: list[str], limit: float | None) -> list[Record] | None:
    """Start the run again, in the repository's root, and return its records; None where it failed or took too long."""
    folder = Path(words[-1])
    if (ROOT / folder / "metrics.jsonl").exists():
        raise SystemExit(f"{folder} holds a run already: name another --folder")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen([sys.executable, "-m", *words], cwd=ROOT, env=env, stdout=sys.stderr)
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        print(f"{shlex.join(words)}: no end within {limit:.0f} s", file=sys.stderr)
        while process.poll() is None:  # the first signal asks the ranks to stop, the second one kills them
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                continue
        return None
    return None if process.returncode else read_metrics(ROOT / folder / "metrics.jsonl")


def distance(want: list[Record], got: list[Record], key: str) -> float:
    """The largest difference at any step, as a share of `want`'s figure.

    Raises:
        ValueError: the runs have not the same steps.
    """
    if [record["step"] for record in want] != [record["step"] for record in got]:
        raise ValueError("the runs have not the same steps")
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(want, got, strict=True))


def speed(records: list[Record], ranks: int) -> float:
    """Tokens/s of a rank: the median step."""
    return statistics.median(record["tokens_per_second"] for record in records[SETTLE:] or records) / ranks


def table(curves: dict[str, list[Record]], every: int) -> str:
    """Losses by step and mesh, each mesh's largest distance from the first one's, its speed and its memory."""
    first = next(iter(curves.values()))
    rows = [["step", *(title(spec) for spec in curves)], ["---:"] * (len(curves) + 1)]
    for i, record in enumerate(first):
        if i == 0 or record["step"] % every == 0 or i == len(first) - 1:
            rows.append([str(record["step"]), *(f"{records[i]['loss']:.6f}" for records in curves.values())])
    for key, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        far = [distance(first, records, key) for records in curves.values()]
        rows.append([f"largest difference, {words}", *("" if i == 0 else f"{d:.1e}" for i, d in enumerate(far))])
    speeds = {spec: speed(records, mesh_of(spec).world_size) for spec, records in curves.items()}
    rows.append(["tokens/s a rank", *(f"{rate:,.0f}" for rate in speeds.values())])
    if all("memory_gib" in records[-1] for records in curves.values()):
        rows.append(["GiB of the first rank", *(f"{records[-1]['memory_gib']:.1f}" for records in curves.values())])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def draw(curves: dict[str, list[Record]], to: Path) -> None:
    """Above the losses, below how far each lies from the first mesh's, as a share of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="tight")
    first = next(iter(curves.values()))
    for (spec, records), colour in zip(curves.items(), COLOURS, strict=False):
        steps = [record["step"] for record in records]
        above.plot(steps, [record["loss"] for record in records], color=colour, linewidth=1.2, label=title(spec))
        if records is not first:
            apart = [abs(b["loss"] / a["loss"] - 1) for a, b in zip(first, records, strict=True)]
            below.semilogy(steps, apart, color=colour, linewidth=1.2)
    above.set_ylabel("loss, nats a token")
    above.legend(frameon=False)
    below.set_ylabel("from the first")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=120)


def report(curves: dict[str, list[Record]], commands: dict[str, list[str]]) -> dict[str, Any]:
    """What --output gets."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    cuda = torch.cuda.is_available()
    first = next(iter(curves.values()))
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.stdout.strip(),
        "torch": str(torch.__version__),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "devices": torch.cuda.device_count() if cuda else None,
        "largest_difference_of_loss": {
            title(spec): distance(first, records, "loss") for spec, records in curves.items()
        },
        "runs": {
            title(spec): {
                "command": shlex.join(commands[spec]),
                "tokens_per_second_per_rank": round(speed(records, mesh_of(spec).world_size), 1),
                "metrics": records,
            }
            for spec, records in curves.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/laptop.yaml")
    parser.add_argument("--meshes", nargs="+", default=MESHES, help="tp2-pp2, tp2-pp2:train.micro_batch=1, ...")
    parser.add_argument("--folder", default="runs/meshes", help="where the runs lie")
    parser.add_argument("--output", type=Path, help="a file for the curves, as JSON")
    parser.add_argument("--plot", type=Path, help="a file for the curves, as PNG")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="how far a loss may lie from the first's")
    parser.add_argument("--limit", type=float, help="seconds after which a run is ended")
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
    commands = {spec: command(spec, options.config, options.folder, flags) for spec in options.meshes}
    print("\n".join(shlex.join(words) for words in commands.values()), end="\n\n", flush=True)
    curves: dict[str, list[Record]] = {}
    for spec, words in commands.items():
        records = run(words, options.limit)
        if records is None:
            continue
        curves[spec] = records
        if options.output is not None:  # what there is stays, whatever becomes of the other runs
            options.output.write_text(json.dumps(report(curves, commands)) + "\n", encoding="utf-8")
    if curves:
        print(table(curves, every=5))
    if curves and options.plot is not None:
        draw(curves, options.plot)
    if missing := [spec for spec in commands if spec not in curves]:
        raise SystemExit(f"without a curve: {', '.join(missing)}")
    first = next(iter(curves.values()))
    far = {spec: distance(first, records, "loss") for spec, records in curves.items()}
    if max(far.values()) > options.tolerance:
        raise SystemExit(f"a curve is further than {options.tolerance} from the first: {far}")


if __name__ == "__main__":
    main()
