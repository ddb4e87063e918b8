"""Arms that are another package's training: `torchtitan:DIR`, where DIR is a checkout of pytorch/torchtitan.

Its own trainer runs in processes of its own, with the config's model, mesh and batch, compiled, without recomputation,
bf16 over fp32 weights. What it prints is read: tokens/s over windows of steps, the best of those after the first, and
the memory that its allocator has reserved.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from colrow.config import RunConfig
from colrow.errors import ConfigError
from colrow.models.shapes import mfu, shape

FLAVOURS = {"llama3.2-1b": "1B", "llama3-8b": "8B", "llama3-70b": "70B"}
"""torchtitan's names of this project's shapes."""
WINDOW = 5
"""Steps between two lines."""
_LINE = re.compile(r"step: *(\d+) .*memory: *([\d.]+)GiB.*tps: *([\d,]+)")
_COLOURS = re.compile("\x1b\\[[0-9;]*m")


def is_peer(arm: str) -> bool:
    return arm.partition(":")[0] == "torchtitan"


def check_peer(arm: str, config: RunConfig) -> Path:
    """The folder of a peer's arm.

    Raises:
        ConfigError: torchtitan is not there, or has no such model or mesh.
    """
    folder = Path(arm.partition(":")[2]).expanduser().resolve()
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
    return folder


def measure_peer(arm: str, config: RunConfig, device: str, peak: float | None) -> dict[str, Any]:
    """A row of results.

    Args:
        device: the GPUs' name.
        peak: their FLOP/s, where they are known.

    Raises:
        ConfigError: it failed; the text is the end of what it printed.
    """
    folder, mesh = check_peer(arm, config), config.mesh
    with tempfile.TemporaryDirectory(prefix="colrow-peer-") as data:
        (Path(data) / "data.jsonl").write_text(random_text(), encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(mesh.world_size)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--local-ranks-filter", "0"]
        command += ["--role", "rank", "--tee", "3", "-m", "torchtitan.train"]
        command += ["--module", "colrow.bench.torchtitan_settings", "--config", "measured"]
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
        raise ConfigError(f"arm {arm} failed: {' | '.join(line.strip() for line in lines[-6:])}")
    reserved, rate = max(gib for gib, _ in windows), max(rate for _, rate in windows[1:])
    tokens = config.tokens_per_step / mesh.world_size
    assert config.model.shape is not None
    size = shape(config.model.shape)
    size = replace(size, num_hidden_layers=config.model.layers or size.num_hidden_layers)
    shares = {"mfu_causal": None, "mfu_full": None} if peak is None else mfu(size, config.data.seq_len, rate, peak)
    return {
        "arm": arm.partition(":")[0],
        "plan": "its own",
        "loss": "its own",
        "compiled": True,
        "cuda_graph": False,
        "compute": "bfloat16",
        "model": config.model.shape,
        "layers": config.model.layers,
        "mesh": mesh.model_dump(),
        "seq_len": config.data.seq_len,
        "micro_batch": config.train.micro_batch,
        "tokens_per_step": config.tokens_per_step,
        "step_ms": tokens / rate * 1e3,
        "step_ms_best": tokens / rate * 1e3,
        "steps_ms": [tokens / rate * 1e3 for _, rate in windows],
        "tokens_per_second_per_gpu": rate,
        "peak_allocated_gib": None,
        "peak_reserved_gib": reserved,
        **shares,
        "ran": f"torchtitan {commit_of(folder)}, compiled, no recomputation, on {device}",
        "one_rank": False,
        "trace": {"exposed": None, "idle": None, "kinds": {}, "operators": {}, "collectives": {}, "graph_launches": 0},
    }


def windows_of(lines: list[str]) -> list[tuple[float, float]]:
    """GiB and tokens/s per GPU of each window of steps but the first line's, which is of one step."""
    found = [match.groups() for line in lines if (match := _LINE.search(line))]
    return [(float(gib), float(rate.replace(",", ""))) for step, gib, rate in found if int(step) >= WINDOW]


def random_text() -> str:
    """Lines of JSON for torchtitan's loader, some 2 MB."""
    words, draw = [f"w{i}" for i in range(5000)], random.Random(0)
    return "".join(f'{{"text": "{" ".join(draw.choices(words, k=2000))}"}}\n' for _ in range(200))


def commit_of(folder: Path) -> str:
    """Of a git checkout; else its version, or nothing."""
    done = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    version = folder / "assets" / "version.txt"
    own = done.returncode == 0 and (folder / ".git").exists()
    return done.stdout.strip() if own else version.read_text().strip() if version.exists() else ""


def _output_of(command: list[str], folder: Path, environment: dict[str, str]) -> list[str]:
    """What it prints; it ends with this process."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        text, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGTERM)
        process.wait()
        raise
    return [_COLOURS.sub("", line) for line in text.splitlines()]
