"""The loss curve of a run, as PNG and SVG."""

from __future__ import annotations

from pathlib import Path

from colrow.train.metrics import FILE, read_metrics


def plot_loss(run: Path) -> str:
    """Draw `loss.png` and `loss.svg` in the run's folder from its metrics. A line that says what was written.

    Without matplotlib (the `plot` extra) nothing is drawn, and the line says what to install.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn: it needs matplotlib (pip install 'colrow[plot]')"
    records = read_metrics(run / FILE)
    if not records:
        return "not drawn: metrics.jsonl has no step"
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    steps = [record["step"] for record in records]
    axes.plot(steps, [record["loss"] for record in records], color="#9db4d6", linewidth=1.0, label="training")
    evaluated = [record for record in records if "val_loss" in record]
    if evaluated:
        axes.plot(
            [record["step"] for record in evaluated],
            [record["val_loss"] for record in evaluated],
            color="#b3382c",
            linewidth=1.6,
            marker="o",
            markersize=3.5,
            label="validation",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token)")
    axes.set_title(run.resolve().name)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    for name in ("loss.png", "loss.svg"):
        figure.savefig(run / name, dpi=150)
    return f"{run / 'loss.png'}, {run / 'loss.svg'}"
