"""The end of a run: a sample of text, the loss curve, the export, and the last printed lines."""

from __future__ import annotations

import math
import resource
import shlex
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from colrow.checkpoint.carried import Carried
from colrow.checkpoint.export import export
from colrow.config import RunConfig
from colrow.data.disk import writing
from colrow.data.tokenizer import Tokenizer
from colrow.errors import ConfigError, ExportError
from colrow.models.generate import generate
from colrow.run.loop import Outcome
from colrow.run.nonfinite import FILE as NONFINITE
from colrow.run.progress import TrainingProgress, labelled
from colrow.run.run_folder import CHECKPOINTS, EXPORT
from colrow.train.evaluate import evaluation_mode
from colrow.train.metrics import FILE, perplexity, read_metrics
from colrow.train.setup import Training
from colrow.train.step import SingleStageModel, reshard


def finish(
    config: RunConfig, training: Training, tokenizer: Tokenizer, outcome: Outcome, progress: TrainingProgress
) -> None:
    """Sample, plot and export; print the results, where they are, and what to do next. Collective."""
    run = config.run.dir
    if outcome.skipped:
        progress.say(f"skipped    {outcome.skipped} of {config.train.steps} steps, not finite: {run / NONFINITE}")
    if outcome.jumped:
        progress.say(f"jumped     {outcome.jumped} steps: {run / NONFINITE}")
    if outcome.val_loss is not None:
        progress.say(f"validation loss {outcome.val_loss:.4f}, perplexity {perplexity(outcome.val_loss):.1f}")
    if config.sample.prompt is not None and config.mesh.pp == 1:
        text = sample(config, training, tokenizer)
        progress.say("sample     " + text.replace("\n", "\n           "))
    if progress.shown:
        progress.say(f"loss curve {plot_loss(run)}")
    progress.say(f"checkpoint {run / CHECKPOINTS}/step-{outcome.saved}" if outcome.saved else "checkpoint none")
    refused = False
    try:
        for line in write_export(config, training, tokenizer):
            progress.say(line)
    except (ExportError, ConfigError) as error:  # as `outputs.export_warning` has warned
        refused = True
        progress.say(labelled("export", f"none: {error}"))
    progress.say(f"memory     {peak_memory(training.device)}")
    if outcome.saved:
        prompt = config.sample.prompt or "Once"
        progress.say(f"next       {shlex.join(['colrow', 'generate', str(run), '--prompt', prompt])}")
        if not refused and training.source.exported_config is not None:
            progress.say(f"           {shlex.join(['colrow', 'export', str(run), '-o', 'DIR'])}")


def write_export(config: RunConfig, training: Training, tokenizer: Tokenizer) -> list[str]:
    """Write `export/`, where the run is to have one. What to print of it. Collective.

    Raises:
        ExportError, ConfigError: the format cannot hold the model.
    """
    source, folder = training.source, config.run.dir / EXPORT
    model_config = source.exported_config
    if not config.checkpoint.export or model_config is None:
        return []
    carried = Carried.of(source.folder, config.data.tokenizer.path, tokenizer, config.model.trust_code)
    dtype = carried.dtype(config.export.dtype)
    found = export(training.modules, folder, model_config, tokenizer, dtype=dtype, carried=carried)
    if found is None:
        return []
    return [f"export     {folder}{', for transformers' * found.is_for_transformers}", labelled("", str(found))]


def sample(config: RunConfig, training: Training, tokenizer: Tokenizer) -> str:
    """`sample.prompt` and the text that the model continues it with. Collective: all ranks sample the same ids.

    Compiled blocks are run with the batch size and length that they were compiled for: others would compile again.
    """
    assert config.sample.prompt is not None
    runner = training.step.forward_backward
    assert isinstance(runner, SingleStageModel)
    prompt = tokenizer.encode(config.sample.prompt) or [tokenizer.eos_id]
    ids = torch.tensor([prompt], device=training.device)
    if training.compiled:
        ids = ids.expand(config.train.micro_batch, -1)
    # 8-bit matmuls take tokens by 16
    multiple = config.mesh.tp if config.train.fp8 is None else math.lcm(config.mesh.tp, 16)
    with evaluation_mode(training.modules, training.device) as generators:
        generators.seed(config.run.seed)
        sampled = generate(
            runner.logits,
            ids,
            config.sample.tokens,
            temperature=config.sample.temperature,
            seed=config.run.seed,
            pad_multiple=config.data.seq_len if training.compiled else multiple,
            context=config.data.seq_len,
            eos_id=tokenizer.eos_id,
        )
    reshard(training.modules[0])
    return tokenizer.decode(sampled[0].tolist())


def plot_loss(run: Path) -> str:
    """Draw `loss.png` and `loss.svg` in the run's folder from its metrics. A line that says what was written.

    Without matplotlib (the `plot` extra) nothing is drawn, and the line says what to install.
    """
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return "not drawn: it needs matplotlib (pip install 'colrow[plot]')"
    records = [record for record in read_metrics(run / FILE) if "loss" in record]
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
        with writing(run / name):
            figure.savefig(run / name, dpi=150)
    return f"{run / 'loss.png'}, {run / 'loss.svg'}"


def peak_memory(device: torch.device) -> str:
    """The largest peak of any rank. Collective."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    allocated = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    peaks = torch.tensor([host, allocated], dtype=torch.float64, device=device)
    dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    host_gib, device_gib = (peak / 2**30 for peak in peaks.tolist())
    gpu = f", {device_gib:.2f} GiB of a GPU" if device.type == "cuda" else ""
    return f"peak {host_gib:.2f} GiB of a rank's host memory{gpu}"
