"""Lay loss curves of runs over each other: a picture, JSON, and how far each lies from the first.

    python benchmarks/curves.py --output curves plain=runs/plain eager=runs/eager overlap=runs/overlap

Upper half: the losses, each step a dot and their running mean a line. Lower half: the running mean's distance from the
first run's. The second run is the yardstick: the same plan with sums in another order.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from colrow.train.metrics import read_metrics

WINDOW = 20  # steps of the running mean
COLOURS = ("#4477aa", "#999999", "#228833", "#ee6677", "#aa3377", "#ccbb44")


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl")]


def smooth(values: np.ndarray) -> np.ndarray:
    """Means of WINDOW values in a row; the first lies at step WINDOW."""
    return np.convolve(values, np.ones(WINDOW) / WINDOW, "valid")


def table(curves: dict[str, np.ndarray]) -> str:
    first = next(iter(curves.values()))
    half = len(first) // 2
    rows = ["| run | last loss | mean of the second half | mean distance there | largest distance, running mean |"]
    rows.append("| --- | ---: | ---: | ---: | ---: |")
    for name, values in curves.items():
        apart = values - first
        far = np.abs(smooth(apart)).max()
        rows.append(
            f"| {name} | {values[-1]:.4f} | {values[half:].mean():.4f} | {apart[half:].mean():+.4f} | {far:.4f} |"
        )
    return "\n".join(rows)


def draw(curves: dict[str, np.ndarray], to: Path) -> None:
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(2, 1), layout="tight")
    first = smooth(next(iter(curves.values())))
    for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
        steps = np.arange(1, len(values) + 1)
        above.plot(steps, values, ".", color=colour, markersize=2, alpha=0.4)
        above.plot(steps[WINDOW - 1 :], smooth(values), color=colour, label=name)
        below.plot(steps[WINDOW - 1 :], smooth(values) - first, color=colour)
    above.set_ylabel("loss, nats a token")
    above.legend(frameon=False)
    below.set_ylabel("from the first")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(to, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="without a suffix: .png and .json are added")
    parser.add_argument("runs", nargs="+", help="name=folder")
    options = parser.parse_args()
    folders = dict(run.split("=", 1) for run in options.runs)
    curves = {name: np.array(losses(Path(folder))) for name, folder in folders.items()}
    steps = min(map(len, curves.values()))
    curves = {name: values[:steps] for name, values in curves.items()}
    print(table(curves))
    draw(curves, options.output.with_suffix(".png"))
    options.output.with_suffix(".json").write_text(
        json.dumps({name: values.tolist() for name, values in curves.items()}) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
