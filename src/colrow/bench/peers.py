"""Arms that are another package's training, in processes of its own, with the config's model, mesh and batch.

`torchtitan:DIR`, a checkout of pytorch/torchtitan: its trainer, compiled, without recomputation, bf16 over fp32
weights. What it prints is read: tokens/s over windows of steps, the best of those after the first, and the memory that
its allocator has reserved. `transformers`: a Hugging Face folder's class (`transformers_peer`).
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from colrow.bench.measure import Job, timing_fields
from colrow.bench.transformers_peer import MODULE, check_transformers
from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.models.shapes import mfu, shape
from colrow.run.launch import launch

FLAVOURS = {"llama3.2-1b": "1B", "llama3-8b": "8B", "llama3-70b": "70B"}
"""torchtitan's names of this project's shapes."""
WINDOW = 5
"""Steps between two lines."""
_LINE = re.compile(r"step: *(\d+) .*memory: *([\d.]+)GiB.*tps: *([\d,]+)")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def is_peer(arm: str) -> bool:
    """Whether an arm is another package's training."""
    return _package(arm) in ("torchtitan", "transformers")


def _package(arm: str) -> str:
    return arm.partition(":")[0]


def check_peer(arm: str, config: RunConfig) -> None:
    """Raise a ConfigError where the peer is not there, or has no such model or mesh."""
    if _package(arm) == "transformers":
        check_transformers(config)
        return
    folder = _checkout(arm)
    if not (folder / "torchtitan" / "train.py").exists():
        raise ConfigError(
            f"arm {arm}: no torchtitan in {folder}: give a checkout of pytorch/torchtitan, torchtitan:DIR (main of "
            "2026-04-09, commit 7ef10559fd, was tried)"
        )
    if config.model.shape not in FLAVOURS:
        known = ", ".join(FLAVOURS)
        raise ConfigError(f"arm {arm}: torchtitan has no model of shape {config.model.shape}: use --shape, of {known}")
    if config.mesh.pp > 1 or config.micro_batches > 1:
        raise ConfigError(f"arm {arm}: pipelines and accumulation are not passed on: use pp 1 and --accumulate 1")


def measure_peer(job: Job, device: str, peak: float | None) -> dict[str, Any]:
    """A row of results.

    Args:
        device: the GPUs' name.
        peak: their FLOP/s, where they are known.

    Raises:
        ConfigError: it failed; the text is the end of what it printed.
    """
    check_peer(job.arm, job.config)
    return _transformers(job) if _package(job.arm) == "transformers" else _torchtitan(job, device, peak)


def _torchtitan(job: Job, device: str, peak: float | None) -> dict[str, Any]:
    """Run its trainer in a folder of random text, and read the rate and the memory that it prints."""
    config, folder, mesh = job.config, _checkout(job.arm), job.config.mesh
    with tempfile.TemporaryDirectory(prefix="colrow-peer-") as data:
        (Path(data) / "data.jsonl").write_text(random_text(), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(mesh.world_size)]
        # the first rank's output alone, into the pipe too: each rank prints the line that is read
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-ranks-filter", "0"]
        command += ["--role", "rank", "--tee", "3", "-m", "torchtitan.train"]
        command += ["--module", "colrow.bench.torchtitan_settings", "--config", "measured"]
        # torchtitan runs from its checkout; it imports this package, too, for its settings
        paths = [str(folder), str(Path(__file__).parents[2]), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "HF_DATASETS_OFFLINE": "1",
            "COLROW_PEER": config.model_dump_json(),
            "COLROW_PEER_DATA": data,
        }
        lines = _output_of(command, folder, environment)
    windows = windows_of(lines)
    if len(windows) < 2:
        raise ConfigError(f"arm {job.arm} failed: {' | '.join(line.strip() for line in lines[-6:])}")
    # The peer's best window counts, after the first, in which it compiles.
    reserved, rate = max(gib for gib, _ in windows), max(rate for _, rate in windows[1:])
    tokens = config.tokens_per_step / mesh.world_size
    assert config.model.shape is not None
    size = shape(config.model.shape)
    size = replace(size, num_hidden_layers=config.model.layers or size.num_hidden_layers)
    seconds = [tokens / rate for _, rate in windows]
    return _row(job, tokens / rate, min(seconds), seconds, True) | {
        "model": config.model.shape,
        "peak_reserved_gib": reserved,
        "ran": f"torchtitan {commit_of(folder)}, compiled, no recomputation, on {device}",
        **({} if peak is None else mfu(size, config.data.seq_len, rate, peak)),
    }


def _transformers(job: Job) -> dict[str, Any]:
    """Run the ranks of `transformers_peer`, and read what the first one wrote."""
    ranks = job.config.mesh.world_size
    with tempfile.TemporaryDirectory(prefix="colrow-peer-") as folder:
        files = [Path(folder) / name for name in ("job.json", "result.json")]
        files[0].write_text(job.model_dump_json(), encoding="utf-8")
        failure = launch(["-m", MODULE, *map(str, files)], ranks, save=False).failure
        if failure is not None:
            raise ConfigError(f"arm {job.arm} failed: {failure.text.strip()}")
        found = json.loads(files[1].read_text(encoding="utf-8"))
    on_gpu = "peak_reserved_gib" in found
    (middle, best), (first, last) = found["seconds"], found["losses"]
    return _row(job, middle, best, found["steps"], on_gpu) | {
        "loss_first": first,
        "loss_last": last,
        "ran": f"transformers {version('transformers')}, {found['sharded']} parameters sharded by its own plan",
        **{key: value for key, value in found.items() if key.endswith("_gib")},
    }


def _row(job: Job, seconds: float, best: float, steps: list[float], on_gpu: bool) -> dict[str, Any]:
    """What a row of results says of every peer. `best` and `steps` are seconds too."""
    config = job.config
    return {
        "arm": _package(job.arm),
        "plan": "its own",
        "loss": "its own",
        "compiled": on_gpu,
        "cuda_graph": False,
        "compute": "bfloat16" if on_gpu else "float32",
        "model": Path(str(config.model.huggingface)).name,
        **timing_fields(config, seconds, best, steps),
        "peak_allocated_gib": None,
        "mfu_causal": None,
        "mfu_full": None,
        "one_rank": False,
        # what the table reads of a trace: a peer's step is not profiled
        "trace": {"exposed": None, "idle": None, "kinds": {}, "operators": {}, "collectives": {}, "graph_launches": 0},
    }


def _checkout(arm: str) -> Path:
    return Path(arm.partition(":")[2]).expanduser().resolve()


def windows_of(lines: list[str]) -> list[tuple[float, float]]:
    """GiB and tokens/s per GPU of each window of steps. The first line, of step 1, is of one step and left out."""
    found = [match.groups() for line in lines if (match := _LINE.search(line))]
    return [(float(gib), float(rate.replace(",", ""))) for step, gib, rate in found if int(step) >= WINDOW]


def random_text() -> str:
    """Lines of JSON for torchtitan's loader, some 2 MB."""
    words, draw = [f"w{i}" for i in range(5000)], random.Random(0)
    return "".join(f'{{"text": "{" ".join(draw.choices(words, k=2000))}"}}\n' for _ in range(200))


def commit_of(folder: Path) -> str:
    """The commit of a git checkout; the version of an unpacked release; empty where neither is known."""
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    version = folder / "assets" / "version.txt"
    own = done.returncode == 0 and (folder / ".git").exists()
    return done.stdout.strip() if own else version.read_text().strip() if version.exists() else ""


def _output_of(command: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    """The lines that the command prints. It is ended when this process is interrupted."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGTERM)  # torchrun ends its ranks on SIGTERM; a kill would leave them on the GPUs
        process.wait()
        raise
    return [_COLOURS.sub("", line) for line in text.splitlines()]
